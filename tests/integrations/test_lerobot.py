"""The swapped sampler, on a stand-in for LeRobot's policy, against what LeRobot 0.6.1 computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfpi import accelerate, restore
from halfpi.checkpoints import CheckpointError

if TYPE_CHECKING:
    from tests.integrations.conftest import FakePolicy

GOLDEN = Path(__file__).parents[1] / "golden"
RtcConfig = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pi05_tiny_golden.safetensors")


@pytest.fixture
def call(golden: dict[str, Tensor]) -> dict[str, Any]:
    """What LeRobot's policy passes to its sampler."""
    return {
        "images": [golden[f"in.image{camera}"] for camera in range(3)],
        "img_masks": [golden[f"in.image_mask{camera}"] for camera in range(3)],
        "tokens": golden["in.tokens"],
        "masks": golden["in.token_mask"],
        "noise": golden["in.noise"],
    }


def test_actions_are_lerobots(
    lerobot_policy: FakePolicy, golden: dict[str, Tensor], call: dict[str, Any]
) -> None:
    assert accelerate(lerobot_policy) is lerobot_policy
    actions = lerobot_policy.model.sample_actions(**call)
    torch.testing.assert_close(actions, golden["out.actions"], atol=1e-5, rtol=0)
    assert not actions.is_inference()
    half = accelerate(lerobot_policy, precision="bf16").model.sample_actions(**call)
    assert 1e-4 < (half - golden["out.actions"]).abs().max() < 0.1


def test_weights_are_shared_and_stay_the_policys(lerobot_policy: FakePolicy) -> None:
    before = {name: tensor.clone() for name, tensor in lerobot_policy.state_dict().items()}
    accelerate(lerobot_policy)
    engine = vars(lerobot_policy.model)["sample_actions"]._engine
    weight = lerobot_policy.model.get_parameter("action_in_proj.weight")
    assert engine.model.action_in.weight.data_ptr() == weight.data_ptr()
    after = lerobot_policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_steps_and_noise_are_the_callers_or_the_policys(
    lerobot_policy: FakePolicy, call: dict[str, Any]
) -> None:
    sample = accelerate(lerobot_policy).model.sample_actions
    ten, one = sample(**call), sample(**call, num_steps=1)
    fixed = accelerate(lerobot_policy, num_steps=1).model.sample_actions
    assert torch.equal(fixed(**call), one)
    assert torch.equal(fixed(**call, num_steps=10), ten)
    several = accelerate(lerobot_policy, num_steps=(1, 10)).model.sample_actions
    assert torch.equal(several(**call), one)
    assert not torch.allclose(one, ten, atol=1e-2)
    torch.manual_seed(3)
    drawn = sample(**{**call, "noise": None})
    torch.manual_seed(3)
    noise = lerobot_policy.model.sample_noise((2, 10, 32), torch.device("cpu"))
    assert torch.equal(drawn, sample(**{**call, "noise": noise}))


@pytest.mark.parametrize("schedule", ["ZEROS", "ONES", "LINEAR", "EXP"])
@pytest.mark.parametrize("case", [(2, 6, 8), (0, 10, 10), (4, 4, 9), (9, 6, 3)], ids=str)
def test_guided_actions_are_lerobots(
    lerobot_policy: FakePolicy,
    call: dict[str, Any],
    rtc_config: RtcConfig,
    schedule: str,
    case: tuple[int, int, int],
) -> None:
    delay, execution_horizon, left = case
    stored = load_file(GOLDEN / "rtc_lerobot.safetensors")
    sample = accelerate(lerobot_policy).model.sample_actions
    lerobot_policy.config.rtc_config = rtc_config(
        prefix_attention_schedule=SimpleNamespace(name=schedule)
    )
    previous = stored["in.previous"][:left]
    options = {"inference_delay": delay, "execution_horizon": execution_horizon}
    guided = sample(**call, **options, prev_chunk_left_over=previous)
    expected = stored[f"out.{schedule.lower()}.{delay}.{execution_horizon}.{left}"]
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=0)
    batched = sample(**call, **options, prev_chunk_left_over=previous.expand(2, -1, -1))
    assert torch.equal(batched, guided)


def test_no_guidance_without_a_plan_or_with_rtc_off(
    lerobot_policy: FakePolicy, call: dict[str, Any], rtc_config: RtcConfig
) -> None:
    sample = accelerate(lerobot_policy).model.sample_actions
    plain = sample(**call)
    previous = torch.ones(4, 7)
    assert torch.equal(sample(**call, inference_delay=1, prev_chunk_left_over=previous), plain)
    lerobot_policy.config.rtc_config = rtc_config(enabled=False)
    assert torch.equal(sample(**call, inference_delay=1, prev_chunk_left_over=previous), plain)
    lerobot_policy.config.rtc_config = rtc_config()
    assert torch.equal(sample(**call, inference_delay=1, prev_chunk_left_over=None), plain)


def test_restore_gives_the_own_sampler_back(
    lerobot_policy: FakePolicy, call: dict[str, Any]
) -> None:
    accelerate(accelerate(lerobot_policy))
    assert lerobot_policy.model.sample_actions(**call).any()
    assert restore(restore(lerobot_policy)) is lerobot_policy
    assert not lerobot_policy.model.sample_actions(**call).any()
    module: Any = lerobot_policy.model
    module.sample_actions = compiled = object()  # LeRobot puts it there when it compiles
    accelerate(lerobot_policy)
    restore(lerobot_policy)
    assert module.sample_actions is compiled


def test_changed_weights_are_noticed(lerobot_policy: FakePolicy, call: dict[str, Any]) -> None:
    model = accelerate(lerobot_policy).model
    expected = model.sample_actions(**call)
    lerobot_policy.to("cpu").eval()  # changes nothing
    assert torch.equal(model.sample_actions(**call), expected)
    lerobot_policy.load_state_dict(lerobot_policy.state_dict())
    with pytest.raises(ValueError, match=r"call halfpi\.accelerate\(policy\) again"):
        model.sample_actions(**call)
    assert torch.equal(accelerate(lerobot_policy).model.sample_actions(**call), expected)
    lerobot_policy.to(torch.bfloat16)
    with pytest.raises(ValueError, match="changed or moved"):
        model.sample_actions(**call)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"type": "pi0"}, {}, "must be LeRobot's of type 'pi05', got 'pi0'"),
        ({"use_peft": True}, {}, "use_peft set"),
        ({"use_visual_memory": True}, {}, "use_visual_memory set"),
        ({"image_resolution": (56, 56)}, {}, "image_size=56 contradicts"),
        ({}, {"precision": "fp8"}, "precision must be one of fp32, bf16, got 'fp8'"),
        ({}, {"backend": "jit"}, "backend must be one of eager, compile, triton, got 'jit'"),
        ({}, {"backend": "triton"}, "backend triton needs a CUDA device"),
        ({}, {"num_steps": 0}, "num_steps must hold numbers of at least 1"),
    ],
)
def test_policies_that_are_refused(
    make_policy: type[FakePolicy], changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    policy = make_policy(**changes)
    with pytest.raises(ValueError, match=message):
        accelerate(policy, **options)
    assert "sample_actions" not in vars(policy.model)


def test_what_is_no_evaluated_pi05_is_refused(lerobot_policy: FakePolicy) -> None:
    with pytest.raises(ValueError, match="of type 'pi05', got 'Linear'"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="training mode"):
        accelerate(lerobot_policy.train())
    del lerobot_policy.model.time_mlp_out
    with pytest.raises(CheckpointError, match=r"FakePytorch does not .*time_mlp_out\.weight"):
        accelerate(lerobot_policy.eval())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.zeros(2, 9, 32)}, r"noise must have shape \(2, 10, 32\), got \(2, 9, 32"),
        ({"num_steps": -1}, "num_steps must be an int of at least 1, got -1"),
        ({"masks": torch.arange(24).expand(2, 24) > 3}, "padded on the right"),
        ({"tokens": torch.full((2, 24), 512)}, r"tokens must be in \[0, 512\), got 512"),
        ({"inference_delay": None}, "inference_delay must be an int of at least 0, got None"),
        ({"prev_chunk_left_over": torch.ones(11, 7)}, r"at most \(10, 32\), got \(11, 7\)"),
    ],
)
def test_bad_calls(
    lerobot_policy: FakePolicy,
    call: dict[str, Any],
    rtc_config: RtcConfig,
    changes: dict[str, Any],
    message: str,
) -> None:
    lerobot_policy.config.rtc_config = rtc_config()
    plan = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(4, 7)}
    with pytest.raises(ValueError, match=message):
        accelerate(lerobot_policy).model.sample_actions(**{**call, **plan, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mode": "trained"}, "mode must be 'guided', got 'trained'"), ({"debug": True}, "debug")],
)
def test_rtc_that_is_refused(
    lerobot_policy: FakePolicy,
    call: dict[str, Any],
    rtc_config: RtcConfig,
    changes: dict[str, Any],
    message: str,
) -> None:
    lerobot_policy.config.rtc_config = rtc_config(**changes)
    accelerate(lerobot_policy)
    with pytest.raises(ValueError, match=message):
        lerobot_policy.model.sample_actions(
            **call, inference_delay=1, prev_chunk_left_over=torch.ones(4, 7)
        )
