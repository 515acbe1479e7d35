"""The format of our own: a directory with model.safetensors, halfpi.json and maybe a tokenizer.

model.safetensors holds exactly the tensors of `Pi05.state_dict()`; halfpi.json the format's
version, the `Pi05Config` and the `ProcessingConfig` with the normalisation statistics.
"""

from __future__ import annotations

import json
from pathlib import Path

from halfpi.checkpoints.contents import Contents, by_canonical_name, file_tensors
from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.json_files import member, read_json
from halfpi.config import (
    Pi05Config,
    ProcessingConfig,
    pi05_from_json,
    processing_from_json,
    to_json,
)

WEIGHTS, METADATA = "model.safetensors", "halfpi.json"
_VERSION = 1


def write_metadata(root: Path, config: Pi05Config, processing: ProcessingConfig) -> None:
    """Write halfpi.json into the directory `root`."""
    data = {"version": _VERSION, "model": to_json(config), "processing": to_json(processing)}
    (root / METADATA).write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_halfpi(root: Path) -> Contents:
    """The checkpoint in the directory `root`.

    Raises CheckpointError for another version, and for fields that the configurations do not have.
    """
    where = root / METADATA
    data = read_json(where)
    version = member(data, "version", int, where)
    if version != _VERSION:
        raise CheckpointError(f"{where} is of version {version}; this halfpi reads {_VERSION}")
    try:
        config = pi05_from_json(member(data, "model", dict, where))
        processing = processing_from_json(member(data, "processing", dict, where))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    shared = {name: getattr(config, name) for name in ("image_size", "max_prompt_tokens")}
    fields = vars(processing)
    for name, value in shared.items():
        if fields[name] != value:
            raise CheckpointError(
                f"{where}: {name} is {value} in model, {fields[name]} in processing"
            )
    weights = root / WEIGHTS
    tensors, unknown = by_canonical_name(file_tensors(weights), lambda name: name, weights)
    return Contents(
        format="halfpi",
        root=root,
        tensors=tensors,
        unknown=unknown,
        stated=vars(config),
        processing={name: value for name, value in fields.items() if name not in shared},
    )
