"""A stand-in for LeRobot's π0.5: its module tree and attributes, with the golden weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"


class FakePytorch(nn.Module):
    """PI05Pytorch, whose own sampler gives zeros."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        for name, tensor in load_file(GOLDEN / "lerobot_tiny_ckpt" / "model.safetensors").items():
            self._add(name.removeprefix("model."), tensor)
        paligemma: Any = self.get_submodule("paligemma_with_expert.paligemma")
        paligemma.config = SimpleNamespace(
            vision_config=SimpleNamespace(num_attention_heads=4),
            text_config=SimpleNamespace(num_key_value_heads=1),
        )

    def _add(self, name: str, tensor: Tensor) -> None:
        *parents, leaf = name.split(".")
        module: nn.Module = self
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(tensor))

    def sample_noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.normal(mean=0.0, std=1.0, size=shape, device=device)

    def sample_actions(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(2, 10, 32)


class FakePolicy(nn.Module):
    """PI05Policy."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        fields = {
            "type": "pi05",
            "dtype": "float32",
            "image_resolution": (28, 28),
            "image_features": dict.fromkeys(("base", "left", "right")),
            "chunk_size": 10,
            "tokenizer_max_length": 24,
            "min_period": 4e-3,
            "max_period": 4.0,
            "num_inference_steps": 10,
            "rtc_config": None,
            "use_peft": False,
        }
        self.config = SimpleNamespace(**{**fields, **changes})
        self.model = FakePytorch(self.config)
        self.eval()


def fake_rtc_config(**changes: Any) -> SimpleNamespace:
    """LeRobot's RTCConfig."""
    fields = {
        "enabled": True,
        "prefix_attention_schedule": SimpleNamespace(name="LINEAR"),
        "max_guidance_weight": 10.0,
        "execution_horizon": 10,
        "debug": False,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def lerobot_policy() -> FakePolicy:
    return FakePolicy()


@pytest.fixture
def make_policy() -> type[FakePolicy]:
    return FakePolicy


@pytest.fixture
def rtc_config() -> Callable[..., SimpleNamespace]:
    return fake_rtc_config
