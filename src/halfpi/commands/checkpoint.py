"""`halfpi inspect`, `halfpi convert` and `halfpi infer`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from halfpi import checkpoints
from halfpi.commands.console import notes, output, print_json
from halfpi.config import ProcessingConfig
from halfpi.policy import Policy, checkpoint_path, load_policy
from halfpi.types import Observation

if TYPE_CHECKING:
    from halfpi.cli import Convert, Infer, Inspect, Run, Source


def inspect(options: Inspect) -> None:
    """Print a checkpoint's summary."""
    summary = open_source(options).describe()
    if options.json:
        data = dataclasses.asdict(summary)
        print_json({key: str(v) if isinstance(v, Path) else v for key, v in data.items()})
        return
    total = sum(summary.parameters.values())
    output.print(f"[bold]{summary.path}[/]: {summary.format}, {summary.tensors} tensors")
    output.print(_table("parameters", {**summary.parameters, "all": total}))
    output.print(_table("stored dtypes", summary.dtypes))
    output.print(_table("architecture", dataclasses.asdict(summary.config)))
    output.print(_table("processing", _processing_rows(summary.processing)))
    output.print(f"tokenizer: {summary.tokenizer_path or 'none in the checkpoint'}")
    if summary.unused:
        output.print(f"stored but never used in inference: {', '.join(summary.unused)}")


def convert(options: Convert) -> None:
    """Convert a checkpoint into halfpi's format."""
    target = checkpoints.convert(
        open_source(options), options.target, dtype=options.dtype, overwrite=options.overwrite
    )
    notes.print(f"wrote {target}")


def infer(options: Infer) -> None:
    """Print the actions for one observation."""
    policy = policy_of(options)
    images = {camera: _read_image(file) for camera, file in _pairs(options.images)}
    state = np.array(options.state, np.float32)
    chunk = policy.infer(Observation(images, state, options.prompt))
    if options.json:
        print_json({"actions": chunk.actions.tolist(), **dataclasses.asdict(chunk.times)})
        return
    for action in chunk.actions:
        output.print(" ".join(f"{value:+.4f}" for value in action), soft_wrap=True, highlight=False)


def policy_of(options: Run) -> Policy:
    """The policy that a command's options ask for."""
    return load_policy(
        options.checkpoint,
        device=options.device,
        precision=options.precision,
        backend=options.backend,
        num_steps=options.num_steps,
        tokenizer=options.tokenizer,
        seed=options.seed,
        asset_id=options.asset_id,
        processing_overrides=_fields(options.processing),
        **_fields(options.model),
    )


def open_source(options: Source) -> checkpoints.Checkpoint:
    """The checkpoint that a command's options name, opened."""
    return checkpoints.open_checkpoint(
        checkpoint_path(options.checkpoint),
        asset_id=options.asset_id,
        processing_overrides=_fields(options.processing),
        **_fields(options.model),
    )


def _fields(texts: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE as a dictionary; a value is JSON, or else the text itself."""
    return {name: _value(text) for name, text in _pairs(texts)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, got {text!r}")
        pairs.append((name, value))
    return pairs


def _read_image(file: str) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's for a missing, foreign or damaged file
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def _processing_rows(processing: ProcessingConfig) -> dict[str, object]:
    rows = dataclasses.asdict(processing)
    for name in ("state_stats", "action_stats"):
        known = [key for key, values in (rows[name] or {}).items() if values is not None]
        rows[name] = ", ".join(known) or None
    return rows


def _table(title: str, rows: Mapping[str, object]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        table.add_row(name, f"{value:,}" if is_count else str(value))
    return table
