"""The architecture of a checkpoint, read from its tensors' shapes.

Variant names in a checkpoint's config may lie; shapes cannot. What shapes do not tell (horizon,
head counts, …) comes from the files' metadata or from the caller; who contradicts a shape is told
so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from halfpi.checkpoints.errors import CheckpointError
from halfpi.config import Pi05Config

Shapes = Mapping[str, tuple[int, ...]]

# Where each size can be read: (tensor, axis). With three, one misshapen tensor is outvoted.
_WITNESSES: Mapping[str, tuple[tuple[str, int], ...]] = {
    "patch_size": (("vision.patch_embed.weight", 2), ("vision.patch_embed.weight", 3)),
    "vision_width": (
        ("vision.patch_embed.bias", 0),
        ("vision.norm.weight", 0),
        ("vision.norm.bias", 0),
    ),
    "vision_mlp": (
        ("vision.layers.0.mlp.fc1.bias", 0),
        ("vision.layers.0.mlp.fc1.weight", 0),
        ("vision.layers.0.mlp.fc2.weight", 1),
    ),
    "vocab_size": (("prefix.embed.weight", 0),),
    "prefix_width": (
        ("prefix.embed.weight", 1),
        ("prefix.layers.0.attn_norm.weight", 0),
        ("vision.projector.bias", 0),
    ),
    "prefix_mlp": (
        ("prefix.layers.0.mlp.gate.weight", 0),
        ("prefix.layers.0.mlp.up.weight", 0),
        ("prefix.layers.0.mlp.down.weight", 1),
    ),
    "expert_width": (("action_in.bias", 0), ("time_mlp_in.bias", 0), ("time_mlp_out.bias", 0)),
    "expert_mlp": (
        ("expert.layers.0.mlp.gate.weight", 0),
        ("expert.layers.0.mlp.up.weight", 0),
        ("expert.layers.0.mlp.down.weight", 1),
    ),
    "action_dim": (("action_out.bias", 0), ("action_out.weight", 0), ("action_in.weight", 1)),
}
_TOKENS = (("vision.position_embed", 0),)
_KEY_ROWS = (
    ("prefix.layers.0.attn.k.weight", 0),
    ("expert.layers.0.attn.k.weight", 0),
    ("expert.layers.0.attn.v.weight", 0),
)
_QUERY_ROWS = (
    ("expert.layers.0.attn.q.weight", 0),
    ("expert.layers.0.attn.o.weight", 1),
    ("prefix.layers.0.attn.q.weight", 0),
)
_SO400M_WIDTH, _SO400M_HEADS = 1152, 16  # SigLIP So400m/14, openpi siglip.py


@dataclass(frozen=True)
class _Size:
    value: int
    because: str


def derive_config(
    shapes: Shapes, stated: Mapping[str, int | float], overrides: Mapping[str, object]
) -> Pi05Config:
    """The `Pi05Config` of tensors of `shapes`; `overrides` win over what the files have `stated`.

    Raises CheckpointError for a name that is no field of Pi05Config or a value of the wrong type,
    for a value that contradicts a shape, and when the SigLIP head count is nowhere to be found.
    """
    given = _checked({**stated, **overrides})
    sizes = _read_sizes(shapes, int(given.get("kv_heads", 1)))
    for name, value in given.items():
        if name in sizes and sizes[name].value != value:
            raise CheckpointError(f"{name}={value} contradicts {sizes[name].because}")
    fields = {**{name: size.value for name, size in sizes.items()}, **given}
    if "vision_heads" not in fields:
        if fields.get("vision_width") != _SO400M_WIDTH:
            raise CheckpointError(
                "vision_heads cannot be read from tensor shapes; pass vision_heads=…"
            )
        fields["vision_heads"] = _SO400M_HEADS
    try:
        return Pi05Config(**fields)  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(f"the tensors are no π0.5: {error}") from error


def _checked(given: Mapping[str, object]) -> dict[str, int | float]:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Pi05Config)}
    checked: dict[str, int | float] = {}
    for name, value in given.items():
        if name not in kinds:
            raise CheckpointError(f"Pi05Config has no field {name}; it has {', '.join(kinds)}")
        accepted = (int, float) if kinds[name] is float else int
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise CheckpointError(f"{name} must be of type {kinds[name].__name__}, got {value!r}")
        checked[name] = value
    return checked


def _read_sizes(shapes: Shapes, kv_heads: int) -> dict[str, _Size]:
    read = {name: _vote(shapes, witnesses) for name, witnesses in _WITNESSES.items()}
    read["vision_depth"] = _count_layers(shapes, "vision")
    read["depth"] = _count_layers(shapes, "expert")
    tokens = _vote(shapes, _TOKENS)
    if tokens is not None:
        read["image_size"] = _image_size(tokens, read["patch_size"])
    keys, queries = _vote(shapes, _KEY_ROWS), _vote(shapes, _QUERY_ROWS)
    read["head_dim"] = _divide(keys, kv_heads, "kv_heads")
    if read["head_dim"] is not None:
        read["q_heads"] = _divide(queries, read["head_dim"].value, "head_dim")
    return {name: size for name, size in read.items() if size is not None}


def _vote(shapes: Shapes, witnesses: tuple[tuple[str, int], ...]) -> _Size | None:
    """The size that most of the existing `witnesses` agree on; the first decides a draw."""
    seen = {
        (name, axis): shapes[name][axis]
        for name, axis in witnesses
        if name in shapes and axis < len(shapes[name])
    }
    if not seen:
        return None
    value = Counter(seen.values()).most_common(1)[0][0]
    name = next(name for (name, _), size in seen.items() if size == value)
    return _Size(value, f"{name} of shape {shapes[name]}, which gives {value}")


def _count_layers(shapes: Shapes, part: str) -> _Size | None:
    pattern = re.compile(rf"{part}\.layers\.(\d+)\.")
    layers = {int(match[1]) for match in map(pattern.match, shapes) if match}
    if not layers:
        return None
    return _Size(max(layers) + 1, f"{part}.layers.{max(layers)}, the last layer of {part}")


def _image_size(tokens: _Size, patch_size: _Size | None) -> _Size | None:
    side = math.isqrt(tokens.value)
    if side**2 != tokens.value:
        raise CheckpointError(f"{tokens.because} tokens per image, which is no square")
    if patch_size is None:
        return None
    size = side * patch_size.value
    return _Size(size, f"{tokens.because} patches of {patch_size.value} pixels: {size} pixels")


def _divide(size: _Size | None, by: int, name: str) -> _Size | None:
    if size is None or by <= 0:
        return None
    if size.value % by:
        raise CheckpointError(f"{size.because} rows, which is no multiple of {name}={by}")
    value = size.value // by
    return _Size(value, f"{size.because} rows of {name}={by}: {value}")
