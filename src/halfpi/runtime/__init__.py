"""Control loops: chunk schedulers, real-time chunking, reuse, and the loop itself."""

from __future__ import annotations

from halfpi.runtime.clock import Clock, RealClock, VirtualClock
from halfpi.runtime.loop import ChunkPolicy, ControlLoop, Robot, repeat_last
from halfpi.runtime.report import Call, LoopReport, Stall, Watcher
from halfpi.runtime.rerun_log import RerunLog
from halfpi.runtime.reuse import ReuseConfig, ReuseReport, ReusingPolicy
from halfpi.runtime.rtc import GuidedRtc, TrainedRtc
from halfpi.runtime.run_file import load_run, save_run
from halfpi.runtime.schedulers import (
    AdaptiveHorizon,
    Asynchronous,
    RecedingHorizon,
    Scheduler,
    SynchronousChunk,
    TemporalEnsemble,
)

__all__ = [
    "AdaptiveHorizon",
    "Asynchronous",
    "Call",
    "ChunkPolicy",
    "Clock",
    "ControlLoop",
    "GuidedRtc",
    "LoopReport",
    "RealClock",
    "RecedingHorizon",
    "RerunLog",
    "ReuseConfig",
    "ReuseReport",
    "ReusingPolicy",
    "Robot",
    "Scheduler",
    "Stall",
    "SynchronousChunk",
    "TemporalEnsemble",
    "TrainedRtc",
    "VirtualClock",
    "Watcher",
    "load_run",
    "repeat_last",
    "save_run",
]
