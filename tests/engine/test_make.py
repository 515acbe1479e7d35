"""Which engine comes out, and what is refused before anything is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.conftest import inputs_with, noise, random_model

from halfpi.config import EngineConfig
from halfpi.engine import EagerEngine, make_engine


def test_eager_engines_take_the_precision() -> None:
    engine = make_engine(random_model(), EngineConfig("eager", "bf16"))
    assert isinstance(engine, EagerEngine)
    assert engine.model.dtype == torch.bfloat16


def test_the_compile_backend_compiles_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def fake_compile(stage: Any, **options: Any) -> Any:
        compiled.append(options)
        return stage

    monkeypatch.setattr(torch, "compile", fake_compile)
    model = random_model()
    engine = make_engine(model, EngineConfig("compile", "fp32"))
    assert len(compiled) == 3
    inputs = inputs_with([True, True], 5)
    expected, _ = EagerEngine(model).run(inputs, noise(), 2)
    assert torch.equal(engine.run(inputs, noise(), 2)[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of eager, compile, triton, got 'cuda'"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp8, got 'int8'"),
        ({"num_steps": ()}, "num_steps must hold numbers of at least 1"),
        ({"num_steps": (0,)}, "num_steps must hold numbers of at least 1"),
        ({"max_cameras": 0}, "max_cameras must be at least 1, got 0"),
    ],
)
def test_configurations_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig("triton", "bf16"), "backend triton needs a CUDA device, got cpu"),
        (EngineConfig("eager", "fp8"), "precision fp8 needs scales, got none"),
    ],
)
def test_what_cannot_run_is_refused(config: EngineConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(random_model(), config, device="cpu")
