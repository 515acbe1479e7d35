"""How much memory a conversion takes: a full-size π0.5 of random weights in openpi's torch layout.

    python benchmarks/convert_memory.py [--directory DIR] [--dtype float32]

The source, 6.5 GB in bf16, is written below DIR, converted in a process of its own, and deleted.
Prints the bound, which is 1.3 times the largest tensor plus 2 GB, the peak of resident memory and
its share of the bound, then one JSON line; exits with 1 when the peak is above the bound. DIR needs
the size of the source twice, or three times for float32. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from halfpi.checkpoints import convert, open_checkpoint
from halfpi.checkpoints.safetensors_io import SafetensorsWriter
from halfpi.config import PRESETS
from halfpi.model import Pi05

_PALIGEMMA = "paligemma_with_expert.paligemma."
_VISION = _PALIGEMMA + "model.vision_tower.vision_model."
# Patterns of canonical names → openpi's, applied in this order.
_OPENPI_NAMES: Mapping[str, str] = {
    r"^prefix\.embed": _PALIGEMMA + "lm_head",
    r"^vision\.projector": _PALIGEMMA + "model.multi_modal_projector.linear",
    r"^vision\.patch_embed": _VISION + "embeddings.patch_embedding",
    r"^vision\.position_embed": _VISION + "embeddings.position_embedding.weight",
    r"^vision\.norm": _VISION + "post_layernorm",
    r"^vision\.(.*)attn_norm": r"vision.\1layer_norm1",
    r"^vision\.(.*)mlp_norm": r"vision.\1layer_norm2",
    r"^vision\.(.*)attn\.o\.": r"vision.\1self_attn.out_proj.",
    r"^vision\.layers": _VISION + "encoder.layers",
    r"^prefix\.": _PALIGEMMA + "model.language_model.",
    r"^expert\.": "paligemma_with_expert.gemma_expert.model.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.attn\.(\w)\.": r".self_attn.\1_proj.",
    r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj.",
    r"^action_(in|out)\.": r"action_\1_proj.",
}


def main() -> int:
    """Write, convert, measure, report."""
    parser = argparse.ArgumentParser(description="Measure the memory that a conversion takes.")
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(_measure(args.measure, args.dtype)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        source = Path(directory) / "source"
        largest_bytes = _write_source(source)
        command = [sys.executable, __file__, "--measure", str(source), "--dtype", args.dtype]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    bound = int(1.3 * largest_bytes + 2e9)
    share = measured["peak_bytes"] / bound
    print(
        f"bound {bound / 1e9:.2f} GB, 1.3 × the largest tensor of {largest_bytes / 1e9:.2f} GB + 2"
    )
    print(f"peak  {measured['peak_bytes'] / 1e9:.2f} GB, {share:.0%} of the bound")
    print(json.dumps({**measured, "bound_bytes": bound, "dtype": args.dtype}))
    return int(share > 1)


def _write_source(root: Path) -> int:
    """Write the checkpoint at `root`; returns the size of its largest tensor."""
    with torch.device("meta"):
        state = Pi05(PRESETS["pi05"]).state_dict()
    shapes = {_openpi_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    root.mkdir()
    announced = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(root / "model.safetensors", announced) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1))
    (root / "config.json").write_text(json.dumps({"action_horizon": 50}))
    return max(2 * torch.Size(shape).numel() for shape in shapes.values())


def _openpi_name(name: str) -> str:
    for pattern, replacement in _OPENPI_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _measure(source: Path, dtype: str) -> dict[str, float]:
    """Convert `source`; the peak of resident memory, mapped files included, and the seconds."""
    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    opened = time.perf_counter()
    target = convert(checkpoint, source.with_name("target"), dtype=dtype)
    seconds = time.perf_counter() - opened
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    summary = checkpoint.describe()
    written = (target / "model.safetensors").stat().st_size
    shutil.rmtree(target)
    return {
        "parameters": sum(summary.parameters.values()),
        "source_bytes": summary.stored_bytes,
        "target_bytes": written,
        "open_s": opened - start,
        "convert_s": seconds,
        "peak_bytes": 1024 * int(peak_kib),
    }


if __name__ == "__main__":
    sys.exit(main())
