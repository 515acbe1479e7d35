"""The planned engine on a GPU, mostly at nano's size: against the model, and against itself."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.conftest import build_pi05
from tests.engine.conftest import assert_calls_equal_fresh_captures

from halfpi.config import PRESETS, EngineConfig, Pi05Config
from halfpi.engine import EagerEngine, Engine, make_engine
from halfpi.engine.graphs import captured
from halfpi.model import Guidance, Pi05
from halfpi.processing.images import pictures, prepare_images
from halfpi.processing.pipeline import ModelInputs
from halfpi.quant import Scales, calibrate
from halfpi.types import Observation

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.gpu
NANO = PRESETS["nano"]
# With π0.5's own SigLIP, but for its depth: on Hopper one kernel in fp8.
SIGLIP = dataclasses.replace(
    NANO, image_size=224, vision_width=1152, vision_mlp=4304, vision_depth=4, vision_heads=16
)
CAMERAS, STEPS = 3, 10
SETS = [[True] * 3, [True, False, True], [False, True, False], [True, True, False]]
Result = tuple[torch.Tensor, ...]


def inputs_with(
    cameras: Sequence[bool], length: int, seed: int, size: int = NANO.image_size
) -> ModelInputs:
    generator = torch.Generator().manual_seed(seed)
    return ModelInputs(
        images=torch.randint(256, (1, CAMERAS, size, size, 3), generator=generator).to(torch.uint8),
        image_mask=torch.tensor([list(cameras)]),
        tokens=torch.randint(NANO.vocab_size, (1, NANO.max_prompt_tokens), generator=generator),
        token_mask=torch.arange(NANO.max_prompt_tokens)[None] < length,
    )


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((NANO.horizon, NANO.action_dim), generator=generator)


@pytest.fixture(scope="module")
def model() -> Pi05:
    return build_pi05(NANO).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def scales(model: Pi05) -> Scales:
    return calibrated(model)


def calibrated(model: Pi05) -> Scales:
    engine, size = EagerEngine(model), model.config.image_size
    frames = [inputs_with(SETS[seed % 4], 1 + seed * 7, seed, size) for seed in range(6)]
    numbers = iter(range(6))

    def infer(_: Observation) -> None:
        index = next(numbers)
        engine.run(frames[index], noise(index), STEPS)

    return calibrate(model, infer, [None] * 6)  # type: ignore[list-item]


def planned(model: Pi05, scales: Scales | None, device: str = "cuda", **options: object) -> Engine:
    config = EngineConfig(
        "triton",
        "bf16" if scales is None else "fp8",
        (STEPS,),
        max_cameras=CAMERAS,
        max_prompt_tokens=NANO.max_prompt_tokens,
        **options,  # type: ignore[arg-type]
    )
    return make_engine(model, config, device=device, scales=scales)


def test_bf16_errs_at_most_twice_what_eager_errs(model: Pi05) -> None:
    truth = EagerEngine(model)
    narrow = EagerEngine(build_pi05(NANO).requires_grad_(False).eval().to_dtype(torch.bfloat16))
    engine = planned(model, None)
    guidance = Guidance(noise(9), torch.linspace(1, 0, NANO.horizon))
    options = [{}, {"given": noise(8)[:5]}, {"guidance": guidance}]
    for number in range(9):
        inputs = inputs_with(SETS[number % 4], 1 + 5 * number, number)
        call = (inputs, noise(number), STEPS)
        expected, theirs, ours = (
            one.run(*call, **options[number % 3])[0]  # type: ignore[arg-type]
            for one in (truth, narrow, engine)
        )
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm(), number


@pytest.mark.parametrize("config", [NANO, SIGLIP])
def test_fp8_is_close_to_its_imitation(config: Pi05Config) -> None:
    model = build_pi05(config).requires_grad_(False).eval()
    scales = calibrated(model)
    eager = EngineConfig("eager", "fp8", (STEPS,))
    imitation = make_engine(build_pi05(config).eval(), eager, device="cpu", scales=scales)
    engine, truth = planned(model, scales), EagerEngine(model)
    for number, cameras in enumerate(SETS):
        inputs = inputs_with(cameras, 9 * number + 1, number, config.image_size)
        call = (inputs, noise(number), STEPS)
        expected, imitated, ours = (one.run(*call)[0] for one in (truth, imitation, engine))
        assert (ours - expected).norm() <= 2 * (imitated - expected).norm()
        # One camera anew is the other kernel's first block, or a later one.
        kept = [place for place, there in enumerate(cameras) if there][:-1]
        again, _ = engine.run(*call, kept=kept)
        assert (again - expected).norm() <= 2 * (imitated - expected).norm()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_thousand_calls_equal_fresh_captures(model: Pi05, scales: Scales, precision: str) -> None:
    """Any prompt, cameras and noise through one engine, in any order, give the same bits."""
    rng = random.Random(0)
    calls = [
        (
            inputs_with(rng.choice(SETS), rng.randint(1, NANO.max_prompt_tokens), seed),
            noise(seed),
            STEPS,
        )
        for seed in range(50)
    ]
    chosen = scales if precision == "fp8" else None
    assert_calls_equal_fresh_captures(lambda: planned(model, chosen), calls)


def test_garbage_is_left_alone_while_a_graph_is_captured() -> None:
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)

    def work() -> None:
        assert not gc.isenabled() or not torch.cuda.is_current_stream_capturing()
        x.add_(1)

    replay = captured(work, device)
    assert gc.isenabled()
    before = x.item()
    replay()
    assert x.item() == before + 1


def test_an_engine_is_made_beside_one_that_runs(model: Pi05) -> None:
    """As a server does that reloads: nothing that one thread captures disturbs the other."""
    engine, call = planned(model, None), (inputs_with(SETS[0], 20, 1), noise(1), STEPS)
    expected, _ = engine.run(*call)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(planned, model, None)
        calls = 0
        while not made.done():
            assert torch.equal(engine.run(*call)[0], expected)
            calls += 1
        assert calls > 10
        assert torch.equal(made.result().run(*call)[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_an_engine_runs_on_any_gpu(model: Pi05) -> None:
    call = (inputs_with(SETS[0], 20, 1), noise(1), STEPS)
    first, second = (planned(model, None, f"cuda:{index}").run(*call)[0] for index in range(2))
    assert torch.equal(first, second)
    assert torch.cuda.current_device() == 0


def test_kept_parts_equal_recomputation(model: Pi05) -> None:
    engine = planned(model, None)
    inputs = inputs_with(SETS[0], 20, 1)
    whole, _ = engine.run(inputs, noise(1), STEPS)
    for kept in ([0], [1], [2], [0, 2]):  # fewer images at once may be summed in another order
        again, _ = engine.run(inputs, noise(1), STEPS, kept=kept)
        torch.testing.assert_close(again, whole, rtol=0.05, atol=0.05)
    engine.run(inputs, noise(1), STEPS)
    assert torch.equal(engine.run(inputs, noise(1), STEPS, kept=[0, 1, 2])[0], whole)
    assert torch.equal(engine.run(None, noise(1), STEPS)[0], whole)
    fewer = inputs_with(SETS[1], 20, 1)
    alone, _ = planned(model, None).run(fewer, noise(2), STEPS)
    moved, _ = engine.run(fewer, noise(2), STEPS, kept=[0, 2])
    torch.testing.assert_close(moved, alone, rtol=0.05, atol=0.05)


def test_one_kernel_equals_a_chain_of_them(model: Pi05) -> None:
    """The persistent expert, where it can run, against the chain of kernels."""
    calls = [(inputs_with(SETS[0], 30, 3), noise(3), STEPS)]
    one, other = (planned(model, None, persistent_expert=flag) for flag in (True, False))
    for call in calls:
        torch.testing.assert_close(one.run(*call)[0], other.run(*call)[0], rtol=0, atol=0.1)


def test_bad_inputs_leave_the_engine_usable(model: Pi05, scales: Scales) -> None:
    engine = planned(model, None)
    inputs = inputs_with(SETS[0], 20, 1)
    before, _ = engine.run(inputs, noise(1), STEPS)
    with pytest.raises(ValueError, match="planned for 10 Euler steps, got 11"):
        engine.run(inputs, noise(1), 11)
    after, _ = engine.run(inputs, noise(1), STEPS)
    assert torch.equal(before, after)
    wrong_steps = EngineConfig("triton", "fp8", (4,))
    with pytest.raises(ValueError, match="the scales are for 10 Euler steps"):
        make_engine(model, wrong_steps, device="cuda", scales=scales)
    with pytest.raises(ValueError, match="fp8 needs scales"):
        make_engine(model, EngineConfig("triton", "fp8"), device="cuda")


def test_pictures_are_resized_to_the_bits_of_pillow(model: Pi05) -> None:
    """Of other sizes than the model's, in turn, with cameras that are kept and absent."""
    engine, rng = planned(model, None), np.random.default_rng(0)
    size, cameras = NANO.image_size, ("a", "b", "c")
    shapes = [(480, 640), (480, 640), (size, size), (37, 90), (720, 1280)]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for chosen in ((0, 1, 2), (0, None, 3), (4, 1, 0), (2, 2, 2)):
        given = {n: images[i] for n, i in zip(cameras, chosen, strict=True) if i is not None}
        prepared, mask = prepare_images(given, cameras, size, "pil")
        came = pictures(given, cameras, size)
        inputs = inputs_with(mask[0].tolist(), 20, 1)
        expected, _ = engine.run(dataclasses.replace(inputs, images=prepared), noise(1), STEPS)
        actions, _ = engine.run(dataclasses.replace(inputs, images=came), noise(1), STEPS)
        assert torch.equal(actions, expected)
