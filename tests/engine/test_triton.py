"""The planned engine against the eager one, on a CPU: its kernels run in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so this file runs itself in a second
process. It has no bfloat16 products, so the engine works in fp32 here.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import TINY
from tests.engine.conftest import inputs_with, noise, random_model
from torch import Tensor

from halfpi.config import EngineConfig
from halfpi.engine import EagerEngine, Engine
from halfpi.model import Guidance
from halfpi.processing.images import pictures, prepare_images
from halfpi.processing.pipeline import DeferredInputs, ModelInputs

pytest.importorskip("triton", reason="Triton is not installed")

CPU = torch.device("cpu")
TOLERANCE = 2e-4


def share_few_keys(patch: pytest.MonkeyPatch) -> None:
    """Attention in two splits, 16 keys a step.

    By default 15 of 16 splits would have none of these few keys, and be interpreted all the same.
    """
    from halfpi.engine import launches
    from halfpi.kernels.tuned import best

    def best_of_few_keys(kernel: str, *case: Any) -> Any:
        launch = best(kernel, *case)
        if kernel == "attention":
            launch = dataclasses.replace(launch, block_n=16, splits=2)
        return launch

    patch.setattr(launches, "best", best_of_few_keys)


def check_calls() -> None:
    """One engine through prompts, camera sets, given actions, guidance and kept parts."""
    from halfpi.engine.triton import TritonEngine

    model = random_model()
    config = EngineConfig("triton", "fp32", (1, 2), max_cameras=2, max_prompt_tokens=12)
    engine, eager = TritonEngine(model, config, CPU), EagerEngine(model)
    guidance = Guidance(noise(5), torch.linspace(1, 0, TINY.horizon))
    traced = Guidance(noise(6).requires_grad_(), guidance.weights)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (inputs_with([True, True], 7), {}),
        (inputs_with([False, True], 12, seed=1), {"given": noise(2)[:3]}),
        (inputs_with([True, False], 1, seed=2), {"guidance": guidance}),
        (None, {"guidance": traced}),
        (inputs_with([True, True], 5, seed=4), {"kept": [0]}),
        (inputs_with([False, True], 5, seed=4), {"kept": [1]}),
        (inputs_with([True, True], 5, seed=6, uint8=True), {"kept": [1]}),
        (None, {}),
    ]
    given_away = []
    for number, (inputs, options) in enumerate(calls):
        steps = 2 if options else 1
        ours, _ = engine.run(inputs, partial(noise, number), steps, **options)
        theirs, _ = eager.run(inputs, noise(number), steps, **options)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
        given_away.append((ours, ours.clone()))
    for actions, then in given_away:  # later calls have not written to them
        assert torch.equal(actions, then)
    check_pictures(engine)
    check_refusals(engine)


def check_pictures(engine: Engine) -> None:
    """Images as they came give the bits of those that were resized before."""
    size, generator = TINY.image_size, np.random.default_rng(0)
    shapes = [(size, size), (40, 30), (9, 21), (30, 40)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for first, second in ((1, 3), (2, 0), (None, 1)):  # the last size was forgotten meanwhile
        pair = {n: images[i] for n, i in zip("ab", (first, second), strict=True) if i is not None}
        prepared, mask = prepare_images(pair, ("a", "b"), size, "pil")
        came = pictures(pair, ("a", "b"), size)
        inputs = inputs_with(mask[0].tolist(), 7)
        run = partial(engine.run, noise=noise(), num_steps=1)
        expected, _ = run(dataclasses.replace(inputs, images=prepared))
        actions, _ = run(dataclasses.replace(inputs, images=came))
        assert torch.equal(actions, expected)


def check_refusals(engine: object) -> None:
    """Each mistake is one error, and the engine works afterwards as before."""
    run = engine.run  # type: ignore[attr-defined]
    before, _ = run(inputs_with([True, True], 7), noise(), 1)
    good = inputs_with([True, True], 7)
    three = dataclasses.replace(
        good, images=good.prepared.repeat(1, 2, 1, 1, 1), image_mask=torch.ones(1, 4).bool()
    )
    long = torch.zeros(1, 13, dtype=torch.int64)
    grey = np.zeros((8, 8), np.uint8)
    mistakes: list[tuple[ModelInputs, int, dict[str, Any], str]] = [
        (good, 5, {}, "planned for 1, 2 Euler steps, got 5"),
        (three, 2, {}, "planned for 2 cameras, got 4"),
        (dataclasses.replace(good, tokens=long, token_mask=long == 0), 2, {}, "12 prompt tokens"),
        (dataclasses.replace(good, images=good.prepared.double()), 2, {}, "got torch.float64"),
        (dataclasses.replace(good, images=(None, grey)), 2, {}, r"uint8 \(height, width, 3\)"),
        (dataclasses.replace(good, tokens=good.tokens + 1000), 2, {}, r"tokens must be in \[0"),
    ]
    for inputs, steps, options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            run(inputs, noise(), steps, **options)
    with pytest.raises(ValueError, match=r"noise must have shape \(7, 6\), got \(6, 6\)"):
        run(good, noise()[1:], 2)
    with pytest.raises(ValueError, match=r"given must have shape \(0 to 7, 6\), got \(3, 5\)"):
        run(good, noise(), 2, noise()[:3, :5])
    engine.forget()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no prefix to keep"):
        run(None, noise(), 2)
    with pytest.raises(ValueError, match="camera 1 has no image tokens to keep"):
        run(good, noise(), 2, kept=[1])
    after, _ = run(good, noise(), 1)
    assert torch.equal(before, after)

    def unreadable() -> tuple[Tensor, Tensor]:
        raise ValueError("no such prompt")

    # The cameras that such a call began to encode are nothing to keep.
    with pytest.raises(ValueError, match="no such prompt"):
        run(DeferredInputs(good.images, lambda: good.image_mask, unreadable), noise(), 2)
    with pytest.raises(ValueError, match="camera 1 has no image tokens to keep"):
        run(good, noise(), 2, kept=[1])
    read = DeferredInputs(
        good.images, lambda: good.image_mask, lambda: (good.tokens, good.token_mask)
    )
    assert torch.equal(before, run(read, noise(), 1)[0])


def test_the_planned_engine_equals_the_eager_one() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_triton"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


def remember_one_size(patch: pytest.MonkeyPatch) -> None:
    """Of images that are resized."""
    from halfpi.engine import images

    patch.setattr(images, "_SIZES", 1)


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()  # for good: this process does nothing else
    share_few_keys(patch)
    remember_one_size(patch)
    check_calls()
