"""A handful of synthetic demonstrations and a model that is trained on them in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY

from halfpi.config import Pi05Config
from halfpi.processing.tokenizer import Tokenizer, load_tokenizer
from halfpi.sim.record import Frames
from halfpi.sim.tasks import TASKS
from halfpi.training.data import Batches, Demonstrations
from halfpi.training.tokenizer import train_tokenizer

CONFIG: Pi05Config = dataclasses.replace(TINY, action_dim=4, vocab_size=832, max_prompt_tokens=64)


@pytest.fixture(scope="session")
def demonstrations() -> Demonstrations:
    """Five random frames of each of three tasks, one of them precise."""
    count, generator = 15, np.random.default_rng(0)
    frames = Frames(
        images=generator.integers(0, 256, (count, 2, 28, 28, 3), np.uint8),
        states=generator.normal(size=(count, 4)).astype(np.float32),
        chunks=generator.uniform(-1, 1, (count, CONFIG.horizon, 4)).astype(np.float32),
        full_states=generator.normal(size=(count, 39)).astype(np.float32),
        episodes=np.arange(count),
    )
    names = list(TASKS)
    tasks = [names.index(name) for name in ("push", "door-open", "window-close")]
    return Demonstrations(frames, np.repeat(tasks, 5))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    sentences = (sentence for task in TASKS.values() for sentence in task.sentences)
    train_tokenizer(sentences, CONFIG.vocab_size).save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def batches(demonstrations: Demonstrations, tokenizer: Tokenizer) -> Batches:
    processing = demonstrations.processing(CONFIG)
    return Batches(demonstrations, processing, tokenizer, torch.device("cpu"))
