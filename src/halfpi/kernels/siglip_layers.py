"""All layers of SigLIP as one CUDA kernel for Hopper, in E4M3, for a few images.

With so few rows a product takes as long as the launch of the next and the way of rows through the
memory. Here a block has a head and a sixteenth of every other product's columns, for 64 or 128
rows, from the first layer to the last: it streams weights ahead of what it depends on, the residual
never leaves its registers, and blocks hand rows to each other without a launch. The CUDA source,
`cuda/siglip_layers.cu`, is compiled at run time (extra `hopper`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.cuda_launch import load, tensor_map
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.hopper_linear import GROUP_ROWS, LINE_BYTES
from halfpi.kernels.rms_norm import NORM_EPS
from halfpi.kernels.spec import FP8, Device, check

TOKENS, HEADS, HEAD_DIM, HIDDEN = 256, 16, 72, 4352
WIDTH = HEADS * HEAD_DIM
SITES = ("qkv", "fc1", "fc2")  # products in E4M3
_SHAPES = {
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "fc1": (HIDDEN, WIDTH),
    "fc2": (WIDTH, HIDDEN),
}
_VECTORS = (
    "query_bias",
    "attn_gain",
    "attn_shift",
    "out_bias",
    "mlp_gain",
    "mlp_shift",
    "fc2_bias",
)
# Of each group of a block: one or two multiply, and one brings operands.
_GROUP_THREADS = 128
# Hidden columns of a block in the first of two parts; those of all blocks come before the second.
_FIRST = 2 * HEAD_DIM
# A flag's number tells launches and layers apart, and marks of statistics have five bits.
_FEWEST_LAYERS, _MOST_LAYERS = 4, 31
_FLAG_LINE = 32  # words
_SHARED_BYTES = 232_448


@dataclass(frozen=True)
class SiglipWeights:
    """What all layers have, one behind another: (depth, …).

    qkv: E4M3 (3d, d), fc1: E4M3 (h, d), fc2: E4M3 (d, h), out: bfloat16 (d, d). All else is fp32:
    gains, shifts and biases (d,), but fc1_bias (h,). input_scales quantise the inputs of qkv, fc1
    and fc2, and alphas are their products with the scales of the weights, both (3,). Keys and
    values have no bias: a key's cancels in the softmax, and a value's can be part of out_bias.
    """

    qkv: Tensor
    out: Tensor
    fc1: Tensor
    fc2: Tensor
    query_bias: Tensor
    attn_gain: Tensor
    attn_shift: Tensor
    out_bias: Tensor
    mlp_gain: Tensor
    mlp_shift: Tensor
    fc1_bias: Tensor
    fc2_bias: Tensor
    alphas: Tensor
    input_scales: Tensor

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self.qkv.shape[0]

    def check(self) -> None:
        """Raise ValueError naming the tensor that the kernel cannot read."""
        depth = self.depth
        if not _FEWEST_LAYERS <= depth <= _MOST_LAYERS:
            raise ValueError(f"layers must be from {_FEWEST_LAYERS} to {_MOST_LAYERS}, got {depth}")
        for name, shape in _SHAPES.items():
            dtype = torch.bfloat16 if name == "out" else FP8
            check(name, getattr(self, name), (depth, *shape), dtype)
        lengths = dict.fromkeys(_VECTORS, WIDTH) | {"fc1_bias": HIDDEN}
        lengths |= dict.fromkeys(("alphas", "input_scales"), len(SITES))
        for name, length in lengths.items():
            check(name, getattr(self, name), (depth, length), torch.float32)


Quantise = Callable[[Tensor, int, str], Tensor]


def siglip_layers_reference(
    residual: Tensor, weights: SiglipWeights, quantise: Quantise = lambda x, *_: x
) -> Tensor:
    """What the layers leave of `residual` (n · 256, d), in its dtype, by big_vision's vit.py.

    Weights are numbers here, whatever their dtype: those of E4M3 have been multiplied with their
    scales. quantise: what is done to the input of a product of SITES, given layer and site.
    """
    for index in range(weights.depth):
        layer = {
            field.name: getattr(weights, field.name)[index] for field in dataclasses.fields(weights)
        }

        def linear(
            x: Tensor, site: str, layer: dict[str, Tensor] = layer, index: int = index
        ) -> Tensor:
            x = quantise(x, index, site) if site in SITES else x
            return F.linear(x, layer[site].to(x.dtype))

        normed = _normed(residual, layer["attn_gain"], layer["attn_shift"])
        query, key, value = linear(normed, "qkv").view(-1, TOKENS, 3, HEADS, HEAD_DIM).unbind(2)
        query = query + layer["query_bias"].view(HEADS, HEAD_DIM).to(query.dtype)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        mixed = mixed.transpose(1, 2).reshape(residual.shape)
        residual = residual + linear(mixed, "out") + layer["out_bias"].to(residual.dtype)
        normed = _normed(residual, layer["mlp_gain"], layer["mlp_shift"])
        wide = linear(normed, "fc1") + layer["fc1_bias"].to(residual.dtype)
        narrow = linear(F.gelu(wide, approximate="tanh"), "fc2")
        residual = residual + narrow + layer["fc2_bias"].to(residual.dtype)
    return residual


def _normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), (WIDTH,), gain.to(wide), shift.to(wide), NORM_EPS)
    return normed.to(x.dtype)


def block_constants(weights: SiglipWeights) -> Tensor:
    """What each block reads of a layer beside matrices: fp32 (depth, HEADS, n).

    In the order of cuda/siglip_block.cuh. Gains and shifts quantise what they give.
    """
    depth, factors = weights.depth, weights.input_scales.reciprocal()
    quantised = {
        "attn_gain": factors[:, :1], "attn_shift": factors[:, :1],
        "mlp_gain": factors[:, 1:2], "mlp_shift": factors[:, 1:2],
    }  # fmt: skip
    vectors = [getattr(weights, name) * quantised.get(name, 1.0) for name in _VECTORS]
    vectors += weights.fc1_bias.split([HEADS * _FIRST, HIDDEN - HEADS * _FIRST], 1)
    columns = [vector.view(depth, HEADS, -1) for vector in vectors]
    numbers = torch.cat([weights.alphas, factors[:, 2:]], 1)
    return torch.cat([*columns, numbers[:, None].expand(-1, HEADS, -1)], 2).contiguous()


def groups_of(images: int, device: Device) -> int:
    """Of a block, for so many images: two where else not all blocks would run at a time."""
    return 1 if _blocks(images, 1) <= device.multiprocessors else 2


def supports(images: int, depth: int, device: Device) -> bool:
    """Whether all blocks for so many images run at a time on `device`, which a launch needs."""
    return (
        device.capability == 90
        and is_available()
        and _FEWEST_LAYERS <= depth <= _MOST_LAYERS
        and _blocks(images, groups_of(images, device)) <= device.multiprocessors
    )


def _blocks(images: int, groups: int) -> int:
    return images * TOKENS // (groups * GROUP_ROWS) * HEADS


class SiglipLayers:
    """The compiled kernel with its workspace, for one stream at a time.

    Building compiles (or reads the cubin from the user's cache) and allocates. A call allocates
    nothing, synchronises nothing and can be captured in a CUDA graph. Equal inputs give equal bits.
    images: at most so many at a time.
    """

    def __init__(self, weights: SiglipWeights, images: int, device: torch.device) -> None:
        """Of `weights`, which are not copied.

        Raises ValueError naming what is wrong, ImportError naming the extra `hopper`.
        """
        weights.check()
        self.images = images
        self._weights, self._device = weights, device
        rows = images * TOKENS
        shapes = {
            "normed": (rows, WIDTH, FP8),
            "mixed": (rows, WIDTH, torch.bfloat16),
            "hidden": (rows, HIDDEN, FP8),
            "keys": (2 * images * HEADS * 2 * TOKENS, HEAD_DIM, torch.bfloat16),  # and values
        }
        self._buffers = {
            name: torch.empty(m, n, dtype=dtype, device=device)
            for name, (m, n, dtype) in shapes.items()
        }
        # Blocks tell by these what is new (cuda/siglip_block.cuh).
        self._statistics = torch.zeros(2 * rows * HEADS, dtype=torch.int64, device=device)
        self._constants = block_constants(weights)
        self._limits = Device.of(device)
        self._launches = {
            groups: self._launch(groups)
            for groups in {groups_of(count, self._limits) for count in range(1, images + 1)}
        }

    def _launch(self, groups: int) -> Callable[[Tensor, int], None]:
        """The kernel whose blocks have so many groups, on the residual of so many images."""
        rows, device = groups * GROUP_ROWS, self._device
        # Of four kinds of a block's rows, and of two places of keys and values of each head.
        lines = self.images * (4 * TOKENS // rows + 2 * 2 * HEADS)
        flags = torch.zeros(lines, _FLAG_LINE, dtype=torch.int32, device=device)
        boxes = [
            (getattr(self._weights, name).flatten(0, 1), HEAD_DIM, LINE_BYTES) for name in _SHAPES
        ]
        boxes += [(self._buffers[name], rows, LINE_BYTES) for name in ("normed", "mixed", "hidden")]
        boxes += [(self._buffers["keys"], rows, line) for line in (LINE_BYTES, 32)]
        maps = [tensor_map(tensor, (m, line // tensor.itemsize)) for tensor, m, line in boxes]
        kernel = load(
            "siglip_layers",
            defines(self._weights.depth, groups),
            device,
            (groups + 1) * _GROUP_THREADS,
            cooperative=True,
        )

        def launch(residual: Tensor, images: int) -> None:
            kernel(
                (_blocks(images, groups),), *maps, self._constants, residual,
                *self._buffers.values(), self._statistics, flags, images,
            )  # fmt: skip

        return launch

    def __call__(self, residual: Tensor) -> None:
        """Make of `residual` what the layers leave of it, on torch's current stream.

        residual: bfloat16 (n · 256, d), of n images.

        Raises ValueError naming the residual's shape, layout or dtype if it is wrong.
        """
        images = residual.shape[0] // TOKENS
        check("residual", residual, (images * TOKENS, WIDTH), torch.bfloat16)
        if not 1 <= images <= self.images:
            raise ValueError(f"residual must be of 1 to {self.images} images, got {images}")
        self._launches[groups_of(images, self._limits)](residual, images)


def defines(depth: int, groups: int) -> dict[str, float]:
    """The macros of `cuda/siglip_layers.cu`."""
    return {
        "DEPTH": depth,
        "GROUPS": groups,
        "EPSILON": NORM_EPS,
        "SHARED_BYTES": _SHARED_BYTES,
    }
