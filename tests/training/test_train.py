"""Training resumes bit for bit, refuses other settings, and averages as documented."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import CONFIG

from halfpi.training.data import Batches
from halfpi.training.train import TrainConfig, Trainer, rate_factor

TRAIN = TrainConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    seed=5,
    noises_per_frame=2,
    warmup_steps=2,
    checkpoint_every=3,
)


def trainer_of(batches: Batches, **changes: Any) -> Trainer:
    return Trainer(CONFIG, dataclasses.replace(TRAIN, **changes), batches, {7: 300})


def assert_same_state(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_same_state(one, other)
    else:
        assert first == second


def test_a_resumed_training_equals_one_without_a_break(batches: Batches, tmp_path: Path) -> None:
    whole, begun, resumed = (trainer_of(batches) for _ in range(3))
    reports = [progress.step for progress in whole.train(tmp_path / "whole.pt")]
    assert reports == [3, 6]
    state = tmp_path / "state.pt"
    assert next(begun.train(state)).step == 3
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    resumed.resume(state)
    assert resumed.step == 3
    assert [progress.step for progress in resumed.train(state)] == [6]
    for part in ("model", "averaged", "head", "optimizer"):
        assert_same_state(whole._state()[part], resumed._state()[part])


def test_a_time_limit_stops_and_saves(batches: Batches, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    trainer = trainer_of(batches)
    assert [progress.step for progress in trainer.train(state, seconds=0)] == [1]
    resumed = trainer_of(batches)
    resumed.resume(state)
    assert resumed.step == 1


def test_other_settings_are_refused_by_name(batches: Batches, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    trainer_of(batches).save(state)
    trainer_of(batches, steps=50, checkpoint_every=7).resume(state)  # the schedule may grow
    with pytest.raises(ValueError, match=r"other settings.*'batch_size': \(4, 8\)"):
        trainer_of(batches, batch_size=8).resume(state)
    with pytest.raises(ValueError, match=r"'seed': \(5, 6\)"):
        trainer_of(batches, seed=6).resume(state)


@pytest.mark.parametrize("kind", ["missing", "text", "other"])
def test_a_foreign_file_is_named(batches: Batches, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    if kind == "text":
        path.write_text("hello")
    if kind == "other":
        torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"state\.pt is not a training checkpoint"):
        trainer_of(batches).resume(path)


def test_the_rate_warms_up_holds_and_cools_down() -> None:
    config = dataclasses.replace(TRAIN, steps=100, warmup_steps=10, cooldown_share=0.25)
    factors = [rate_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(factors[10:75]) == {1.0}
    assert factors[75:] == pytest.approx([(100 - step) / 25 for step in range(75, 100)])


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (5, 0.4), (10**6, 0.999)])
def test_the_average_forgets_faster_at_first(batches: Batches, step: int, decay: float) -> None:
    trainer = trainer_of(batches)
    before = copy.deepcopy(trainer.averaged)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    trainer.step = step
    trainer._update_average()
    models = trainer.averaged, before, trainer.model
    for now, old, new in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(now, decay * old + (1 - decay) * new)


def test_a_loss_that_is_not_finite_ends_training_and_keeps_what_was_saved(
    batches: Batches, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"
    trainer = trainer_of(batches)
    trainer.save(state)
    before = state.read_bytes()
    with torch.no_grad():
        trainer.model.action_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss became nan before step 3"):
        list(trainer.train(state))
    assert state.read_bytes() == before


def test_norms_and_biases_do_not_decay(batches: Batches) -> None:
    matrices, rest = trainer_of(batches)._optimizer.param_groups
    assert matrices["weight_decay"] == TRAIN.weight_decay
    assert rest["weight_decay"] == 0
    assert all(parameter.ndim <= 1 for parameter in rest["params"])
    assert all(parameter.ndim > 1 for parameter in matrices["params"])
