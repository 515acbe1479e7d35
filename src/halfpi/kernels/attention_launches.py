"""Launches of attention worth measuring, by shape; the first is the default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from halfpi.kernels import mqa, siglip_attention
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import Case, Device, Launch


@dataclass(frozen=True)
class AttentionLaunch(Launch):
    """Knobs of attention: rows of packed queries, keys a step, programs that share the keys.

    tma: keys and values are read through tensor descriptors (sm_90 and newer), without splits. The
    last step then reads past the valid keys. CUDA kernels, for certain sizes, are "siglip"
    (siglip_attention.py) and those of mqa.py, which have no knobs.
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("triton", "siglip", *mqa.KERNELS)

    block_m: int = 64
    block_n: int = 64
    splits: int = 1
    tma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tma and self.splits > 1:
            raise ValueError(f"tma does not go with splits, got {self}")


def attention_launches(case: Case, device: Device) -> tuple[AttentionLaunch, ...]:
    """Whole keys a program with many query rows, split keys with few."""
    rows = case["t"] * case["q"] // case["kv"]
    tiles = case["b"] * case["kv"] * math.ceil(rows / 64)
    splits = (1, 2) if tiles >= 64 else (16, 8, 12, 4)
    shapes = (
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 8, 2),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 128, 4, 2),
        (128, 128, 8, 1),
        (64, 64, 4, 3),
        (128, 64, 8, 3),
    )
    pdl = device.is_hopper_or_newer
    # Descriptors want rows of whole 16 bytes.
    tma = (False, True) if pdl and case["k"] * case.dtype.itemsize % 16 == 0 else (False,)
    launches = tuple(
        AttentionLaunch(warps, stages, pdl, "triton", block_m, block_n, split, with_tma)
        for with_tma in tma
        for split in splits
        for block_m, block_n, warps, stages in shapes
        if _shared_bytes(case, block_m, block_n, stages) <= device.shared_bytes
        if split == 1 or not with_tma
    )
    cuda = _cuda_kernel(case, device)
    return launches if cuda is None else (AttentionLaunch(pdl=True, kernel=cuda), *launches)


def _cuda_kernel(case: Case, device: Device) -> str | None:
    if case.dtype != torch.bfloat16 or device.capability != 90 or not is_available():
        return None
    return "siglip" if siglip_attention.supports(case) else mqa.kernel_for(case)


def head_block(head_dim: int) -> int:
    """What a head is padded to: the next power of two that a product can have."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _shared_bytes(case: Case, block_m: int, block_n: int, stages: int) -> int:
    rows = block_m + 2 * stages * block_n
    return rows * head_block(case["k"]) * case.dtype.itemsize
