"""Describe a checkpoint to LeRobot: python -m lerobot_policy_halfpi CHECKPOINT TARGET."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from lerobot_policy_halfpi.configuration_halfpi import HalfpiConfig
from lerobot_policy_halfpi.processor_halfpi import make_halfpi_pre_post_processors


def describe(
    checkpoint: str | os.PathLike[str], target: str | os.PathLike[str], **fields: Any
) -> Path:
    """Write the directory `target` for LeRobot's `--policy.path`, and return its path.

    It names `checkpoint`, whose weights are not copied. fields: of `HalfpiConfig`.
    Raises ValueError when `target` exists and for what is no π0.5.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} exists already")
    config = HalfpiConfig.of_checkpoint(checkpoint, **fields)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        config.save_pretrained(partial)
        for processor in make_halfpi_pre_post_processors(config):
            processor.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_halfpi", description=__doc__)
    parser.add_argument("checkpoint", help="a directory of openpi, LeRobot or halfpi, or nano")
    parser.add_argument("target", help="the new directory, for LeRobot's --policy.path")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp8"))
    parser.add_argument("--backend", default="eager", choices=("eager", "compile", "triton"))
    parser.add_argument("--num-steps", type=int, default=10, help="Euler steps of a chunk")
    parser.add_argument("--tokenizer", help="a tokenizer.json or .model, if not beside the weights")
    parser.add_argument("--device", help="a torch device; without it, what LeRobot selects")
    options = vars(parser.parse_args())
    try:
        print(describe(options.pop("checkpoint"), options.pop("target"), **options))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
