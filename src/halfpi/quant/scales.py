"""The scales of FP8 hybrid precision, and the file beside a checkpoint that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfpi.checkpoints import Checkpoint, CheckpointError
from halfpi.checkpoints.errors import listing
from halfpi.checkpoints.json_files import member, read_json
from halfpi.config import Pi05Config
from halfpi.files import atomic_write
from halfpi.quant.sites import Site, quantised_sites

SCALES = "fp8_scales.json"
_VERSION = 1
# Kernels finish GELU in half precision, which does not hold the reciprocal of a smaller one. Inputs
# that would do with less lose nothing, because E4M3 is as precise far below its largest value.
SMALLEST_INPUT_SCALE = 2.0**-15


@dataclass(frozen=True)
class SiteScales:
    """The scales of one site: of its packed weight, and of its input, one a denoising step.

    Outside the expert the input has one scale. No input's is below `SMALLEST_INPUT_SCALE`.
    """

    weight: float
    input: tuple[float, ...]


@dataclass(frozen=True)
class Scales:
    """The scales of all sites of a model, for a schedule of `num_steps`, and how they came about.

    frames, percentile: see `calibrate`. sites: by name, as in `quantised_sites`.
    """

    num_steps: int
    frames: int
    percentile: float
    sites: Mapping[str, SiteScales]

    def check(self, config: Pi05Config) -> None:
        """Raise ValueError unless these are scales of exactly the sites of `config`."""
        expected = {site.name: site for site in quantised_sites(config)}
        problems = {
            "missing": [name for name in expected if name not in self.sites],
            "unexpected": [name for name in self.sites if name not in expected],
            "wrong": [
                name
                for name, site in expected.items()
                if name in self.sites and not self._fits(site)
            ],
        }
        found = [f"{problem}: {listing(names)}" for problem, names in problems.items() if names]
        if found:
            raise ValueError(
                f"scales do not fit the model (positive, {self.num_steps} a site of the expert, "
                f"one elsewhere, inputs' at least {SMALLEST_INPUT_SCALE:.3g}): {'; '.join(found)}"
            )

    def _fits(self, site: Site) -> bool:
        scales = self.sites[site.name]
        count = self.num_steps if site.per_step else 1
        return (
            len(scales.input) == count > 0
            and 0 < scales.weight < math.inf
            and all(SMALLEST_INPUT_SCALE <= value < math.inf for value in scales.input)
        )


def save_scales(scales: Scales, checkpoint: Checkpoint) -> Path:
    """Write `scales` into the directory of `checkpoint`, bound to its weights; return the file.

    Reads all weights once. Raises ValueError when the scales are of another model, CheckpointError
    when the file cannot be written.
    """
    scales.check(checkpoint.config)
    data = {"version": _VERSION, "weights": weights_hash(checkpoint), **asdict(scales)}
    path, text = checkpoint.path / SCALES, json.dumps(data, allow_nan=False)
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def load_scales(checkpoint: Checkpoint) -> Scales:
    """The scales beside `checkpoint`.

    Reads all weights once, to compare their hash. Raises CheckpointError when there are none, when
    they belong to other weights, and when the file is damaged.
    """
    path = checkpoint.path / SCALES
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.path} has no {SCALES}, which fp8 needs; `halfpi calibrate` writes it"
        )
    data = read_json(path)
    version = member(data, "version", int, path)
    if version != _VERSION:
        raise CheckpointError(f"{path} is of version {version}; this halfpi reads {_VERSION}")
    scales = _parse(data, path)
    try:
        scales.check(checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    bound_to, found = member(data, "weights", str, path), weights_hash(checkpoint)
    if bound_to != found:
        raise CheckpointError(
            f"{path} belongs to other weights (hash {bound_to[:12]}) than {checkpoint.path} holds "
            f"({found[:12]}); run `halfpi calibrate` again"
        )
    return scales


def weights_hash(checkpoint: Checkpoint) -> str:
    """A SHA-256 over names, dtypes, shapes and bytes of the tensors in use, in order of name.

    It does not depend on the format, so scales stay valid through a conversion that keeps dtypes.
    """
    digests = checkpoint.each(_digest)
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _parse(data: Mapping[str, Any], path: Path) -> Scales:
    sites = {}
    for name, entry in member(data, "sites", dict, path).items():
        where = f"{path}: {name}"
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where} must hold a JSON object, got {entry!r:.80}")
        values = member(entry, "input", list, where)
        numbers = [member({"input": value}, "input", float, where) for value in values]
        sites[name] = SiteScales(member(entry, "weight", float, where), tuple(numbers))
    return Scales(
        num_steps=member(data, "num_steps", int, path),
        frames=member(data, "frames", int, path),
        percentile=member(data, "percentile", float, path),
        sites=sites,
    )
