"""`halfpi.accelerate` on the real LeRobot: the same actions, by every way of asking for them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import supports_rtc_inference

import halfpi

MakePi05 = Callable[..., Any]
NOISE = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batch(observation: dict[str, Any], pi05_processors: tuple[Any, Any]) -> dict[str, Any]:
    return pi05_processors[0](observation)


def test_chunks(make_pi05: MakePi05, batch: dict[str, Any]) -> None:
    policy = make_pi05()
    expected = policy.predict_action_chunk(batch, noise=NOISE)
    assert expected.std() > 0.5
    halfpi.accelerate(policy)
    actual = policy.predict_action_chunk(batch, noise=NOISE)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not torch.equal(actual, expected)  # somebody else computed it
    assert torch.equal(halfpi.restore(policy).predict_action_chunk(batch, noise=NOISE), expected)


def test_single_actions_with_the_same_seed(make_pi05: MakePi05, batch: dict[str, Any]) -> None:
    def episode(policy: Any) -> torch.Tensor:
        policy.reset()
        torch.manual_seed(7)
        return torch.stack([policy.select_action(batch) for _ in range(14)])  # two calls

    policy = make_pi05()
    expected = episode(policy)
    torch.testing.assert_close(episode(halfpi.accelerate(policy)), expected, atol=1e-5, rtol=0)


def test_bfloat16(make_pi05: MakePi05, batch: dict[str, Any]) -> None:
    policy = make_pi05(dtype="bfloat16")
    theirs = policy.predict_action_chunk(batch, noise=NOISE)
    exact = make_pi05().predict_action_chunk(batch, noise=NOISE)
    ours = halfpi.accelerate(policy).predict_action_chunk(batch, noise=NOISE)
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() < 0.05
    assert (ours - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("schedule", RTCAttentionSchedule)
def test_real_time_chunking(
    make_pi05: MakePi05, batch: dict[str, Any], schedule: RTCAttentionSchedule
) -> None:
    policy = make_pi05(rtc_config=RTCConfig(prefix_attention_schedule=schedule))
    rest = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    options = {"noise": NOISE, "inference_delay": 2, "prev_chunk_left_over": rest}
    expected = policy.predict_action_chunk(batch, **options)
    plain = policy.predict_action_chunk(batch, noise=NOISE)
    halfpi.accelerate(policy)
    assert supports_rtc_inference(policy)
    actual = policy.predict_action_chunk(batch, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - plain).abs().max() > 0.1


def test_saving_is_unchanged(make_pi05: MakePi05, tmp_path: Path) -> None:
    policy = make_pi05()
    policy.save_pretrained(tmp_path / "before")
    halfpi.accelerate(policy).save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_the_async_server(
    make_pi05: MakePi05,
    pi05_processors: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # it opens a log file in the working directory when it is imported
    from lerobot.async_inference import policy_server

    class AcceleratedServer(policy_server.PolicyServer):
        """As in docs/integrations.md."""

        def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
            reply = super().SendPolicyInstructions(request, context)
            halfpi.accelerate(self.policy.eval())
            return reply

    loaded = SimpleNamespace(from_pretrained=lambda _: make_pi05())
    monkeypatch.setattr(policy_server, "get_policy_class", lambda _: loaded)
    monkeypatch.setattr(policy_server, "make_pre_post_processors", lambda *_, **__: pi05_processors)
    joints = [f"joint_{index}.pos" for index in range(8)]
    camera = {"dtype": "image", "shape": (28, 28, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": joints},
        "observation.images.base_0_rgb": camera,
    }
    seen = {
        **dict.fromkeys(joints, 0.25),
        "base_0_rgb": torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8).numpy(),
        "task": "pick up the block",
    }
    instructions = RemotePolicyConfig("pi05", "anywhere", features, 10, "cpu")

    def answer(kind: type[policy_server.PolicyServer]) -> torch.Tensor:
        server, context = kind(PolicyServerConfig()), SimpleNamespace(peer=lambda: "robot")
        server.Ready(None, context)
        server.SendPolicyInstructions(SimpleNamespace(data=pickle.dumps(instructions)), context)
        server._enqueue_observation(TimedObservation(0.0, 0, seen, must_go=True))
        torch.manual_seed(11)
        reply = server.GetActions(None, context)
        return torch.stack([action.get_action() for action in pickle.loads(reply.data)])

    expected = answer(policy_server.PolicyServer)
    assert expected.shape == (10, 7)
    torch.testing.assert_close(answer(AcceleratedServer), expected, atol=1e-4, rtol=0)


def test_from_another_thread(make_pi05: MakePi05, batch: dict[str, Any]) -> None:
    policy = halfpi.accelerate(make_pi05())
    expected = policy.predict_action_chunk(batch, noise=NOISE)
    chunks: list[torch.Tensor] = []

    def infer() -> None:
        chunks.append(policy.predict_action_chunk(batch, noise=NOISE))

    thread = threading.Thread(target=infer)
    thread.start()
    thread.join()
    assert torch.equal(chunks[0], expected)
