"""The matrix product that every linear operation shares, as helpers for Triton kernels.

A linear operation is one tile of x · weightᵀ in fp32 and an epilogue of its own. With few rows the
weights are all the work, so K is split too: `split_linear` leaves partial products, and the same
kernel of the operation sums those in a fixed order where it would have multiplied. Results are
deterministic either way.

Rows of x are tokens. Tiles that share weights run next to each other, so weights come from memory
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import FP8_MAX, Launch

LINE_BYTES = tl.constexpr(128)
_FP8_MAX = tl.constexpr(FP8_MAX)
# Triton's interpreter has neither assembly nor conversions that saturate.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def part_widths(block_n):
    """The powers of two whose sum is `block_n`, the largest first."""
    return [1 << bit for bit in reversed(range(block_n.bit_length())) if block_n >> bit & 1]


@triton.constexpr_function
def part_count(block_n):
    """How many parts a tile of `block_n` columns has."""
    return len(part_widths(block_n))


@triton.constexpr_function
def _part_width(block_n, part):
    return part_widths(block_n)[part]


@triton.constexpr_function
def _part_first(block_n, part):
    return sum(part_widths(block_n)[:part])


@dataclass(frozen=True)
class TileLaunch(Launch):
    """Knobs of a linear operation.

    block_m × block_n is the tile of the output, block_k the step along K. block_n is the sum of one
    or two powers of two, which Triton's blocks are, so that one wave of tiles can fill a GPU.
    split_k: how many programs share one tile; more than one needs a workspace. programs: how many
    share all tiles, one after another, so that loads of the next tile overlap what ends this one; 0
    is one each. ahead: how many steps of weights are fetched into L2 before waiting for the kernel
    before (with pdl). tma: read through tensor descriptors (sm_90 and newer). promote: after how
    many steps an E4M3 product joins an fp32 sum, because Hopper itself accumulates it in about 14
    bits (DeepSeek-V3 2024, 3.3.2); 0 is never. peers: how many blocks of kernel "hopper"
    (hopper_linear.py), which have rows below each other, share the weights that they read. By
    kernel "library" cuBLAS multiplies (bfloat16 or E4M3) all rows into a workspace, as if K were
    split.
    """

    KERNELS: ClassVar[tuple[str, ...]] = ("triton", "library", "hopper")

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    split_k: int = 1
    ahead: int = 0
    tma: bool = False
    programs: int = 0
    promote: int = 0
    peers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead and (self.tma or not self.pdl):
            raise ValueError(f"ahead needs pdl and does not go with tma, got {self}")
        if self.kernel == "hopper" and (self.block_m % 64 or self.block_n % 16):
            raise ValueError(f"tiles must be of whole 64 rows and 16 columns, got {self}")
        if self.kernel == "triton" and len(self.widths) > 2:
            raise ValueError(f"block_n must be one or the sum of two powers of two, got {self}")
        if self.kernel == "library" and self.split_k > 1:
            raise ValueError(f"a library does not split K, got {self}")

    @property
    def needs_partials(self) -> bool:
        """Whether an operation needs a workspace (split_k, m, n) for partial products."""
        return self.kernel != "hopper" and (self.split_k > 1 or self.kernel == "library")

    @property
    def is_general(self) -> bool:
        """Whether it is good for other numbers of rows than those for which it was offered."""
        return self.kernel != "hopper" or is_available()

    @property
    def widths(self) -> list[int]:
        """Of the parts of a tile, the second of which is its tail: 160 is 128 and 32."""
        return list(part_widths(self.block_n))

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipeline of operand tiles."""
        steps = self.num_stages * max(self.promote, 1)
        return steps * (self.block_m + self.block_n) * self.block_k * itemsize


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the one before: nothing it wrote is read earlier."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_rows(rows, first, last, WIDTH: tl.constexpr):
    """Bring WIDTH elements of each of `rows`, from `first` to below `last`, to L2; only a hint."""
    LINE: tl.constexpr = LINE_BYTES * 8 // rows.dtype.element_ty.primitive_bitwidth
    lines = first + tl.arange(0, triton.next_power_of_2(triton.cdiv(WIDTH, LINE))) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + tl.minimum(lines, last - 1)[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def begin_product(
    weight, col, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`begin`, but first fetch the weights of this tile for AHEAD steps from `k` on."""
    if AHEAD > 0:
        for part in tl.static_range(part_count(BLOCK_N)):
            cols = tl.minimum(part_cols(col, BLOCK_N, part), N - 1).to(tl.int64)
            for step in tl.static_range(AHEAD):
                fetch_rows(weight + cols * K, k + step * BLOCK_K, K, BLOCK_K)
    begin(PDL)


@triton.jit
def scalar(pointer, default):
    """What `pointer` points to, or `default` without one. Load early: it is rarely in a cache."""
    return default if pointer is None else tl.load(pointer)


@triton.jit
def valid_count(count, index, capacity):
    """How many of `capacity` rows are valid: `count[index]`, or all without it."""
    return capacity if count is None else tl.minimum(tl.load(count + index), capacity)


@triton.jit
def tile_origin(tile, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of an output tile: tiles that share weights follow each other."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    return (tile % tiles_m) * BLOCK_M, (tile // tiles_m) * BLOCK_N


@triton.jit
def tile_count(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Output tiles of M rows and N columns."""
    return tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)


@triton.jit
def part_cols(col, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """Columns of part PART of the tile that begins at `col`."""
    return col + _part_first(BLOCK_N, PART) + tl.arange(0, _part_width(BLOCK_N, PART))


@triton.jit
def pair_cols(col, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """As `part_cols`, for an output with one column for two of the tile."""
    first = (col + _part_first(BLOCK_N, PART)) // 2
    return first + tl.arange(0, _part_width(BLOCK_N, PART) // 2)


@triton.jit
def _row_places(rows, count, K):
    """Where `rows` of an operand (count, K) begin; those past the end are the last one."""
    return tl.minimum(rows, count - 1).to(tl.int64)[:, None] * K


@triton.jit
def _operand_tile(
    operand, rows, row, k, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr
):
    """(rows, BLOCK_K) of `operand` (·, K) from column k on: at `row`, or at the places `rows`."""
    if TMA:
        tile = operand.load([row, k])
    else:
        ks = k + tl.arange(0, BLOCK_K)[None, :]
        if EVEN_K:
            tile = tl.load(operand + rows + ks)
        else:
            tile = tl.load(operand + rows + ks, mask=ks < K, other=0.0)
    return tile


@triton.jit
def _weight_tile(
    weight, places, col, k, K, PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, width of PART) of `weight`, which for TMA has a descriptor for each part."""
    operand = weight[PART if TMA else 0]
    first = col + _part_first(BLOCK_N, PART)
    return _operand_tile(operand, places[PART], first, k, K, BLOCK_K, EVEN_K, TMA).T


@triton.jit
def product_tile(
    x, weight, row, col, k_first, k_last, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """fp32 tile of x (M, K) · weight (N, K)ᵀ over k_first ≤ k < k_last, from (row, col) on.

    weight: a tuple, see `_weight_tile`. The tile is one too, of its parts. fp32 operands are not
    rounded to TF32. Rows and columns past the end repeat the last one (or are zero with TMA): they
    are not stored.
    """
    PARTS: tl.constexpr = part_count(BLOCK_N)
    accs, places = (), ()
    for part in tl.static_range(PARTS):
        accs += (tl.zeros((BLOCK_M, _part_width(BLOCK_N, part)), tl.float32),)
        places += (_row_places(part_cols(col, BLOCK_N, part), N, K),)
    rows = _row_places(row + tl.arange(0, BLOCK_M), M, K)
    for k in range(k_first, k_last, BLOCK_K * (PROMOTE if PROMOTE > 0 else 1)):
        sums = ()
        if PROMOTE > 0:
            for part in tl.static_range(PARTS):
                acc = tl.zeros((BLOCK_M, _part_width(BLOCK_N, part)), tl.float32)
                for step in tl.static_range(PROMOTE):
                    ks = k + step * BLOCK_K
                    x_tile = _operand_tile(x, rows, row, ks, K, BLOCK_K, EVEN_K, TMA)
                    weight_tile = _weight_tile(
                        weight, places, col, ks, K, part, BLOCK_N, BLOCK_K, EVEN_K, TMA
                    )
                    acc = tl.dot(x_tile, weight_tile, acc)
                sums += (accs[part] + acc,)
        else:
            x_tile = _operand_tile(x, rows, row, k, K, BLOCK_K, EVEN_K, TMA)
            for part in tl.static_range(PARTS):
                weight_tile = _weight_tile(
                    weight, places, col, k, K, part, BLOCK_N, BLOCK_K, EVEN_K, TMA
                )
                sums += (tl.dot(x_tile, weight_tile, accs[part], input_precision="ieee"),)
        accs = sums
    return accs


@triton.jit
def partial_tile(
    partials, row, col, M, N, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """fp32 tile of the sum of `partials` (SPLIT_K, M, N), always added in the same order."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), N - 1)
    tile = partials + rows[:, None] * N + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(tile).to(tl.float32)
        tile += M * N
    return acc


@triton.jit
def partial_row(partials, places, inside, size, SPLITS: tl.constexpr):
    """fp32 sum of `partials` (SPLITS, `size` elements) at the places of a row, in a fixed order."""
    total = tl.load(partials + places, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials + split * size + places, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def linear_tile(
    x, weight, alpha, row, col, M, N, K, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """fp32 tile of alpha · x · weightᵀ; without a weight, x holds SPLIT_K partial products.

    A tuple of its parts, see `part_cols`.
    """
    if weight[0] is None:
        parts = (partial_tile(x, row, col, M, N, SPLIT_K, BLOCK_M, BLOCK_N),)
    else:
        parts = product_tile(
            x, weight, row, col, 0, K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, PROMOTE
        )  # fmt: skip
    scaled = ()
    for part in tl.static_range(part_count(BLOCK_N)):
        scaled += (parts[part] * alpha,)
    return scaled


@triton.jit
def split_pairs(tile):
    """The even and the odd columns of a tile, both of which one thread holds."""
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def _tanh(x):
    """tanh to 11 bits in one instruction, more than a bfloat16 holds (PTX ISA, tanh.approx)."""
    if _INTERPRETED:
        out = 2 * tl.sigmoid(2 * x) - 1
    else:
        out = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def gelu_tanh(x):
    """The tanh form of GELU: ½x(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    half = 0.5 * x
    return half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))


@triton.jit
def store(pointers, value, scale, mask):
    """Store fp32 `value`; E4M3 is quantised by the static `scale` first."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        value *= 1.0 / scale
        if _INTERPRETED:  # a GPU's conversion ends at the largest number by itself
            value = tl.minimum(tl.maximum(value, -_FP8_MAX), _FP8_MAX)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)
