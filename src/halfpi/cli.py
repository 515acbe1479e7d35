"""The `halfpi` command: its options, one dataclass a command, and nothing heavy.

What a command does is in `halfpi.commands`, which is imported only when the command runs, so that
`--help` answers at once. A docstring here is the help text of its command or option.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from halfpi.config import Backend, Precision
from halfpi.serving.config import ServeConfig

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Demo:
    """Watch the policy that ships with halfpi solve Meta-World tasks in closed loop.

    Without OpenGL for rendering, it runs on recorded frames instead and says what to install.
    """

    tasks: tuple[str, ...] = ("all",)
    """Meta-World tasks, or the groups "all" and "precise"."""
    episodes: int = 1
    """Held-out episodes of each task."""
    policy: str = "nano"
    """A checkpoint directory, or "nano"."""
    num_steps: int = 10
    """Euler steps of a call."""
    execute: int = 8
    """Actions executed of each chunk before the next call."""
    precision: Precision = "fp32"
    """Of the arithmetic; fp8 needs scales beside the checkpoint."""
    backend: Backend = "eager"
    """What runs the model: plain torch, torch.compile, or halfpi's kernels on a GPU."""
    output: Path = Path("outputs/demo")
    """Where the contact sheet of each episode goes."""
    rerun: Path | None = None
    """Write a rerun recording of what the robot saw and planned to this .rrd file."""
    json: bool = False
    """Print the results as JSON instead of a table."""


@dataclass(frozen=True)
class Eval:
    """Measure task success on held-out episodes, on all cores.

    Several values of --precision, --num-steps or --execute make several settings, which play the
    same episodes and are compared pair by pair to the first.
    """

    tasks: tuple[str, ...] = ("all",)
    """Meta-World tasks, or the groups "all" and "precise"."""
    episodes: int = 50
    """Held-out episodes of each task."""
    policy: str = "nano"
    """A checkpoint directory, or "nano"."""
    num_steps: tuple[int, ...] = (10,)
    """Euler steps of a call."""
    execute: tuple[int, ...] = (8,)
    """Actions executed of each chunk before the next call."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Of the arithmetic; fp8 needs scales beside the checkpoint."""
    backend: tuple[Backend, ...] = ("eager",)
    """What runs the model: plain torch, torch.compile, or halfpi's kernels on a GPU. One for all
    precisions, or one for each."""
    wrong_instruction: bool = False
    """Ask for the other task of a shared scene; only tasks that share one are played."""
    workers: int | None = None
    """Processes; one a core by default."""
    output: Path | None = None
    """Write the results to this JSON file."""
    json: bool = False
    """Print the results as JSON instead of tables."""


@dataclass(frozen=True)
class Record:
    """Record demonstrations of Meta-World's scripted experts, disturbed by bursts of action noise.

    An interrupted recording goes on where it stopped.
    """

    output: Positional[Path]
    """Directory of the recordings."""
    tasks: tuple[str, ...] = ("all",)
    """Meta-World tasks, or the groups "all" and "precise"."""
    episodes: int = 60
    """Demonstrations of each task to try; those that the expert fails are left out."""
    workers: int | None = None
    """Processes; one a core by default."""


@dataclass(frozen=True)
class Train:
    """Train a nano policy on recordings, and write it as a checkpoint.

    A training that was stopped, or is asked for more steps, goes on from where it was.
    """

    recordings: Positional[Path]
    """Directory that 'halfpi record' wrote."""
    output: Positional[Path]
    """Directory for the training state, and under "policy" the checkpoint."""
    steps: int = 40_000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Frames a step."""
    learning_rate: float = 5e-4
    """The highest learning rate."""
    start: str | None = None
    """Go on from the weights of this checkpoint, or "nano", in place of random ones."""
    minutes: float | None = None
    """Stop after this long, to be resumed."""
    device: str | None = None
    """A torch device; CUDA if there is one, else the CPU."""
    seed: int = 0
    """Of initial weights, batches and noise."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to read of a checkpoint, and what to add to it."""

    checkpoint: Positional[str]
    """A checkpoint directory of openpi (JAX or torch), LeRobot or halfpi; or "nano"."""
    asset_id: str | None = None
    """Whose normalisation statistics, when an openpi checkpoint has several robots'."""
    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """Fields of Pi05Config that the checkpoint does not say, as vision_heads=4."""
    processing: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """Fields of ProcessingConfig that the checkpoint does not say, as prompt_state_dim=32."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Source):
    """Print what a checkpoint is: format, sizes, dtypes, processing, and what had to be assumed."""

    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True, kw_only=True)
class Convert(Source):
    """Convert a checkpoint of any format into halfpi's own, one tensor in memory at a time."""

    target: Positional[Path]
    """The directory to write."""
    dtype: Dtype | None = None
    """Stored dtype; by default each tensor keeps its own."""
    overwrite: bool = False
    """Replace a halfpi checkpoint at the target."""


@dataclass(frozen=True, kw_only=True)
class Run(Source):
    """How to run a checkpoint."""

    tokenizer: Path | None = None
    """A tokenizer.json or SentencePiece .model, if the checkpoint brings none."""
    num_steps: int = 10
    """Euler steps."""
    seed: int = 0
    """Of the noise."""
    device: str | None = None
    """A torch device; CUDA if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Of the arithmetic; fp8 needs scales beside the checkpoint."""
    backend: Backend = "eager"
    """What runs the model: plain torch, torch.compile, or halfpi's kernels on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Infer(Run):
    """Run one observation through a policy and print its actions, a row each, in robot units."""

    prompt: str
    """The instruction."""
    state: tuple[float, ...]
    """The robot's state, in its own units."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CAMERA=FILE")]
    """Image files by camera; a camera that is left out is masked."""
    json: bool = False
    """Print JSON, with the milliseconds of each stage."""


@dataclass(frozen=True, kw_only=True)
class Serve(Run):
    """Serve a policy to openpi clients over websockets, with /healthz and /metrics.

    SIGHUP reloads the checkpoint without dropping a connection, SIGTERM drains and exits.
    """

    rerun: Path | None = None
    """Write a rerun recording of every robot's requests to this .rrd file, which keeps growing."""
    server: tyro.conf.OmitArgPrefixes[ServeConfig] = dataclasses.field(default_factory=ServeConfig)


@dataclass(frozen=True, kw_only=True)
class Calibrate(Run):
    """Measure the ranges of activations on recorded frames; save fp8 scales beside a checkpoint."""

    recordings: Path
    """Directory that 'halfpi record' wrote."""
    frames: int = 64
    """Frames to look at, spread evenly over tasks."""
    percentile: float = 100.0
    """Of the frames' maxima; what is larger will saturate."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How to measure, and what to keep of it."""

    device: str | None = None
    """A torch device; CUDA if there is one, else the CPU."""
    repeats: int = 200
    """Timed runs."""
    results: Path | None = None
    """Append the records below this directory, as benchmarks/results."""
    chart: Path | None = None
    """Draw them into this file, as chart.svg."""


@dataclass(frozen=True, kw_only=True)
class BenchKernels(Measure):
    """Time each kernel at the shapes that π0.5 runs, with its error against plain torch's."""

    kernels: tuple[str, ...] = ()
    """Names of kernels; all by default."""


@dataclass(frozen=True, kw_only=True)
class BenchMlp(Measure):
    """Time the prefix's MLP in bf16, in FP8 with passes that quantise, and in hybrid FP8."""


@dataclass(frozen=True, kw_only=True)
class BenchAttention(Measure):
    """Time π0.5's three attentions by torch's backends, xformers if it is there, and halfpi."""


@dataclass(frozen=True, kw_only=True)
class BenchEngine(Measure, Source):
    """What of an engine to time. Presets of the released sizes have random weights."""

    checkpoint: Positional[str] = "nano"
    """A checkpoint directory, "nano", or a preset as pi05 with random weights."""
    cameras: int = 2
    """Cameras that are there."""
    prompt_tokens: int = 24
    """Tokens of the prompt."""
    num_steps: int = 10
    """Euler steps."""
    precision: Precision = "fp32"
    """Of the arithmetic; scales of fp8 come from random observations."""
    backend: Backend = "eager"
    """What runs the model."""


@dataclass(frozen=True, kw_only=True)
class BenchStages(BenchEngine):
    """Time the stages of an engine apart, each on inputs that are ready on the device."""


@dataclass(frozen=True, kw_only=True)
class BenchPaced(BenchEngine):
    """Time the stages of an engine that is asked at a rate, as by a robot, and rests in between."""

    rate_hz: float = 20.0
    """Calls a second."""


@dataclass(frozen=True, kw_only=True)
class BenchE2e(BenchEngine):
    """Time a policy from images to actions, with images of the model's size and of 480 × 640."""


@dataclass(frozen=True, kw_only=True)
class BenchPreset(Measure):
    """What is timed is a model with random weights."""

    checkpoint: Positional[str] = "pi05"
    """A preset of Pi05Config; weights are random."""
    cameras: int = 3
    """Cameras that are there."""
    prompt_tokens: int = 200
    """Tokens of the prompt."""


@dataclass(frozen=True, kw_only=True)
class BenchAblation(BenchPreset):
    """Time every variant between plain torch and the engine, and count their kernels."""

    variants: tuple[str, ...] = ()
    """Names of variants; all by default."""


@dataclass(frozen=True, kw_only=True)
class BenchCold(BenchPreset):
    """Time a process from its start to its first actions, with and without compiled kernels.

    It loads a checkpoint that was just written, and so is still in memory.
    """

    precision: Precision = "bf16"
    """Of the arithmetic; scales of fp8 come from random observations."""
    backend: Backend = "triton"
    """What runs the model."""
    repeats: int = 3
    """Timed starts of each kind."""


@dataclass(frozen=True)
class Bench:
    """Time something on this device: floor, measured, share of the floor."""

    what: Annotated[
        Annotated[BenchKernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[BenchStages, tyro.conf.subcommand("stages", prefix_name=False)]
        | Annotated[BenchPaced, tyro.conf.subcommand("paced", prefix_name=False)]
        | Annotated[BenchE2e, tyro.conf.subcommand("e2e", prefix_name=False)]
        | Annotated[BenchMlp, tyro.conf.subcommand("mlp", prefix_name=False)]
        | Annotated[BenchAttention, tyro.conf.subcommand("attention", prefix_name=False)]
        | Annotated[BenchAblation, tyro.conf.subcommand("ablation", prefix_name=False)]
        | Annotated[BenchCold, tyro.conf.subcommand("cold", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


@dataclass(frozen=True)
class Report:
    """Draw the latencies of runs: histograms by stage, a timeline of calls and stalls, tick errors.

    The result is one HTML page without references to other files.
    """

    records: Positional[tuple[Path, ...]]
    """Runs of the control loop (halfpi.runtime.save_run) and benchmark records, as JSON lines."""
    output: Path = Path("outputs/report.html")
    """The page to write."""


# Each command with the function that does it, as module and name under halfpi.commands.
COMMANDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "demo": (Demo, "simulation", "demo"),
    "eval": (Eval, "simulation", "evaluate"),
    "record": (Record, "training", "record"),
    "train": (Train, "training", "train"),
    "inspect": (Inspect, "checkpoint", "inspect"),
    "convert": (Convert, "checkpoint", "convert"),
    "infer": (Infer, "checkpoint", "infer"),
    "serve": (Serve, "serving", "serve"),
    "calibrate": (Calibrate, "quantisation", "calibrate"),
    "bench": (Bench, "performance", "bench"),
    "report": (Report, "report", "report"),
}


def main() -> None:
    """Entry point of the `halfpi` command; a user's mistake ends it with one line and status 1."""
    options: object = tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _, _) in COMMANDS.items()},
        prog="halfpi",
        description="A real-time inference engine for the robot policy π0.5.",
    )
    warnings.showwarning = _note
    module, function = next(where for kind, *where in COMMANDS.values() if kind is type(options))
    try:
        getattr(import_module(f"halfpi.commands.{module}"), function)(options)
    except (ValueError, OSError) as error:
        sys.exit(f"halfpi: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"halfpi: {error}; install halfpi with the extra that the command needs")


def _note(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line for the user, without the place in the code."""
    print(f"halfpi: note: {message}", file=sys.stderr)  # noqa: T201
