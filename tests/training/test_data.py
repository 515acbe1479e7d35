"""Batches follow from seed and step; augmentation keeps an image an image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tests.training.conftest import CONFIG

from halfpi.sim.tasks import TASKS
from halfpi.training.data import (
    LOCATED,
    PRECISE_WEIGHT,
    SHIFT_PIXELS,
    Batches,
    Demonstrations,
    _frame_chances,
    _standardise,
    augment,
)
from halfpi.training.loss import Batch


def assert_same(first: Batch, second: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, other), field.name


def test_a_step_is_the_same_wherever_training_began(batches: Batches) -> None:
    whole = list(batches.steps(0, 4, 6, seed=1))
    torch.rand(100)  # what else drew random numbers does not matter
    rest = list(batches.steps(2, 4, 6, seed=1))
    assert len(whole) == 4
    for one, other in zip(whole[2:], rest, strict=True):
        assert_same(one, other)


def test_steps_and_seeds_differ(batches: Batches) -> None:
    first, second = batches.steps(0, 2, 6, seed=1)
    (other,) = batches.steps(0, 1, 6, seed=2)
    assert not torch.equal(first.actions, second.actions)
    assert not torch.equal(first.actions, other.actions)
    assert not torch.equal(first.images, second.images)


def test_a_batch_is_what_the_model_reads(batches: Batches, demonstrations: Demonstrations) -> None:
    (batch,) = batches.steps(0, 1, 6, seed=0)
    assert batch.images.shape == (6, 2, 3, CONFIG.image_size, CONFIG.image_size)
    assert batch.images.abs().max() <= 1
    assert batch.image_mask.all()
    assert batch.tokens.shape == batch.token_mask.shape
    assert batch.token_mask[:, 0].all()
    assert batch.token_mask.any(0).all()  # no longer than the longest prompt
    assert batch.actions.shape == (6, CONFIG.horizon, 4)
    assert batch.auxiliary.shape == (6, len(LOCATED)) == (6, batches.located)
    stats = demonstrations.processing(CONFIG).action_stats
    assert stats is not None
    low, high = np.array(stats.q01), np.array(stats.q99)
    chunks = demonstrations.frames.chunks
    normalized = torch.tensor(2 * (chunks - low) / (high - low + 1e-6) - 1).float()
    for row in batch.actions:
        assert (normalized - row).abs().amax((1, 2)).min() < 1e-5


def test_statistics_are_quantiles_of_states_and_actions(demonstrations: Demonstrations) -> None:
    processing = demonstrations.processing(CONFIG)
    state, action = processing.state_stats, processing.action_stats
    assert state is not None
    assert action is not None
    states = demonstrations.frames.states.astype(np.float64)
    assert_allclose(np.array(state.q01), np.quantile(states, 0.01, axis=0))
    chunks = demonstrations.frames.chunks.reshape(-1, 4).astype(np.float64)
    assert_allclose(np.array(action.q99), np.quantile(chunks, 0.99, axis=0))


def test_tasks_are_drawn_evenly_and_precise_ones_more_often() -> None:
    names = list(TASKS)
    push, door = names.index("push"), names.index("door-open")
    chances = _frame_chances(np.array([push] * 3 + [door] * 7))
    assert chances.sum() == pytest.approx(1)
    assert chances[:3].sum() / chances[3:].sum() == pytest.approx(PRECISE_WEIGHT)
    assert len(set(chances[:3])) == len(set(chances[3:])) == 1


def test_demonstrations_know_the_task_of_every_frame(
    demonstrations: Demonstrations, tmp_path: Path
) -> None:
    frames = demonstrations.frames
    for name in ("push-000000", "assembly-000000", "push-000010"):
        frames.save(tmp_path / f"{name}.npz")
    loaded = Demonstrations.load(tmp_path)
    names = [list(TASKS)[task] for task in loaded.tasks]
    count = len(frames.states)
    assert names == ["assembly"] * count + ["push"] * 2 * count
    assert len(loaded.frames.states) == 3 * count


def test_augmentation_keeps_range_and_shape() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 2, 3, 28, 28) * 2 - 1
    changed = augment(images)
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert changed.abs().max() <= 1
    assert not torch.equal(changed, images)


def test_augmentation_shifts_by_two_pixels_at_most() -> None:
    torch.manual_seed(0)
    images = torch.full((64, 2, 3, 28, 28), -0.5)
    images[..., 14, 14] = 0.5  # stays the brightest under any change of light
    places = augment(images).mean(2).flatten(0, 1).flatten(1).argmax(1)
    rows, columns = places // 28 - 14, places % 28 - 14
    reach = set(range(-SHIFT_PIXELS, SHIFT_PIXELS + 1))
    assert set(rows.tolist()) == set(columns.tolist()) == reach
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) > 15  # each image its own


def test_targets_are_standardised_and_what_hardly_varies_stays_small() -> None:
    values = np.random.default_rng(0).normal(3, 2, (500, 2)).astype(np.float32)
    values[:, 1] = 0.1 + 1e-5 * values[:, 1]
    result = _standardise(values)
    assert_allclose(result[:, 0].mean(), 0, atol=1e-5)
    assert_allclose(result[:, 0].std(), 1, atol=1e-5)
    assert np.abs(result[:, 1]).max() < 0.1
