"""The denoise stage as one kernel: packing and compiling anywhere, the error rule on Hopper."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.kernels.cuda_source import cubin, ptx, report
from halfpi.kernels.expert_steps import (
    SITES,
    ActionWeights,
    ExpertSizes,
    ExpertSteps,
    expert_steps_reference,
    supports,
)
from halfpi.kernels.expert_stream import ExpertLayer, layer_bytes, pack
from halfpi.kernels.spec import FP8, FP8_MAX
from halfpi.model.gemma import PrefixCache
from halfpi.model.guidance import Guidance
from halfpi.model.pi05 import Pi05

pytest.importorskip("triton", reason="Triton is not installed")
from halfpi.kernels.geglu import interleaved
from halfpi.kernels.qkv_rope import paired

PRECISIONS = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(FP8, id="fp8")]
SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}
SMALL = ExpertSizes(horizon=10, steps=2, depth=2)
SIZES = {10: SMALL, 50: dataclasses.replace(SMALL, horizon=50)}


def random_layer(device: torch.device) -> ExpertLayer:
    return ExpertLayer(
        **{name: torch.randn(s, device=device) * s[1] ** -0.5 for name, s in SHAPES.items()}
    )


def mapped(layer: ExpertLayer, function: Any) -> ExpertLayer:
    return ExpertLayer(*(function(site, getattr(layer, name)) for site, name in enumerate(SITES)))


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pack_puts_every_weight_where_a_block_reads_it(precision: torch.dtype, turns: int) -> None:
    torch.manual_seed(0)
    layer = mapped(random_layer(torch.device("cpu")), lambda _, weight: weight.to(precision))
    stream = pack([layer], turns, torch.device("cpu"))
    qkv, out, wide, down = torch.split(stream[:, 0], list(layer_bytes(precision.itemsize)), 1)
    chunk = 16 // precision.itemsize

    def element(block: int, part: Tensor, rows: int, row: int, column: int) -> Tensor:
        """Of a tile of a block: (chunk, row, 16 bytes)."""
        tile = part[block].reshape(-1, rows, 16).view(precision)
        return tile[column // chunk, row, column % chunk]

    def place(row: int) -> int:
        """Rows 4c to 4c + 3, of 16, lie where a product gives them to the same thread."""
        block, within = divmod(row, 16)
        c, second, odd = within // 4, within % 4 // 2, within % 2
        return 16 * block + 8 * second + 2 * c + odd

    def turned(rank: int, width: int, column: int) -> int:
        """A unit has 128 bytes of each row; that of the block's own eighth of `width` is first."""
        unit = 128 // precision.itemsize
        return (column - rank * width // 8 // unit * unit) % width

    def of_turn(column: int) -> tuple[int, int]:
        """The turn in which one of 512 hidden activations is written, and its place there."""
        rank, within = divmod(column, 64)
        turn, within = divmod(within, 64 // turns)
        return turn, rank * (64 // turns) + within

    for block in (0, 17, 63):
        head, rank = divmod(block, 8)
        assert element(block, qkv, 40, 5, 700) == layer.qkv[32 * block + 5, 700]
        assert element(block, qkv, 40, 37, 700) == layer.qkv[2048 + 8 * block + 5, 700]
        for row in (9, 77):
            assert (
                element(block, out, 128, place(row), turned(rank, 256, 200))
                == layer.out[128 * rank + row, 256 * head + 200]
            )
            turn, column = of_turn(300)
            assert (
                element(block, down.chunk(turns, 1)[turn], 128, place(row),
                        turned(rank, 512 // turns, column))
                == layer.down[128 * rank + row, 512 * head + 300]
            )  # fmt: skip
            turn, row_of_turn = divmod(place(row), 128 // turns)
            assert (
                element(block, wide.chunk(turns, 1)[turn], 128 // turns, row_of_turn, 900)
                == layer.gate_up[128 * block + row, 900]
            )


@pytest.mark.parametrize("horizon", [10, 50])
def test_the_cache_has_room_for_any_prefix_that_fits(horizon: int) -> None:
    """As key_tiles in cuda/block.cuh counts tiles."""
    for most in (1, 100, 512, 560, 968, 1024, 1100, 3000):
        keys = SIZES[horizon].key_tile(most)
        assert keys % 16 == 0
        assert 16 <= keys <= 128
        for prefix in (0, 1, most // 2, most):
            tiles = max(1, math.ceil(math.ceil(prefix / 8) / keys))
            room = SIZES[horizon].cache_bytes(most)
            assert 2 * 8 * tiles * 2 * keys * 256 * 2 <= room  # two layers, keys and values


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiles_to_hopper_instructions(precision: torch.dtype) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `hopper` is missing")
    sizes = dataclasses.replace(SMALL, precision=precision)
    assert len(cubin("expert_steps", sizes.defines(968))) > 10_000
    code = ptx("expert_steps", sizes.defines(968))
    assert "cp.async.bulk.shared::cluster" in code
    assert "m64n16k16.f32.bf16.bf16" in code  # attention
    operands = "k32.f32.e4m3.e4m3" if precision == FP8 else "k16.f32.bf16.bf16"
    assert f"m64n16{operands}" in code  # as many columns as there are rows, in eights


@pytest.mark.parametrize(("horizon", "prefix"), [(10, 968), (10, 560), (10, 100), (50, 968)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_registers_do_not_spill(precision: torch.dtype, horizon: int, prefix: int) -> None:
    """All of L1 is shared memory: 200 bytes of spills cost a tenth of the time (docs/LOG.md)."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `hopper` is missing")
    sizes = dataclasses.replace(FULL, horizon=horizon, precision=precision)
    said = report("expert_steps", sizes.defines(prefix))
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 32, said
    assert "serialized" not in said


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 512}, "width must be 1024, got 512"),
        ({"horizon": 65}, "horizon must be from 1 to 64, got 65"),
        ({"precision": torch.float16}, "precision must be bfloat16 or float8_e4m3fn"),
    ],
)
def test_sizes_it_cannot_do(change: dict[str, Any], match: str) -> None:
    sizes = dataclasses.replace(SMALL, **change)
    assert not supports(sizes, torch.device("cuda"))
    with pytest.raises(ValueError, match=match):
        sizes.check()


def test_rows_fit_beside_the_blocks_that_multiply() -> None:
    """Fifteen clusters of eight blocks run at a time; more would wait for each other for ever."""
    for horizon in range(1, 65):
        sizes = dataclasses.replace(SMALL, horizon=horizon)
        assert sizes.blocks % 8 == 0
        assert sizes.blocks <= 120
        assert (sizes.blocks - 64) * sizes.rows_per_block >= horizon


def test_the_reference_is_the_model() -> None:
    torch.manual_seed(0)
    config = Pi05Config(
        image_size=28, vision_width=16, vision_mlp=16, vision_depth=1, vision_heads=2,
        vocab_size=16, prefix_width=16, prefix_mlp=16, expert_width=32, expert_mlp=24, depth=2,
        q_heads=2, action_dim=5, horizon=6,
    )  # fmt: skip
    model = Pi05(config)
    for parameter in model.expert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    h, steps, decided, prefix = config.horizon, 3, 2, 9
    noise, target = torch.randn(1, h, 5), torch.randn(h, 5)
    keys, values = torch.randn(2, 2, prefix, 256)
    cache = PrefixCache(
        tuple(_unpaired(key)[None, None] for key in keys),
        tuple(value[None, None] for value in values),
        torch.ones(1, prefix, dtype=torch.bool),
    )
    guidance = Guidance(target, torch.linspace(1, 0, h))
    times = [1 - step / steps for step in range(steps)]
    with torch.no_grad():
        condition = model.condition(torch.tensor([*times, 0.0]))
        expected = model.denoise(cache, noise, steps, noise[:, :decided], guidance)[0]
        angles = torch.outer(torch.arange(prefix + h), 10_000.0 ** -(torch.arange(128) / 128))
        actions = expert_steps_reference(
            [_layer(block) for block in model.expert.layers],
            ActionWeights(
                model.action_in.weight, model.action_in.bias,
                model.action_out.weight, model.action_out.bias,
            ),
            noise[0], keys[:, :, None], values[:, :, None], prefix, decided,
            angles.cos(), angles.sin(), torch.stack(model.expert.modulations(condition), 1),
            target, guidance.weights, torch.tensor([guidance.gain(time) for time in times]),
        )  # fmt: skip
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)


def _unpaired(key: Tensor) -> Tensor:
    """Keys (s, k) whose rotary pairs are neighbours, in the model's order."""
    return torch.cat([key[:, ::2], key[:, 1::2]], 1)


def _layer(block: Any) -> ExpertLayer:
    attn, mlp = block.attn, block.mlp
    turned = [paired(part.weight, 256) for part in (attn.q, attn.k)]
    qkv = torch.cat([*turned, attn.v.weight])
    return ExpertLayer(
        qkv, attn.o.weight, interleaved(mlp.gate.weight, mlp.up.weight), mlp.down.weight
    )


class Case:
    """Random weights and inputs; for FP8 with scales calibrated on the FP32 reference.

    loud: how much larger the keys of actions are than those of the prefix.
    """

    def __init__(
        self,
        sizes: ExpertSizes,
        prefix: int,
        decided: int = 0,
        guided: bool = False,
        spare: int = 0,
        loud: float = 1.0,
    ) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda")
        self.sizes, self.prefix, self.decided, self.spare = sizes, prefix, decided, spare
        h, a, d, depth, steps = (
            sizes.horizon,
            sizes.action_dim,
            sizes.width,
            sizes.depth,
            sizes.steps,
        )

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, device=device) * scale

        self.action = ActionWeights(
            randn(d, a, scale=a**-0.5), randn(d), randn(a, d, scale=d**-0.5), randn(a)
        )
        rows = prefix + h + spare
        frequencies = 10_000.0 ** -(torch.arange(128, device=device) / 128)
        angles = torch.outer(torch.arange(rows, device=device), frequencies)
        weights = (
            torch.linspace(1, 0, h, device=device) if guided else torch.zeros(h, device=device)
        )
        self.noise = randn(h, a)
        self.inputs: dict[str, Any] = {
            "keys": randn(depth, rows, 1, 256).bfloat16(),
            "values": randn(depth, rows, 1, 256).bfloat16(),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "modulations": randn(steps + 1, 2 * depth + 1, 3 * d, scale=0.3),
            "target": randn(h, a),
            "weights": weights,
            "gains": torch.linspace(0.5, 2, steps, device=device),
        }
        layers = [random_layer(device) for _ in range(depth)]
        for layer in layers:
            layer.qkv[2048:2304] *= loud
        self.scales: dict[str, Tensor] = {}
        if sizes.precision == FP8:
            self._quantise(layers)
        else:
            self.stored = [mapped(layer, lambda _, weight: weight.bfloat16()) for layer in layers]
            self.exact = [mapped(layer, lambda _, weight: weight.float()) for layer in self.stored]

    def _quantise(self, layers: list[ExpertLayer]) -> None:
        size = self.sizes
        weight_scales = (
            torch.stack(
                [torch.stack([getattr(one, n).abs().max() for n in SITES]) for one in layers]
            )
            / FP8_MAX
        )
        self.stored = [
            mapped(layer, lambda site, weight, i=i: (weight / weight_scales[i, site]).to(FP8))
            for i, layer in enumerate(layers)
        ]
        self.exact = [
            mapped(layer, lambda site, stored, i=i: stored.float() * weight_scales[i, site])
            for i, layer in enumerate(self.stored)
        ]
        input_scales = torch.ones(size.steps, size.depth, 4, device=self.noise.device)

        def observe(x: Tensor, step: int, layer: int, site: int) -> Tensor:
            input_scales[step, layer, site] = x.abs().max() / FP8_MAX
            return x

        self.reference(self.exact, quantise=observe)
        self.scales = {"input_scales": input_scales, "weight_scales": weight_scales}

    def reference(self, layers: list[ExpertLayer], **options: Any) -> Tensor:
        return expert_steps_reference(
            layers, self.action, self.noise, prefix_count=self.prefix, decided=self.decided,
            **self.inputs, **options,
        )  # fmt: skip

    def plain(self) -> Tensor:
        """Plain torch in bfloat16, with E4M3's rounding where the kernel has it."""
        layers = [mapped(layer, lambda _, weight: weight.bfloat16()) for layer in self.exact]
        if not self.scales:
            return self.reference(layers)

        def rounded(x: Tensor, step: int, layer: int, site: int) -> Tensor:
            scale = self.scales["input_scales"][step, layer, site]
            stored = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
            return (stored.float() * scale).bfloat16()

        return self.reference(layers, quantise=rounded)

    def build(self) -> ExpertSteps:
        device = self.noise.device
        capacity = self.inputs["keys"].shape[1]
        return ExpertSteps(self.sizes, self.stored, self.action, capacity, device, **self.scales)

    def bind(self, kernel: ExpertSteps) -> tuple[Tensor, Any]:
        """Where actions come, and the launch that brings them."""
        result = torch.full_like(self.noise, torch.nan)
        counts = {
            name: torch.tensor([value], dtype=torch.int32, device=result.device)
            for name, value in (("prefix_count", self.prefix), ("decided", self.decided))
        }
        return result, lambda: kernel(self.noise, result=result, **self.inputs, **counts)

    def run(self, kernel: ExpertSteps) -> Tensor:
        actions, launch = self.bind(kernel)
        launch()
        return actions

    def spoil(self) -> None:
        """Other garbage behind the valid prefix."""
        for name in ("keys", "values"):
            self.inputs[name][:, self.prefix :] = torch.nan


def assert_error_rule(case: Case, actions: Tensor) -> None:
    truth, plain = case.reference(case.exact), case.plain()
    ours, theirs = (actions - truth).abs(), (plain - truth).abs()
    assert ours.square().mean() <= 4 * theirs.square().mean()
    assert ours.max() <= 2 * theirs.max()


hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not supports(SMALL, torch.device("cuda")),
        reason="no Hopper GPU with cuda-core",
    ),
]
FULL = ExpertSizes(horizon=50, steps=10)


@pytest.mark.parametrize("precision", PRECISIONS)
class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize(
        ("sizes", "prefix", "options"),
        [
            pytest.param(FULL, 968, {}, id="pi05"),
            pytest.param(dataclasses.replace(FULL, horizon=10), 560, {}, id="short"),
            pytest.param(SMALL, 7, {"guided": True}, id="few-keys"),
            pytest.param(
                dataclasses.replace(SMALL, horizon=16),
                1400,
                {"decided": 3},
                id="few-rows-many-keys",
            ),
            pytest.param(dataclasses.replace(SMALL, horizon=3), 100, {}, id="three-rows"),
            # Keys of actions whose logits are far above those of the prefix.
            pytest.param(SMALL, 100, {"loud": 60.0}, id="few-loud-rows"),
            pytest.param(
                dataclasses.replace(SMALL, horizon=50), 1400, {"loud": 60.0}, id="loud-rows"
            ),
            pytest.param(dataclasses.replace(SMALL, horizon=50), 3, {}, id="splits-without-keys"),
            pytest.param(dataclasses.replace(SMALL, horizon=50), 513, {"decided": 5}, id="decided"),
            pytest.param(
                dataclasses.replace(SMALL, horizon=64, action_dim=7),
                1400,
                {"decided": 3, "guided": True, "spare": 30},
                id="many-keys",
            ),
        ],
    )
    def test_error_rule(
        self, precision: torch.dtype, sizes: ExpertSizes, prefix: int, options: dict[str, Any]
    ) -> None:
        case = Case(dataclasses.replace(sizes, precision=precision), prefix, **options)
        kernel = case.build()
        case.spoil()
        actions = case.run(kernel)
        assert_error_rule(case, actions)
        assert torch.equal(actions[: case.decided], case.noise[: case.decided])

    def test_same_bits_whatever_lies_behind_the_prefix(self, precision: torch.dtype) -> None:
        case = Case(dataclasses.replace(SMALL, horizon=50, precision=precision), 513, spare=40)
        kernel = case.build()
        first, second = case.run(kernel), case.run(kernel)
        case.spoil()
        third = case.run(kernel)
        assert torch.equal(first, second)
        assert torch.equal(first, third)

    @pytest.mark.usefixtures("neighbour")
    @pytest.mark.parametrize("horizon", [50, 10])
    def test_no_launch_of_many_has_other_bits(self, precision: torch.dtype, horizon: int) -> None:
        """What comes too late, or too early, shows in one launch of hundreds (docs/LOG.md)."""
        case = Case(dataclasses.replace(FULL, horizon=horizon, precision=precision), 968)
        kernel = case.build()
        first = case.run(kernel)
        others = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1500):
            kernel._cache.fill_(0xFF)  # NaN, unless it is laid out in time
            others += (case.run(kernel) != first).any()
        assert int(others) == 0

    def test_nan_in_is_nan_out(self, precision: torch.dtype) -> None:
        """What blocks wait for is a NaN that no input makes (cuda/exchange.cuh)."""
        case = Case(dataclasses.replace(SMALL, precision=precision), 100)
        kernel = case.build()
        clean, noise = case.run(kernel), case.noise.clone()
        case.noise[2] = torch.nan
        assert case.run(kernel)[2].isnan().all()
        case.noise.copy_(noise)
        assert torch.equal(case.run(kernel), clean)

    def test_a_graph_replays_the_launch(self, precision: torch.dtype) -> None:
        case = Case(dataclasses.replace(SMALL, precision=precision), 100)
        kernel = case.build()
        direct = case.run(kernel)
        actions, launch = case.bind(kernel)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        for _ in range(3):
            actions.zero_()
            graph.replay()
            assert torch.equal(actions, direct)

    def test_names_what_is_wrong(self, precision: torch.dtype) -> None:
        case = Case(dataclasses.replace(SMALL, precision=precision), 100)
        kernel = case.build()
        case.inputs["gains"] = case.inputs["gains"][:1]
        with pytest.raises(ValueError, match="gains must be contiguous float32"):
            case.run(kernel)
