"""All layers of SigLIP as one kernel: it compiles; what it refuses; the error rule on Hopper."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.conftest import ADA, CUDA, HOPPER, needs_compiler, needs_hopper, zeros

from halfpi.config import PRESETS
from halfpi.kernels import siglip_layers as file
from halfpi.kernels.cuda_source import ptx, report
from halfpi.kernels.siglip_layers import (
    HIDDEN,
    SITES,
    TOKENS,
    WIDTH,
    SiglipLayers,
    SiglipWeights,
    block_constants,
    defines,
    groups_of,
    siglip_layers_reference,
    supports,
)
from halfpi.kernels.spec import FP8, FP8_MAX, Device
from halfpi.model.siglip import VisionBlock

DEPTH = 4
SHAPES = {
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "fc1": (HIDDEN, WIDTH),
    "fc2": (WIDTH, HIDDEN),
}


def random_weights(depth: int, device: torch.device) -> SiglipWeights:
    """Exact: fp32 numbers, of which `quantised` makes what the kernel reads."""

    def vector(n: int = WIDTH) -> Tensor:
        return 0.3 * torch.randn(depth, n, device=device)

    matrices = {
        name: torch.randn(depth, *shape, device=device) * shape[1] ** -0.5
        for name, shape in SHAPES.items()
    }
    ones = torch.ones(depth, len(SITES), device=device)
    return SiglipWeights(
        **matrices,
        query_bias=vector(), attn_gain=1 + vector(), attn_shift=vector(), out_bias=vector(),
        mlp_gain=1 + vector(), mlp_shift=vector(), fc1_bias=vector(HIDDEN), fc2_bias=vector(),
        alphas=ones, input_scales=ones,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_without_spills(groups: int) -> None:
    macros = defines(27, groups)
    said, code = report("siglip_layers", macros), ptx("siglip_layers", macros)
    assert macros["SHARED_BYTES"] <= HOPPER.shared_bytes
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    assert "serialized" not in said
    for products in ("n144k32.f32.e4m3.e4m3", "n72k32.f32.e4m3.e4m3", "n72k16.f32.bf16.bf16"):
        assert f"wgmma.mma_async.sync.aligned.m64{products}" in code
    for instruction in ("cp.async.bulk.tensor.2d", "st.release.gpu", "ld.acquire.gpu"):
        assert instruction in code


@needs_compiler
def test_hopper_uses_it_for_as_many_blocks_as_run_at_a_time() -> None:
    assert [groups_of(images, HOPPER) for images in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert supports(4, 27, HOPPER)
    assert not supports(5, 27, HOPPER)
    assert not supports(4, 27, Device(90, HOPPER.shared_bytes, multiprocessors=114))
    assert not supports(1, 27, ADA)
    assert not supports(1, 3, HOPPER)
    assert not supports(1, 32, HOPPER)


def test_the_chain_serves_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "is_available", lambda: False)
    assert not supports(1, 27, HOPPER)


def test_reference_is_the_model() -> None:
    torch.manual_seed(0)
    weights = random_weights(1, torch.device("cpu"))
    block = VisionBlock(dataclasses.replace(PRESETS["pi05"], vision_mlp=HIDDEN))
    query, key, value = weights.qkv[0].chunk(3)
    state = {
        "attn_norm.weight": weights.attn_gain, "attn_norm.bias": weights.attn_shift,
        "attn.q.weight": query, "attn.q.bias": weights.query_bias,
        "attn.k.weight": key, "attn.k.bias": torch.zeros(WIDTH),
        "attn.v.weight": value, "attn.v.bias": torch.zeros(WIDTH),
        "attn.o.weight": weights.out, "attn.o.bias": weights.out_bias,
        "mlp_norm.weight": weights.mlp_gain, "mlp_norm.bias": weights.mlp_shift,
        "mlp.fc1.weight": weights.fc1, "mlp.fc1.bias": weights.fc1_bias,
        "mlp.fc2.weight": weights.fc2, "mlp.fc2.bias": weights.fc2_bias,
    }  # fmt: skip
    block.load_state_dict(
        {name: one.view_as(block.state_dict()[name]) for name, one in state.items()}
    )
    x = torch.randn(2 * TOKENS, WIDTH)
    expected = block(x.view(2, TOKENS, WIDTH)).view(x.shape)
    torch.testing.assert_close(siglip_layers_reference(x, weights), expected, rtol=1e-4, atol=1e-4)


def test_every_block_has_its_own_constants() -> None:
    torch.manual_seed(0)
    weights = random_weights(DEPTH, torch.device("cpu"))
    scales = torch.rand(DEPTH, 3) + 0.5
    weights = dataclasses.replace(weights, input_scales=scales, alphas=torch.rand(DEPTH, 3))
    constants = block_constants(weights)
    assert constants.shape == (DEPTH, 16, 7 * 72 + 272 + 4)
    layer, head = 2, 5
    vectors = constants[layer, head, : 7 * 72].view(7, 72)
    own = slice(72 * head, 72 * head + 72)
    attn, mlp, hidden = 1 / scales[layer]
    for index, (name, factor) in enumerate(
        [
            ("query_bias", 1.0), ("attn_gain", attn), ("attn_shift", attn), ("out_bias", 1.0),
            ("mlp_gain", mlp), ("mlp_shift", mlp), ("fc2_bias", 1.0),
        ]
    ):  # fmt: skip
        torch.testing.assert_close(vectors[index], getattr(weights, name)[layer, own] * factor)
    first, last = constants[layer, head, 7 * 72 : -4].tensor_split([144])
    assert torch.equal(first, weights.fc1_bias[layer, 144 * head : 144 * head + 144])
    begin = 16 * 144 + 128 * head
    assert torch.equal(last, weights.fc1_bias[layer, begin : begin + 128])
    assert torch.equal(constants[layer, head, -4:-1], weights.alphas[layer])
    assert constants[layer, head, -1] == hidden


def refusable(**changes: Any) -> SiglipWeights:
    """Without memory."""
    weights = random_weights(DEPTH, torch.device("meta"))
    stored = {name: getattr(weights, name).to(FP8) for name in SITES}
    stored["out"] = weights.out.bfloat16()
    return dataclasses.replace(weights, **{**stored, **changes})


def test_takes_what_it_should() -> None:
    refusable().check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": zeros(DEPTH, 3 * WIDTH, WIDTH, dtype=torch.float32)},
            "qkv must be contiguous float8_e4m3fn",
        ),
        ({"out": zeros(DEPTH, WIDTH, WIDTH, dtype=FP8)}, "out must be contiguous bfloat16"),
        ({"fc1": zeros(DEPTH, 4304, WIDTH, dtype=FP8)}, r"fc1 must be .* \(4, 4352, 1152\)"),
        ({"fc2": zeros(3, WIDTH, HIDDEN, dtype=FP8)}, r"fc2 must be .* \(4, 1152, 4352\)"),
        (
            {"mlp_gain": zeros(DEPTH, 2, dtype=torch.float32)},
            r"mlp_gain must be contiguous float32 \(4, 1152\)",
        ),
        (
            {"fc1_bias": zeros(DEPTH, WIDTH, dtype=torch.float32)},
            r"fc1_bias must be contiguous float32 \(4, 4352\)",
        ),
        (
            {"alphas": zeros(DEPTH, 4, dtype=torch.float32)},
            r"alphas must be contiguous float32 \(4, 3\)",
        ),
        ({"qkv": zeros(3, 3 * WIDTH, WIDTH, dtype=FP8)}, "layers must be from 4 to 31, got 3"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusable(**change).check()


class Problem:
    """Random weights, those of E4M3 with the scales that the exact model needs."""

    def __init__(self, depth: int, images: int) -> None:
        torch.manual_seed(0)
        exact = random_weights(depth, CUDA)
        self.start = torch.randn(images * TOKENS, WIDTH, device=CUDA).bfloat16()
        scales = {
            site: getattr(exact, site).abs().amax((1, 2), keepdim=True) / FP8_MAX for site in SITES
        }
        stored: dict[str, Tensor] = {
            site: (getattr(exact, site) / scale).to(FP8) for site, scale in scales.items()
        }
        stored["out"] = exact.out.bfloat16()
        self.exact = dataclasses.replace(
            exact,
            out=stored["out"].float(),
            **{site: stored[site].float() * scale for site, scale in scales.items()},
        )
        inputs = torch.ones(depth, len(SITES), device=CUDA)

        def observe(x: Tensor, layer: int, site: str) -> Tensor:
            inputs[layer, SITES.index(site)] = x.abs().max() / FP8_MAX
            return x

        self.truth = siglip_layers_reference(self.start.double(), self.exact, observe)
        weight_scales = torch.cat([scale[:, 0] for scale in scales.values()], 1)
        self.stored = dataclasses.replace(
            exact, **stored, input_scales=inputs, alphas=inputs * weight_scales
        )

    def plain(self) -> Tensor:
        """Plain torch in bfloat16, with E4M3's rounding where the kernel has it."""

        def rounded(x: Tensor, layer: int, site: str) -> Tensor:
            scale = self.stored.input_scales[layer, SITES.index(site)]
            stored = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
            return (stored.float() * scale).to(x.dtype)

        return siglip_layers_reference(self.start, self.exact, rounded)

    def errors(self, result: Tensor) -> Tensor:
        """Root mean square, and the largest."""
        error = (result.double() - self.truth).abs()
        return torch.stack([error.square().mean().sqrt(), error.max()])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("depth", [DEPTH, 7, 27])
@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_error_rule_and_equal_bits(images: int, depth: int) -> None:
    problem = Problem(depth, images)
    kernel = SiglipLayers(problem.stored, 4, CUDA)
    beyond = 5
    results = []
    for _ in range(2):
        room = torch.full((len(problem.start) + beyond, WIDTH), torch.nan, device=CUDA).bfloat16()
        room[:-beyond] = problem.start
        kernel(room[:-beyond])
        assert room[-beyond:].isnan().all()
        results.append(room[:-beyond])
    assert torch.equal(*results)
    assert (problem.errors(results[0]) <= 2 * problem.errors(problem.plain())).all()


@pytest.mark.gpu
@needs_hopper
def test_gelu_of_more_than_half_precision_holds() -> None:
    problem = Problem(DEPTH, 1)
    problem.stored.fc1_bias[:, ::7] = -1e6
    without, with_ = problem.start.clone(), problem.start.clone()
    SiglipLayers(problem.stored, 1, CUDA)(with_)
    problem.stored.fc2.view(torch.uint8)[:, :, ::7] = 0
    SiglipLayers(problem.stored, 1, CUDA)(without)
    assert torch.equal(with_, without)
    problem.stored.fc1_bias[:, ::7] = 1e6
    SiglipLayers(problem.stored, 1, CUDA)(with_)
    assert with_.isfinite().all()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("neighbour")
def test_launches_of_other_images_and_replays_have_the_same_bits() -> None:
    """What a launch leaves in flags and buffers is never taken for new."""
    problem, counts = Problem(DEPTH, 4), (1, 2, 3, 4)
    kernel = SiglipLayers(problem.stored, 4, CUDA)
    rows = {count: problem.start[: count * TOKENS].clone() for count in counts}
    for residual in rows.values():
        kernel(residual)
    expected = {count: residual.clone() for count, residual in rows.items()}
    assert torch.equal(expected[1], expected[2][:TOKENS])
    assert torch.equal(expected[3], expected[4][: 3 * TOKENS])
    graphs = {count: torch.cuda.CUDAGraph() for count in counts}
    for count, graph in graphs.items():
        with torch.cuda.graph(graph):
            kernel(rows[count])
    rng = random.Random(0)
    others = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(3000):
        count = rng.choice(counts)
        rows[count].copy_(problem.start[: count * TOKENS])
        graphs[count].replay()
        others += (rows[count] != expected[count]).any()
    assert int(others) == 0


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (100, torch.bfloat16, "residual must be contiguous bfloat16"),
        (256, torch.float32, "residual must be contiguous bfloat16"),
        (0, torch.bfloat16, "residual must be of 1 to 1 images, got 0"),
        (512, torch.bfloat16, "residual must be of 1 to 1 images, got 2"),
    ],
)
def test_refuses_rows(rows: int, dtype: torch.dtype, message: str) -> None:
    kernel = SiglipLayers(Problem(DEPTH, 1).stored, 1, CUDA)
    with pytest.raises(ValueError, match=message):
        kernel(torch.empty(rows, WIDTH, dtype=dtype, device=CUDA))
