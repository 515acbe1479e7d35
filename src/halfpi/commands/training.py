"""`halfpi record` and `halfpi train`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halfpi.checkpoints import Checkpoint, load_model, open_checkpoint, save_model
from halfpi.commands.console import notes, track
from halfpi.config import PRESETS, ProcessingConfig, processing_from_json, to_json
from halfpi.files import atomic_write
from halfpi.policy import checkpoint_path, default_device
from halfpi.processing.tokenizer import load_tokenizer
from halfpi.sim.record import EPISODES_PER_SHARD, RecordConfig
from halfpi.sim.record import record as record_all
from halfpi.sim.tasks import FULFILLED_AT_START, TASKS, select
from halfpi.training.data import Batches, Demonstrations
from halfpi.training.tokenizer import number_tokens, train_tokenizer
from halfpi.training.train import TrainConfig, Trainer

if TYPE_CHECKING:
    from halfpi.cli import Record, Train


def record(options: Record) -> None:
    """Record demonstrations, and say how many there are."""
    tasks = select(options.tasks)
    config = RecordConfig(PRESETS["nano"].image_size, PRESETS["nano"].horizon)
    shards = record_all(tasks, options.episodes, options.output, config, options.workers)
    scenes = len(tasks) + sum(task.name in FULFILLED_AT_START for task in tasks)
    total = scenes * math.ceil(options.episodes / EPISODES_PER_SHARD)
    made = list(track(shards, "shards", total))
    solved, frames = (
        (sum(counts) for counts in zip(*(m[1:] for m in made), strict=True)) if made else (0, 0)
    )
    notes.print(f"recorded {solved} demonstrations, {frames} frames, in {len(made)} new shards")


def train(options: Train) -> None:
    """Train, resuming what is there; write the checkpoint when the last step is done."""
    config = PRESETS["nano"]
    data = Demonstrations.load(options.recordings)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = options.output / "tokenizer.json"
    vocabulary = train_tokenizer(
        (s for t in TASKS.values() for s in t.sentences), config.vocab_size
    )
    vocabulary.save(str(tokenizer), pretty=False)
    source = None if options.start is None else open_checkpoint(checkpoint_path(options.start))
    config = config if source is None else source.config
    processing = _processing(options.output / "processing.json", data, source)
    device = torch.device(options.device or default_device())
    batches = Batches(data, processing, load_tokenizer(tokenizer), device)
    start = None if source is None else load_model(source)
    trainer = Trainer(config, _train_config(options), batches, number_tokens(vocabulary), start)
    state = options.output / "state.pt"
    if state.exists():
        trainer.resume(state)
        notes.print(f"resuming at step {trainer.step}")
    seconds = None if options.minutes is None else options.minutes * 60
    for progress in trainer.train(state, seconds):
        notes.print(
            f"step {progress.step}/{options.steps}  flow {progress.flow_loss:.4f}  "
            f"auxiliary {progress.auxiliary_loss:.4f}  {progress.steps_per_second:.1f} steps/s"
        )
    if trainer.step < options.steps:
        notes.print(f"stopped at step {trainer.step}; run the command again to go on")
    target = options.output / "policy"
    save_model(trainer.averaged, processing, target, tokenizer=tokenizer, overwrite=target.exists())
    notes.print(f"wrote {target}")


def _processing(path: Path, data: Demonstrations, source: Checkpoint | None) -> ProcessingConfig:
    """The processing of the first run: recordings may grow, a model knows one set of statistics."""
    if path.exists():
        return processing_from_json(json.loads(path.read_text()))
    processing = data.processing(PRESETS["nano"]) if source is None else source.processing
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(to_json(processing)))
    return processing


def _train_config(options: Train) -> TrainConfig:
    return TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
