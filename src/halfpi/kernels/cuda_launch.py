"""Kernels of `cuda/` on a device: loading, and launching on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.kernels.cuda_source import cubin


@dataclass(frozen=True)
class CudaKernel:
    """`handle` on `device`, for blocks of `threads` threads with `shared_bytes` of shared memory.

    cooperative: its blocks wait for each other. dependent: it may start while the kernel before it
    still runs, for which it waits itself.
    """

    handle: object
    device: torch.device
    threads: int
    shared_bytes: int
    cooperative: bool = False
    dependent: bool = False

    def __call__(self, grid: tuple[int, ...], *arguments: object) -> None:
        """Launch. A tensor is passed as its address, None as null, an int as 64 bits."""
        from cuda import core

        config = core.LaunchConfig(
            grid=grid,
            block=self.threads,
            shmem_size=self.shared_bytes,
            is_cooperative=self.cooperative,
            programmatic_stream_serialization=self.dependent,
        )
        values = (one.data_ptr() if isinstance(one, Tensor) else one or 0 for one in arguments)
        stream = core.Stream.from_handle(torch.cuda.current_stream(self.device).cuda_stream)
        core.launch(stream, config, self.handle, *values)


def tensor_map(rows: Tensor, box: tuple[int, ...]) -> object:
    """Describes `rows` (…, n) of 8 or 16 bits, of which a copy brings `box`, so many of each.

    Columns are a line of 32 or 128 bytes, whose chunks of 16 bytes change places (`Swizzled` in
    cuda/wgmma.cuh).
    """
    from cuda.core._tensor_map import TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    swizzles = {32: TensorMapSwizzle.SWIZZLE_32B, 128: TensorMapSwizzle.SWIZZLE_128B}
    # NumPy, through which tensors are described, has neither bfloat16 nor E4M3; bits are copied.
    bits = rows.view(torch.uint8 if rows.itemsize == 1 else torch.float16)
    view = StridedMemoryView.from_any_interface(bits, stream_ptr=-1)
    return view.as_tensor_map(box, swizzle=swizzles[box[-1] * rows.itemsize])


def load(
    name: str,
    defines: Mapping[str, float],
    device: torch.device,
    threads: int,
    *,
    cooperative: bool = False,
    dependent: bool = False,
) -> CudaKernel:
    """The kernel `name` of `name`.cu, allowed to have defines["SHARED_BYTES"] of shared memory.

    Raises ImportError naming the extra without cuda-core.
    """
    code, shared_bytes = cubin(name, defines), int(defines["SHARED_BYTES"])
    from cuda import core
    from cuda.bindings import driver

    index = device.index or 0
    core.Device(index).set_current()
    kernel = core.ObjectCode.from_cubin(code).get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(
        attribute, shared_bytes, kernel.handle, driver.CUdevice(index)
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuKernelSetAttribute failed: {status}")
    return CudaKernel(kernel, device, threads, shared_bytes, cooperative, dependent)


@functools.cache
def load_once(name: str, device: torch.device, threads: int, **defines: float) -> CudaKernel:
    """As `load`, of a kernel that is dependent; the same one for all who ask for the same."""
    return load(name, defines, device, threads, dependent=True)
