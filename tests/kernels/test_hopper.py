"""Linear operations and norms in CUDA: they compile, without a GPU; what they refuse; any sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.conftest import ADA, HOPPER, checked_twice, needs_compiler, needs_hopper

from halfpi.kernels import hopper_norm, tuned
from halfpi.kernels.cuda_source import is_available, ptx, report
from halfpi.kernels.hopper_linear import Variant, hopper_linear, shared_bytes
from halfpi.kernels.hopper_norm import hopper_norm as norm
from halfpi.kernels.launches import hopper_launches
from halfpi.kernels.spec import FP8, FP8_MAX, Case, Device, Launch
from halfpi.kernels.tile import TileLaunch

BF16 = torch.bfloat16


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def variants() -> Iterator[Any]:
    """Launches of the table, for what they are used for."""
    for entry in tuned.entries(90):
        if entry.kernel in ("layer_norm", "rms_norm") or entry.launch["kernel"] != "hopper":
            continue
        launch = TileLaunch(**entry.launch)
        dtype, out_dtype = dtype_of(entry.dtype), dtype_of(entry.out_dtype)
        gelu = entry.kernel == "linear" and entry.sizes["n"] == 4352
        what = Variant(
            dtype, out_dtype,
            bias_bytes=(4 if dtype == FP8 else 2) * gelu, gelu=gelu,
            gated=entry.kernel == "geglu", head=entry.sizes["k"] * (entry.kernel == "qkv_rope"),
        )  # fmt: skip
        sizes = "-".join(f"{name}{size}" for name, size in entry.sizes.items())
        yield pytest.param(launch, what, id=f"{entry.kernel}-{sizes}-{dtype}")


@needs_compiler
@pytest.mark.parametrize(("launch", "what"), list(variants()))
def test_products_compile_without_spills(launch: TileLaunch, what: Variant) -> None:
    defines = what.defines(launch)
    assert defines["SHARED_BYTES"] <= HOPPER.shared_bytes
    said, code = report("linear", defines), ptx("linear", defines)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    assert "serialized" not in said
    operands = "k32.f32.e4m3.e4m3" if what.dtype == FP8 else "k16.f32.bf16.bf16"
    assert f"wgmma.mma_async.sync.aligned.m64n{launch.block_n}{operands}" in code
    assert ("multicast::cluster" in code) == (launch.peers > 1)


@needs_compiler
@pytest.mark.parametrize("splits", [0, 2, 3])
@pytest.mark.parametrize(
    ("d", "rows", "layer"), [(1152, 6, True), (1152, 4, True), (2048, 8, False)]
)
@pytest.mark.parametrize("out_dtype", [BF16, FP8])
def test_norms_compile_without_spills(
    d: int, rows: int, layer: bool, splits: int, out_dtype: torch.dtype
) -> None:
    said = report("row_norm", hopper_norm.defines(d, splits, rows, 1e-6, out_dtype, layer=layer))
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said


@needs_compiler
def test_tiles_are_one_wave_or_take_turns() -> None:
    for one in hopper_launches(768, 4352, 1152, (2, 2), HOPPER, bias=True):
        tiles = -(-768 // one.block_m) * -(-4352 // one.block_n)
        assert tiles <= HOPPER.multiprocessors or one.block_n == 256
        assert not one.programs
        assert shared_bytes(one, 2, bias=True, gated=False) <= HOPPER.shared_bytes
    gated = hopper_launches(968, 32768, 2048, (1, 1), HOPPER, gated=True)
    for one in gated:
        tiles = -(-968 // one.block_m) * -(-32768 // one.block_n)
        waves = -(-tiles // HOPPER.multiprocessors)
        assert one.programs <= HOPPER.multiprocessors
        assert -(-tiles // one.programs) == waves
        assert -(-tiles // (one.programs - one.peers)) > waves  # not one cluster too many
    assert all(one.block_n % 32 == 0 for one in gated)  # whole chunks of E4M3 outputs


@needs_compiler
@pytest.mark.parametrize(
    ("m", "n", "k", "itemsizes", "device"),
    [
        (768, 1152, 1152, (2, 2), ADA),
        (64, 1152, 1152, (2, 2), HOPPER),  # few rows: Triton streams weights
        (768, 1152, 1150, (2, 2), HOPPER),
        (768, 1148, 1152, (2, 2), HOPPER),
        (768, 1152, 16384, (1, 2), HOPPER),  # a long sum of E4M3 is not exact enough
    ],
)
def test_what_it_is_not_offered_for(
    m: int, n: int, k: int, itemsizes: tuple[int, int], device: Device
) -> None:
    assert not hopper_launches(m, n, k, itemsizes, device)


def test_triton_serves_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"m": 768, "n": 3456, "k": 1152}
    if is_available():
        assert tuned.best("linear", sizes, BF16, BF16, HOPPER).kernel == "hopper"
    for module in ("tile", "launches", "hopper_norm"):
        monkeypatch.setattr(f"halfpi.kernels.{module}.is_available", lambda: False)
    assert tuned.best("linear", sizes, BF16, BF16, HOPPER).kernel != "hopper"
    assert tuned.best("layer_norm", {"m": 768, "d": 1152}, BF16, BF16, HOPPER).kernel == "triton"


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape).to(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": zeros(4, 36), "weight": zeros(8, 36)}, "x must be .* whole 16 bytes"),
        ({"weight": zeros(32, 8).T}, "weight must be .* one behind another"),
        ({"out": zeros(4, 8, dtype=torch.float32)}, "out must be bfloat16 or E4M3"),
        ({"out": zeros(4, 8, dtype=FP8)}, r"out must be .* got torch.float8_e4m3fn \(4, 8\)"),
    ],
)
def test_products_refuse(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": zeros(4, 32), "weight": zeros(8, 32), "out": zeros(4, 8)}
    with pytest.raises(ValueError, match=message):
        hopper_linear(**{**given, **change}, launch=TileLaunch(kernel="hopper"))


def test_launches_that_are_refused() -> None:
    x, weight, several = zeros(4, 32), zeros(32, 32), TileLaunch(kernel="hopper", programs=2)
    with pytest.raises(ValueError, match="a block with several tiles has no bias"):
        hopper_linear(x, weight, zeros(4, 32), several, bias=zeros(32, dtype=torch.float32))
    odd = TileLaunch(kernel="hopper", block_n=176)
    with pytest.raises(ValueError, match="tiles must have rows of whole 16 bytes"):
        hopper_linear(x, weight, zeros(4, 16, dtype=FP8), odd, gated=True)


def test_norms_refuse() -> None:
    x = zeros(4, 32)
    with pytest.raises(ValueError, match=r"x must be bfloat16 .* multiple of 8, got 36"):
        norm(zeros(4, 36), torch.ones(36), zeros(4, 36), 1e-6)
    with pytest.raises(ValueError, match=r"partials must be bfloat16 .* of torch.float32"):
        norm(x, torch.ones(32), x, 1e-6, partials=torch.zeros(2, 4, 32))


def linear(m: int, n: int, k: int, valid: int, **others: int) -> dict[str, int]:
    flags = dict.fromkeys(("bias", "gelu", "gate", "residual"), 0)
    return {"m": m, "n": n, "k": k, "valid": valid, **flags, **others}


def hopper(groups: int, width: int, dtype: torch.dtype, **knobs: int) -> TileLaunch:
    plain = TileLaunch(
        block_m=64 * groups, block_n=width, block_k=128 // dtype.itemsize,
        num_stages=3, pdl=True, kernel="hopper",
    )  # fmt: skip
    return dataclasses.replace(plain, **knobs)  # type: ignore[arg-type]  # none is a flag


ROPE = {"q": 3, "kv": 2, "k": 24, "s": 310, "d": 144, "offset": 5}
RAGGED: list[tuple[str, dict[str, int], tuple[int, int], dict[str, int]]] = [
    # Rows and columns that end within a tile, a part of K that does not fill a step.
    ("linear", linear(150, 80, 80, 149, bias=1, gelu=1), (1, 48), {}),
    ("linear", linear(150, 80, 80, 149, bias=1), (2, 64), {"peers": 2}),
    ("linear", linear(300, 528, 272, 300), (3, 192), {}),
    ("linear", linear(128, 256, 1152, 1), (1, 256), {"num_stages": 5}),
    ("linear", linear(129, 32, 16, 129), (1, 16), {"peers": 2}),  # a block without rows
    # A count of more rows than there are.
    ("linear", linear(150, 80, 80, 400, bias=1), (1, 80), {}),
    # More splits than steps: some have nothing to sum.
    ("split_linear", {"m": 200, "n": 112, "k": 272, "valid": 131}, (2, 112), {"split_k": 2}),
    ("split_linear", {"m": 70, "n": 48, "k": 144, "valid": 70}, (1, 48), {"split_k": 4}),
    ("split_linear", {"m": 400, "n": 1152, "k": 272, "valid": 400}, (3, 80), {}),
    # One tile each, and several of a block.
    ("geglu", {"m": 300, "n": 176, "k": 144, "valid": 299}, (2, 96), {}),
    ("geglu", {"m": 300, "n": 176, "k": 144, "valid": 299}, (3, 192), {"programs": 2}),
    ("geglu", {"m": 300, "n": 176, "k": 144, "valid": 299}, (3, 64), {"programs": 2}),
    ("geglu", {"m": 520, "n": 528, "k": 272, "valid": 400}, (2, 64), {"programs": 6, "peers": 2}),
    ("qkv_rope", {**ROPE, "m": 300, "valid": 290}, (2, 80), {}),
    ("qkv_rope", {**ROPE, "m": 300, "valid": 300}, (3, 48), {}),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize(("kernel", "sizes", "tile", "knobs"), RAGGED)
def test_error_rule_and_equal_bits(
    kernel: str,
    sizes: dict[str, int],
    tile: tuple[int, int],
    knobs: dict[str, int],
    dtype: torch.dtype,
) -> None:
    quantises = dtype == FP8 and kernel in ("geglu", "linear")
    case = Case(kernel, sizes, dtype, FP8 if quantises else BF16)
    checked_twice(kernel, case, hopper(*tile, dtype, **knobs))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("programs", [0, 2])  # finished at once, or while the next is multiplied
def test_gates_and_ups_of_any_size_become_e4m3(programs: int) -> None:
    """Their GELU is in half precision: what is beyond it is its largest number, and NaN stays."""
    sizes = torch.tensor([0, 1e-3, 0.5, 2, 5, 300, 6e4, 1e6, 1e30], dtype=torch.float64)
    signed = torch.cat([-sizes, sizes, sizes.new_tensor([math.nan])]).to("cuda", BF16)
    gate, up = signed.repeat_interleave(len(signed)), signed.repeat(len(signed))
    pairs = 16 * math.ceil(len(gate) / 16)
    weight = torch.zeros(2 * pairs, 64, dtype=BF16, device="cuda")
    weight[: 2 * len(gate) : 2, 0], weight[1 : 2 * len(gate) : 2, 0] = gate, up
    x = torch.zeros(300, 64, dtype=BF16, device="cuda")
    x[:, 0] = 1
    scale = torch.tensor([100.0], device="cuda")
    out = torch.empty(300, pairs, dtype=FP8, device="cuda")
    launch = hopper(2, 96, BF16, programs=programs)
    hopper_linear(x, weight, out, launch, gated=True, scale=scale)
    largest = torch.finfo(torch.float16).max
    gate, up = (v.double().clamp(-largest, largest) for v in (gate, up / scale))
    expected = F.gelu(gate, approximate="tanh") * up
    actual = out[:, : len(gate)].double()
    assert torch.equal(actual.isnan(), expected.isnan().expand_as(actual))
    # Half a step of E4M3, normal or not, and where tanh is not yet one, its error.
    error = expected.abs() / 16 + 2.0**-10 + 2.0**-9 * (gate * up).abs() * (gate.abs() < 10)
    expected = expected.clamp(-FP8_MAX, FP8_MAX)
    assert ((actual - expected).abs() <= error).logical_or(expected.isnan()).all()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("out_dtype", [BF16, FP8])
@pytest.mark.parametrize("splits", [0, 1, 4])
@pytest.mark.parametrize(("m", "d"), [(1, 8), (7, 264), (1000, 72), (2000, 2048)])
@pytest.mark.parametrize("kernel", ["layer_norm", "rms_norm"])
def test_norms_of_any_size(
    kernel: str, m: int, d: int, splits: int, out_dtype: torch.dtype
) -> None:
    valid = m if splits else (m + 1) // 2  # with splits x is written, and what it was not stays
    sizes = {"m": m, "d": d, "valid": valid, "splits": splits}
    checked_twice(
        kernel, Case(kernel, sizes, out_dtype=out_dtype), Launch(pdl=True, kernel="hopper")
    )


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kernel", ["layer_norm", "rms_norm"])
def test_a_count_of_more_rows_than_there_are(kernel: str) -> None:
    case = Case(kernel, {"m": 50, "d": 72, "valid": 400, "splits": 2})
    checked_twice(kernel, case, Launch(pdl=True, kernel="hopper"))
