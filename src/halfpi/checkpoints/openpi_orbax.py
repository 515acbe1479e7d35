"""openpi's JAX parameters as canonical tensors: names, layouts, and LoRA merged into the weights.

Arrays of a stack of layers carry the layer on their first axis and are read layer by layer. Layouts
are those of openpi siglip.py, gemma.py and lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfpi.checkpoints.contents import Contents, StoredTensor
from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.openpi_assets import read_assets
from halfpi.checkpoints.orbax import OrbaxTree, StoredArray

_BLOCK = "PaliGemma/img/Transformer/encoderblock/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_0/"
_LAYERS = "PaliGemma/llm/layers/"
# openpi's only LoRA variants, gemma_2b_lora and gemma_300m_lora, have alpha = rank (16 and 32), so
# A·B is added unscaled. For another rank its scale, which differs between attention and MLP, is
# unknown.
_LORA_RANKS = (16, 32)


@dataclass(frozen=True)
class _Rule:
    """Where a canonical tensor is: in the array at `path`, past the axes of layer and `part`.

    ndim: its axes there. layout: to torch's layout. part: which of the two that the array holds.
    """

    path: str
    ndim: int
    layout: Callable[[Tensor], Tensor]
    part: int | None = None


def _same(w: Tensor) -> Tensor:
    return w


def _flat(w: Tensor) -> Tensor:
    """Bias (q, k) → (q·k)."""
    return w.flatten()


def _conv(w: Tensor) -> Tensor:
    """Kernel (height, width, in, out) → (out, in, height, width)."""
    return w.permute(3, 2, 0, 1)


def _dense(w: Tensor) -> Tensor:
    """Kernel (in, out…) → (out, in)."""
    return w.flatten(1).T


def _dense_from_heads(w: Tensor) -> Tensor:
    """Kernel (q, k, out) → (out, q·k)."""
    return w.flatten(0, 1).T


def _heads(w: Tensor) -> Tensor:
    """Einsum weight (q, in, k) → (q·k, in)."""
    return w.transpose(1, 2).flatten(0, 1)


def _pair(name: str, path: str, kernel_ndim: int = 2) -> dict[str, _Rule]:
    """A dense layer's kernel and bias."""
    return {
        f"{name}.weight": _Rule(f"{path}/kernel", kernel_ndim, _dense),
        f"{name}.bias": _Rule(f"{path}/bias", kernel_ndim - 1, _flat),
    }


def _norm(name: str, path: str) -> dict[str, _Rule]:
    return {
        f"{name}.weight": _Rule(f"{path}/scale", 1, _same),
        f"{name}.bias": _Rule(f"{path}/bias", 1, _same),
    }


def _vision_rules() -> dict[str, _Rule]:
    layer = "vision.layers.{}."
    rules = {
        "vision.patch_embed.weight": _Rule("PaliGemma/img/embedding/kernel", 4, _conv),
        "vision.patch_embed.bias": _Rule("PaliGemma/img/embedding/bias", 1, _same),
        "vision.position_embed": _Rule("PaliGemma/img/pos_embedding", 3, lambda w: w.squeeze(0)),
        **_norm(layer + "attn_norm", _BLOCK + "LayerNorm_0"),
        **_norm(layer + "mlp_norm", _BLOCK + "LayerNorm_1"),
        **_pair(layer + "mlp.fc1", _BLOCK + "MlpBlock_0/Dense_0"),
        **_pair(layer + "mlp.fc2", _BLOCK + "MlpBlock_0/Dense_1"),
        layer + "attn.o.weight": _Rule(_ATTENTION + "out/kernel", 3, _dense_from_heads),
        layer + "attn.o.bias": _Rule(_ATTENTION + "out/bias", 1, _same),
        **_norm("vision.norm", "PaliGemma/img/Transformer/encoder_norm"),
        **_pair("vision.projector", "PaliGemma/img/head"),
    }
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules |= _pair(f"{layer}attn.{short}", _ATTENTION + name, 3)
    return rules


def _gemma_rules(stack: str, suffix: str) -> dict[str, _Rule]:
    layer = stack + ".layers.{}."
    attn, mlp = _LAYERS + "attn/", f"{_LAYERS}mlp{suffix}/"
    return {
        layer + "attn.q.weight": _Rule(f"{attn}q_einsum{suffix}/w", 3, _heads),
        layer + "attn.k.weight": _Rule(f"{attn}kv_einsum{suffix}/w", 3, _heads, 0),
        layer + "attn.v.weight": _Rule(f"{attn}kv_einsum{suffix}/w", 3, _heads, 1),
        layer + "attn.o.weight": _Rule(f"{attn}attn_vec_einsum{suffix}/w", 3, _dense_from_heads),
        layer + "mlp.gate.weight": _Rule(mlp + "gating_einsum", 2, _dense, 0),
        layer + "mlp.up.weight": _Rule(mlp + "gating_einsum", 2, _dense, 1),
        layer + "mlp.down.weight": _Rule(mlp + "linear", 2, _dense),
    }


_RULES = {
    **_vision_rules(),
    "prefix.embed.weight": _Rule("PaliGemma/llm/embedder/input_embedding", 2, _same),
    **_gemma_rules("prefix", ""),
    "prefix.layers.{}.attn_norm.weight": _Rule(_LAYERS + "pre_attention_norm/scale", 1, _same),
    "prefix.layers.{}.mlp_norm.weight": _Rule(_LAYERS + "pre_ffw_norm/scale", 1, _same),
    "prefix.norm.weight": _Rule("PaliGemma/llm/final_norm/scale", 1, _same),
    **_gemma_rules("expert", "_1"),
    **_pair("expert.layers.{}.attn_norm.dense", _LAYERS + "pre_attention_norm_1/Dense_0"),
    **_pair("expert.layers.{}.mlp_norm.dense", _LAYERS + "pre_ffw_norm_1/Dense_0"),
    **_pair("expert.norm.dense", "PaliGemma/llm/final_norm_1/Dense_0"),
    **_pair("action_in", "action_in_proj"),
    **_pair("action_out", "action_out_proj"),
    **_pair("time_mlp_in", "time_mlp_in"),
    **_pair("time_mlp_out", "time_mlp_out"),
}

# Where arrays have (heads, head_dim), by the field of Pi05Config that counts the heads.
_HEAD_AXES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "vision_heads": {
        **{f"{_ATTENTION}{name}/kernel": (2, 3) for name in ("query", "key", "value")},
        **{f"{_ATTENTION}{name}/bias": (1, 2) for name in ("query", "key", "value")},
        f"{_ATTENTION}out/kernel": (1, 2),
    },
    "q_heads": {
        **{f"{_LAYERS}attn/q_einsum{suffix}/w": (1, 3) for suffix in ("", "_1")},
        **{f"{_LAYERS}attn/attn_vec_einsum{suffix}/w": (1, 2) for suffix in ("", "_1")},
    },
    "kv_heads": {f"{_LAYERS}attn/kv_einsum{suffix}/w": (2, 4) for suffix in ("", "_1")},
}


def read_openpi_orbax(root: Path, params: Path, asset_id: str | None) -> Contents:
    """The checkpoint at `root` whose orbax tree is at `params`.

    Raises CheckpointError for an unreadable tree, an array with the wrong number of axes, a LoRA of
    a rank that openpi has no variant of, and as `read_assets` does.
    """
    tree = OrbaxTree(params)
    loras = dict(_find_loras(tree))
    tensors: list[tuple[tuple[str, int], str, StoredTensor]] = []
    for name, rule in _RULES.items():
        if rule.path in tree.arrays:
            lora = loras.get(rule.path)
            for layer, tensor in _tensors_of(tree, rule, "{}" in name, lora):
                tensors.append(((rule.path, layer or 0), name.format(layer), tensor))
    tensors.sort(key=lambda entry: entry[0])
    known = {rule.path for rule in _RULES.values()}
    known.update(path for lora in loras.values() for path in lora)
    assets = read_assets(root, asset_id)
    return Contents(
        format="openpi-orbax",
        root=root,
        tensors={name: tensor for _, name, tensor in tensors},
        unknown=tuple(path for path in tree.arrays if path not in known),
        stated={**_head_counts(tree), **assets.stated},
        processing=assets.processing,
        assumptions=assets.assumptions,
    )


def _head_counts(tree: OrbaxTree) -> dict[str, int]:
    """Head counts, which are axes of their own; `_tensors_of` has checked that these exist.

    Raises CheckpointError when arrays split heads differently, which would not show once flattened.
    """
    counts = {}
    for name, axes in _HEAD_AXES.items():
        splits = {
            path: tuple(tree.arrays[path].shape[axis] for axis in pair)
            for path, pair in axes.items()
            if path in tree.arrays
        }
        if len(set(splits.values())) > 1:
            raise CheckpointError(f"{tree.directory}: {name} × head_dim differ: {splits}")
        for heads, _ in splits.values():
            counts[name] = heads
    return counts


def _find_loras(tree: OrbaxTree) -> Iterator[tuple[str, tuple[str, str]]]:
    """Path of each weight with a LoRA, and the paths of its factors A and B, of checked shapes."""
    for path, weight in tree.arrays.items():
        stem = path.removesuffix("w") if path.endswith("/w") else f"{path}_"
        factors = (f"{stem}lora_a", f"{stem}lora_b")
        if all(factor in tree.arrays for factor in factors):
            a, b = (tree.arrays[factor] for factor in factors)
            rank = a.shape[-1] if a.shape else 0
            if rank not in _LORA_RANKS:
                raise CheckpointError(
                    f"{tree.directory}: {factors[0]} has rank {rank}; only ranks 16 and 32, whose "
                    "alpha openpi fixes, can be merged: alpha is not stored"
                )
            _require_shape(tree, factors[0], a, (*weight.shape[:-1], rank))
            _require_shape(tree, factors[1], b, (*weight.shape[:-2], rank, *weight.shape[-1:]))
            yield path, factors


def _require_shape(
    tree: OrbaxTree, path: str, array: StoredArray, expected: tuple[int, ...]
) -> None:
    if array.shape != expected:
        raise CheckpointError(
            f"{tree.directory}: {path} has shape {array.shape}, expected {expected}"
        )


def _tensors_of(
    tree: OrbaxTree, rule: _Rule, stacked: bool, lora: tuple[str, str] | None
) -> Iterator[tuple[int | None, StoredTensor]]:
    """(layer, tensor) of each canonical tensor in one array."""
    array = tree.arrays[rule.path]
    shape = array.shape[1:] if stacked else array.shape
    if rule.part is not None:
        if shape[:1] != (2,):
            raise CheckpointError(
                f"{tree.directory}: {rule.path} has shape {array.shape}, expected 2 on axis 1"
            )
        shape = shape[1:]
    if len(shape) != rule.ndim:
        raise CheckpointError(
            f"{tree.directory}: {rule.path} has shape {array.shape}, "
            f"expected {rule.ndim + len(array.shape) - len(shape)} axes"
        )
    canonical = tuple(rule.layout(torch.empty(shape, device="meta")).shape)
    for layer in range(array.shape[0]) if stacked else (None,):
        stored_as = rule.path if layer is None else f"{rule.path}[{layer}]"
        index = tuple(at for at in (layer, rule.part) if at is not None)
        read = _Reader(tree, rule, index, lora)
        yield layer, StoredTensor(stored_as, canonical, array.dtype, read)


@dataclass(frozen=True)
class _Reader:
    """Reads one canonical tensor; `index` is its layer and part, in the weight and its LoRA."""

    tree: OrbaxTree
    rule: _Rule
    index: tuple[int, ...]
    lora: tuple[str, str] | None

    def __call__(self) -> Tensor:
        weight = self._read(self.rule.path)
        if self.lora is not None:
            a, b = (self._read(path).float() for path in self.lora)
            weight = (weight.float() + a @ b).to(weight.dtype)
        return self.rule.layout(weight).contiguous()

    def _read(self, path: str) -> Tensor:
        return self.tree.read(path, self.index, group=self.rule.path)
