"""The engine gives what the model gives, and leaves out what is masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import TINY
from tests.engine.conftest import inputs_with, noise

from halfpi.engine import EagerEngine
from halfpi.model import Pi05
from halfpi.processing.pipeline import ModelInputs


@pytest.fixture
def model(random_pi05: Callable[..., Pi05]) -> Pi05:
    return random_pi05()


@pytest.mark.parametrize("cameras", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("decided", [0, 3])
def test_the_engine_equals_the_model_on_padded_inputs(
    model: Pi05, cameras: list[bool], decided: int
) -> None:
    inputs = inputs_with(cameras, length=7)
    given = noise(2)[:decided] if decided else None
    actions, times = EagerEngine(model).run(inputs, noise(), 3, given)
    expected = model.sample_actions(
        inputs.prepared,
        inputs.image_mask,
        inputs.tokens,
        inputs.token_mask,
        noise()[None],
        3,
        None if given is None else given[None],
    )[0]
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)
    assert min(times.vision_ms, times.prefill_ms, times.denoise_ms) > 0
    assert times.processing_ms == 0


def test_what_is_masked_changes_nothing(model: Pi05) -> None:
    inputs = inputs_with([True, False], length=7)
    other = inputs_with([True, False], length=7, seed=5)
    images, tokens = inputs.prepared.clone(), inputs.tokens.clone()
    images[:, 1], tokens[:, 7:] = other.prepared[:, 1], other.tokens[:, 7:]
    changed = ModelInputs(images, inputs.image_mask, tokens, inputs.token_mask)
    engine = EagerEngine(model)
    assert torch.equal(engine.run(inputs, noise(), 2)[0], engine.run(changed, noise(), 2)[0])


def test_actions_are_free_of_gradients_and_of_the_calls_before(model: Pi05) -> None:
    engine, inputs = EagerEngine(model), inputs_with([True, True], 9)
    first, _ = engine.run(inputs, noise(), 2)
    engine.run(inputs_with([False, True], 4, seed=3), noise(4), 1)
    again, _ = engine.run(inputs, noise(), 2)
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert (first.shape, first.dtype) == ((TINY.horizon, TINY.action_dim), torch.float32)


def test_a_kept_prefix_skips_vision_and_prefill(model: Pi05) -> None:
    engine, inputs = EagerEngine(model), inputs_with([True, True], 9)
    engine.run(inputs, noise(), 2)
    kept, times = engine.run(None, noise(4), 2)
    assert (times.vision_ms, times.prefill_ms) == (0, 0)
    assert torch.equal(kept, EagerEngine(model).run(inputs, noise(4), 2)[0])


def test_there_must_be_something_to_keep(model: Pi05) -> None:
    engine, inputs = EagerEngine(model), inputs_with([True, True], 9)
    with pytest.raises(ValueError, match="no prefix to keep"):
        engine.run(None, noise(), 2)
    with pytest.raises(ValueError, match="camera 1 has no image tokens to keep"):
        engine.run(inputs, noise(), 2, kept=[1])
    engine.run(inputs, noise(), 2)
    engine.forget()
    with pytest.raises(ValueError, match="no prefix to keep"):
        engine.run(None, noise(), 2)
