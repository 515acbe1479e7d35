"""Guided real-time chunking against actions that LeRobot 0.6.1 computed, and its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfpi.checkpoints import load_model
from halfpi.model import Guidance, Pi05, PrefixCache
from halfpi.runtime.rtc import Schedule, prefix_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES: tuple[Schedule, ...] = ("zeros", "ones", "linear", "exp")
# LeRobot's inference_delay, execution_horizon and length of prev_chunk_left_over. In the last two
# the delay is as long as the horizon, and longer than what is left.
CASES = ((2, 6, 8), (0, 10, 10), (4, 4, 9), (9, 6, 3))


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pi05_tiny_golden.safetensors")


@pytest.fixture(scope="module")
def lerobot() -> dict[str, Tensor]:
    return load_file(GOLDEN / "rtc_lerobot.safetensors")


@pytest.fixture(scope="module")
def model() -> Pi05:
    """The model of both files, whose weights are also a checkpoint."""
    return load_model(GOLDEN / "lerobot_tiny_ckpt", vision_heads=4)


@pytest.fixture(scope="module")
def cache(model: Pi05, inputs: dict[str, Tensor]) -> PrefixCache:
    with torch.inference_mode():
        return model.prefill(
            model.vision(torch.stack([inputs[f"in.image{i}"] for i in range(3)], 1)),
            torch.stack([inputs[f"in.image_mask{i}"] for i in range(3)], 1),
            inputs["in.tokens"],
            inputs["in.token_mask"],
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_guided_actions_equal_lerobots(
    model: Pi05,
    cache: PrefixCache,
    inputs: dict[str, Tensor],
    lerobot: dict[str, Tensor],
    schedule: Schedule,
    case: tuple[int, int, int],
) -> None:
    delay, execution_horizon, left = case
    overlap = min(execution_horizon, left)
    target = torch.zeros(10, 32)  # LeRobot also pads the dimensions that its robot does not have
    target[:left, :7] = lerobot["in.previous"][:left]
    weights = prefix_weights(schedule, min(delay, overlap), overlap, 10)
    noise = inputs["in.noise"]
    with torch.inference_mode():
        guided = model.denoise(cache, noise, guidance=Guidance(target, weights))
        plain = model.denoise(cache, noise)
    expected = lerobot[f"out.{schedule}.{delay}.{execution_horizon}.{left}"]
    # 1e-6, and the rounding of an action of 5.
    torch.testing.assert_close(guided, expected, atol=1e-6, rtol=1e-7)
    # All but the case in which nothing is decided and nothing fades.
    assert torch.equal(guided, plain) == (schedule == "zeros" and delay == 0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("zeros", [1, 1, 0, 0, 0, 0]),
        ("ones", [1, 1, 1, 1, 0, 0]),
        ("linear", [1, 1, 2 / 3, 1 / 3, 0, 0]),
        ("exp", [1, 1, 0.367706, 0.076745, 0, 0]),
    ],
)
def test_weights_of_each_schedule(schedule: Schedule, expected: list[float]) -> None:
    torch.testing.assert_close(
        prefix_weights(schedule, 2, 4, 6), torch.tensor(expected).float(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_at_the_edges(schedule: Schedule) -> None:
    assert prefix_weights(schedule, 3, 3, 5).tolist() == [1, 1, 1, 0, 0]
    assert prefix_weights(schedule, 0, 0, 2).tolist() == [0, 0]
    assert prefix_weights(schedule, 4, 4, 4).tolist() == [1, 1, 1, 1]


def test_the_gain_is_bounded_at_both_ends() -> None:
    guidance = Guidance(torch.zeros(1, 1), torch.zeros(1), max_gain=5.0)
    assert guidance.gain(1.0) == 5.0
    assert guidance.gain(1e-9) == 5.0
    assert guidance.gain(0.5) == pytest.approx(2.0)


def test_guidance_pulls_only_where_there_is_weight(
    model: Pi05, cache: PrefixCache, inputs: dict[str, Tensor]
) -> None:
    noise, target = inputs["in.noise"], torch.full((10, 32), 7.0)
    free, some = torch.zeros(10), torch.tensor([1.0] * 4 + [0.0] * 6)
    with torch.inference_mode():
        plain = model.denoise(cache, noise, 1)
        unmoved = model.denoise(cache, noise, 1, guidance=Guidance(target, free))
        pulled = model.denoise(cache, noise, 1, guidance=Guidance(target, some, max_gain=1.0))
    torch.testing.assert_close(unmoved, plain)
    torch.testing.assert_close(pulled[:, :4], target.expand(2, 10, 32)[:, :4])
    torch.testing.assert_close(pulled[:, 4:], plain[:, 4:])
