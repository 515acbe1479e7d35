"""Whether a checkpoint holds exactly the tensors that the model needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from halfpi.checkpoints.contents import StoredTensor
from halfpi.checkpoints.errors import CheckpointError, listing
from halfpi.config import Pi05Config
from halfpi.model import Pi05

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Never used at inference: LM heads, the prefix's final norm, what π0.5 kept of a π0 it was trained
# from, and all of the prefix's last layer but its keys and values.
_UNUSED = re.compile(
    r"(prefix|expert)\.lm_head\.weight|prefix\.norm\.weight|state_proj\.(weight|bias)"
    r"|expert\.(layers\.\d+\.(attn|mlp)_norm|norm)\.weight"
)
_UNUSED_OF_LAST_LAYER = ("attn.q", "attn.o", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")


def meta_model(config: Pi05Config) -> Pi05:
    """A `Pi05` that has shapes and names but no memory."""
    with torch.device("meta"):
        return Pi05(config)


def reject_pi0(tensors: Mapping[str, StoredTensor], source: object) -> None:
    """Raise CheckpointError for π0, whose expert has plain norms and fuses the time elsewhere."""
    time_mlp = tensors.get("time_mlp_in.weight")
    is_pi05 = any(".dense." in name for name in tensors) or (
        time_mlp is not None and "action_time_mlp" not in time_mlp.stored_as
    )
    if "action_in.weight" in tensors and not is_pi05:
        raise CheckpointError(
            f"{source} holds π0, not π0.5: it has no time_mlp_in and the expert's norms "
            "are not adaptive; halfpi runs π0.5 only"
        )


def select_tensors(
    tensors: Mapping[str, StoredTensor], unknown: Sequence[str], config: Pi05Config, source: object
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Those of `tensors` that a `Pi05(config)` needs, in their order, and the names of unused ones.

    unknown: names of further tensors, which are unexpected. source: what errors say they are from.
    Raises CheckpointError that names every missing, unexpected and misshapen tensor and every one
    that is not fp32, fp16 or bf16; of many, the first few.
    """
    expected = {
        name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()
    }
    last = f"prefix.layers.{config.depth - 1}"
    unused_of_last = {f"{last}.{module}.weight" for module in _UNUSED_OF_LAST_LAYER}
    needed: dict[str, StoredTensor] = {}
    unused, unexpected = [], list(unknown)
    for name, tensor in tensors.items():
        if name in expected:
            needed[name] = tensor
        elif name in unused_of_last or _UNUSED.fullmatch(name):
            unused.append(tensor.stored_as)
        else:
            unexpected.append(tensor.stored_as)
    problems = {
        "missing": [name for name in expected if name not in needed],
        "unexpected": unexpected,
        "misshapen": _misshapen(needed, expected),
        "not fp32, fp16 or bf16": [
            f"{_both_names(name, tensor)} is {tensor.dtype}"
            for name, tensor in needed.items()
            if tensor.dtype not in _FLOATS
        ],
    }
    found = [f"{problem}: {listing(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(found)}")
    return needed, tuple(unused)


def _misshapen(
    tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{_both_names(name, tensor)} has shape {tensor.shape}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]


def _both_names(name: str, tensor: StoredTensor) -> str:
    return name if tensor.stored_as == name else f"{name} (stored as {tensor.stored_as})"
