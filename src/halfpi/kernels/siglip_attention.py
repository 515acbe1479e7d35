"""Attention of SigLIP as one CUDA kernel for Hopper, for its own sizes only.

A row of logits has 256 numbers, which fit into the registers of a warpgroup's threads: one product
with all keys, one softmax without rescaling, one product with all values. Triton spills there, and
goes in steps. The CUDA source lies in `cuda/` and is compiled at run time (extra `hopper`).
"""

from __future__ import annotations

from torch import Tensor

from halfpi.kernels.cuda_launch import load_once, tensor_map
from halfpi.kernels.spec import FP8, Case, Device

TOKENS, HEAD_DIM = 256, 72
# Queries of a block → its shared memory. With fewer it is done sooner, if all blocks run at once.
SHARED_BYTES = {64: 101_888, 128: 121_344}
_ALIGNED = 8  # numbers in 16 bytes


def supports(case: Case) -> bool:
    """Whether the kernel is for the sizes of a `case` of attention, which has no counts."""
    sizes = (case["t"], case["s"], case["k"], case["kv"])
    return sizes == (TOKENS, TOKENS, HEAD_DIM, case["q"])


def siglip_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `attention`, of (b, 256, q, 72) and as many heads of keys, with whole images.

    Keys must be finite: a head's are multiplied with the next one's, too, by zero. The caller has
    checked what `attention` checks. Raises ValueError naming the tensor with other sizes, or that
    is not rows of all heads, of whole 16 bytes, with an image behind another.
    """
    b, _, q, _ = query.shape
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        stride_b, stride_t, stride_q, _ = tensor.stride()
        lies = stride_q == HEAD_DIM and (b == 1 or stride_b == TOKENS * stride_t)
        lies &= stride_t % _ALIGNED == 0 and tensor.storage_offset() % _ALIGNED == 0
        if tensor.shape != (b, TOKENS, q, HEAD_DIM) or not lies:
            raise ValueError(
                f"{name} must be {(b, TOKENS, q, HEAD_DIM)} with images and heads side by side, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    at_once = b * q * TOKENS // 64 <= Device.of(query.device).multiprocessors
    rows = 64 if at_once else 128
    kernel = load_once(
        "siglip_attention", query.device, 2 * rows, FP8=int(out.dtype == FP8), **defines(rows)
    )
    stride = query.stride(1) * query.itemsize
    maps = _tensor_maps(keys) + _tensor_maps(values)
    kernel((TOKENS // rows, q, b), query, stride, *maps, bias, out, scale)


def defines(rows: int) -> dict[str, int]:
    """The macros of `cuda/siglip_attention.cu`, for `rows` queries a block, but FP8."""
    return {"ROWS": rows, "SHARED_BYTES": SHARED_BYTES[rows]}


def _tensor_maps(heads: Tensor) -> list[object]:
    """Of `heads` (b, s, q, k): tiles of a sequence, of 64 and of 16 columns."""
    b, s, q, k = heads.shape
    rows = heads.as_strided((b * s, q * k), (heads.stride(1), 1))
    return [tensor_map(rows, (TOKENS, columns)) for columns in (64, 16)]
