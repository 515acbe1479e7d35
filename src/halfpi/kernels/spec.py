"""What every kernel file declares besides its kernel: cases, launch knobs, work, and its check.

Tests, benchmarks and the roofline walk the `KernelSpec`s, so a new kernel file is covered by being
there. Only torch is needed to read this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_FP32_SUM = 2.0**-20
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: the knobs that tuning turns.

    pdl: programmatic dependent launch (sm_90 and newer). The kernel may start while the one before
    it still runs; it fetches what does not depend on that one, then waits for it. Weights, tables,
    counts, offsets and scales are read before waiting: no kernel that may still run writes them.
    kernel: which of an operation's kernels; others than Triton's are for what they are offered for.

    Raises ValueError for a kernel that the operation does not have.
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("triton", "hopper")

    num_warps: int = 4
    num_stages: int = 2
    pdl: bool = False
    kernel: str = "triton"

    def __post_init__(self) -> None:
        if self.kernel not in self.KERNELS:
            raise ValueError(f"kernel must be one of {self.KERNELS}, got {self.kernel!r}")

    @property
    def is_general(self) -> bool:
        """Whether it is good for sizes near those for which it was offered."""
        return self.kernel == "triton"

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a Triton launch that do not depend on the kernel."""
        options: dict[str, Any] = {
            "PDL": self.pdl,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return {**options, "launch_pdl": True} if self.pdl else options


# Blocks of a cluster → how many clusters are taken to run at a time on 132 multiprocessors. None
# spans two GPCs, so some multiprocessors are left over.
CLUSTERS = {8: 15, 3: 40}


@dataclass(frozen=True)
class Device:
    """What launches depend on.

    capability: 90 for sm_90. shared_bytes: the most shared memory a block can have.
    multiprocessors: how many blocks of that size run at a time.
    """

    capability: int
    shared_bytes: int
    multiprocessors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The CUDA `device` as it reports itself."""
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        return cls(
            capability,
            properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            properties.multi_processor_count,
        )

    @property
    def is_hopper_or_newer(self) -> bool:
        """Whether it knows programmatic dependent launch and tensor descriptors."""
        return self.capability >= 90


L = TypeVar("L", bound=Launch)


@dataclass(frozen=True)
class Case:
    """One use of a kernel.

    sizes: by the words of the kernel's own docstring. dtype: of what meets in matrix products, or
    of what is read where there are none. out_dtype: of what is written; with FP8 it is quantised.
    real: a shape that π0.5 runs, not one that only tests raggedness.
    """

    name: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    real: bool = True

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def __str__(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype))
        return f"{self.name}-{'-'.join(names)}"

    @property
    def workspace_dtype(self) -> torch.dtype:
        """Of partial results: 16 bit, like the outputs that they become, halve their traffic."""
        return torch.bfloat16 if self.out_dtype == FP8 else self.out_dtype


@dataclass(frozen=True)
class Output:
    """A tensor that a kernel writes, and its scale if it is quantised.

    valid: bool mask of its leading dimensions, where it is written; None is everywhere.
    """

    tensor: Tensor
    scale: Tensor | None = None
    valid: Tensor | None = None

    def written(self, values: Tensor) -> Tensor:
        """The part of `values`, in the shape of the output, that the kernel writes."""
        return values if self.valid is None else values[self.valid]


@dataclass(frozen=True)
class Problem:
    """A case with tensors: everything to run a kernel once, to check it and to price it.

    inputs: the arguments of `reference`, which returns one tensor an output. flops, bytes: the
    least work that the operation needs, every operand moved once.
    """

    run: Callable[[], None]
    reference: Callable[..., tuple[Tensor, ...]]
    inputs: Mapping[str, Any]
    outputs: tuple[Output, ...]
    flops: int
    bytes: int

    def truth(self) -> tuple[Tensor, ...]:
        """The outputs in FP32 maths on the dequantised inputs."""
        return self.reference(**{name: _widened(value) for name, value in self.inputs.items()})

    def plain(self) -> tuple[Tensor, ...]:
        """The outputs of plain torch in the precision of the inputs and outputs.

        Plain torch has no FP8 product on every device; an E4M3 number is exact in bfloat16.
        """
        values = self.reference(
            **{
                name: value.bfloat16()
                if isinstance(value, Tensor) and value.dtype == FP8
                else value
                for name, value in self.inputs.items()
            }
        )
        return tuple(
            dequantised(quantised(value, output.tensor.dtype, output.scale), output.scale)
            for value, output in zip(values, self.outputs, strict=True)
        )


@dataclass(frozen=True)
class KernelSpec(Generic[L]):
    """An operation: its cases, and how to build, launch, check and price each.

    candidates: launches worth measuring for a case on a device, the default first.
    """

    name: str
    cases: tuple[Case, ...]
    problem: Callable[[Case, L, torch.device], Problem]
    candidates: Callable[[Case, Device], tuple[L, ...]]


def row_launches(width: int, device: Device) -> tuple[Launch, ...]:
    """Launches of a kernel in which one program has a whole row of `width` elements."""
    by_width = (4, 8, 2, 1) if width > 512 else (1, 2)
    return tuple(Launch(warps, pdl=device.is_hopper_or_newer) for warps in by_width)


def quantised(value: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """`value` as `dtype`; with a static `scale` (1,) the stored number times it is the value."""
    if scale is None:
        return value.to(dtype)
    return (value.float() * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(dtype)


def dequantised(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The fp32 values of what `quantised` stored."""
    return stored.float() if scale is None else stored.float() * scale


def _widened(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def error_ratio(problem: Problem) -> float:
    """Error of what was run over that of plain torch in the same precision, both against `truth`.

    The larger of the ratios of the root mean square and of the largest error, over all outputs.
    Plain fp32 is the truth itself; there, errors of an fp32 sum in another order count as 1.
    """
    ratios = []
    for output, plain, truth in zip(problem.outputs, problem.plain(), problem.truth(), strict=True):
        stored = dequantised(output.tensor, output.scale)
        ours, theirs = output.written(stored - truth).abs(), output.written(plain - truth).abs()
        theirs = theirs.clamp(min=_FP32_SUM * output.written(truth).abs().max())
        ratios.append(ours.square().mean().sqrt() / theirs.square().mean().sqrt())
        ratios.append(ours.max() / theirs.max())
    return float(torch.stack(ratios).max())  # NaN if any is


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor` is absent or has `shape` and one of `dtypes`, contiguous."""
    if tensor is None:
        return
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous():
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    came = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    raise ValueError(f"{name} must be contiguous {kinds} {shape}, got {came}{strides}")


def check_output(out: Tensor, shape: tuple[int, ...], scale: Tensor | None) -> None:
    """Raise ValueError unless `out` can be written: E4M3 exactly if a `scale` comes with it."""
    check("out", out, shape, *(FLOATS if scale is None else (FP8,)))
    check("scale", scale, (1,), torch.float32)


def row_stride(name: str, tensor: Tensor, m: int, d: int) -> int:
    """Stride between the rows of fp32 `tensor` (m or 1, d), 0 if one row serves all.

    Raises ValueError unless it is so, with contiguous rows.
    """
    rows = tensor.shape[0]
    if tensor.shape != (rows, d) or rows not in (1, m) or tensor.dtype != torch.float32:
        came = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be float32 {(m, d)} or {(1, d)}, got {came}")
    if tensor.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    return tensor.stride(0) if rows > 1 else 0


def random_operands(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random x (m, k), weight (n, k) and alpha such that alpha · x · weightᵀ is of order one.

    alpha is what static scales make it: fp32 (1,) with FP8 operands, otherwise None.
    """
    if dtype == FP8:
        # 14 standard deviations below the largest number: what a calibrated tensor looks like.
        x, weight = (32 * torch.randn(rows, k, device=device) for rows in (m, n))
        alpha = torch.full((1,), 32**-2 * k**-0.5, device=device)
        return quantised(x, dtype, None), quantised(weight, dtype, None), alpha
    x, weight = (torch.randn(rows, k, device=device) for rows in (m, n))
    return x.to(dtype), (weight * k**-0.5).to(dtype), None


def poisoned_output(
    shape: tuple[int, ...], case: Case, device: torch.device, valid: Tensor | None = None
) -> Output:
    """An output of `case` full of NaN, or of the largest uint8, with a scale if it is quantised.

    The scale is for values of order one.
    """
    poison = torch.nan if case.out_dtype.is_floating_point else 255
    tensor = torch.full(shape, poison, device=device).to(case.out_dtype)
    scale = torch.full((1,), 1 / 64, device=device) if case.out_dtype == FP8 else None
    return Output(tensor, scale, valid)


def moved_bytes(inputs: Mapping[str, Any], *outputs: Tensor) -> int:
    """Bytes of all tensors of `inputs` and `outputs`, each once."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*tensors, *outputs))
