"""Calls and ticks as a recording of rerun (rerun.io): what the robot saw, planned and did, in time.

| entity | what |
|---|---|
| `camera/NAME` | the picture, as JPEG |
| `state`, `action` | of the robot, in its own units |
| `chunk` | the plan of a call, a tensor (h, robot_action_dim) |
| `stage/NAME_ms`, `call/latency_ms` | milliseconds of a call |
| `reuse/camera/NAME`, `reuse/prefix` | 1 if the call took it over from an earlier one |
| `queue` | actions that are decided and not yet sent |
| `held` | 1 where the last action was held |
| `events` | errors, beginnings of stalls, notes |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfpi.runtime.report import Cause
from halfpi.types import ActionChunk, Observation

if TYPE_CHECKING:
    import rerun

_JPEG_QUALITY = 85


class RerunLog:
    """Writes a recording to `path`; a `Watcher` of control loops, and a context manager.

    What it is shown is written by a thread of its own, in order. While it is open the recording is
    a file beside `path` that ends in ".partial"; `close` puts it in place. Times count from the
    first that it is shown.

    Raises ValueError if rerun-sdk, the extra `rerun`, is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._rerun = _rerun()
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._recording: rerun.RecordingStream = self._rerun.RecordingStream("halfpi")
        self._recording.save(str(self._partial))
        self._start_s: float | None = None
        self._held: Cause | None = None
        self._error: Exception | None = None
        self._writer = ThreadPoolExecutor(1, "halfpi-rerun")

    def __enter__(self) -> RerunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the recording. Raises what writing raised first."""
        self._writer.shutdown()
        self._recording.flush()
        self._recording.disconnect()
        self._partial.replace(self._path)
        if self._error is not None:
            raise self._error

    def inferred(
        self,
        began_s: float,
        ended_s: float,
        observation: Observation,
        outcome: ActionChunk | str,
        source: str = "",
    ) -> None:
        """A call, as in `Watcher`. source: goes before its entities, as "robot/3/"."""
        self._submit(lambda: self._write_call(began_s, ended_s, observation, outcome, source))

    def ticked(
        self, now_s: float, queued: int, action: NDArray[np.float32] | None, held: Cause | None
    ) -> None:
        """A tick, as in `Watcher`."""
        self._submit(lambda: self._write_tick(now_s, queued, action, held))

    def note(self, now_s: float, text: str) -> None:
        """Something worth a line, such as the beginning of an episode."""
        self._submit(lambda: self._write_event(now_s, text, "INFO"))

    def _submit(self, write: Callable[[], None]) -> None:
        self._writer.submit(self._guarded, write)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 (`close` raises it)
            self._error = self._error or error

    def _write_call(
        self,
        began_s: float,
        ended_s: float,
        observation: Observation,
        outcome: ActionChunk | str,
        source: str,
    ) -> None:
        self._set_time(began_s)
        for camera, pixels in observation.images.items():
            self._log(f"{source}camera/{camera}", self._picture(pixels))
        self._log_numbers(f"{source}state", observation.state)
        if isinstance(outcome, str):
            self._write_event(ended_s, f"{source}call failed: {outcome}", "ERROR")
            return
        self._set_time(ended_s)
        names = ("action", "dimension")
        self._log(f"{source}chunk", self._rerun.Tensor(outcome.actions, dim_names=names))
        self._log_numbers(f"{source}call/latency_ms", (ended_s - began_s) * 1000)
        for stage, ms in asdict(outcome.times).items():
            self._log_numbers(f"{source}stage/{stage}", ms)
        for camera in observation.images:
            kept = outcome.kept.prefix or camera in outcome.kept.cameras
            self._log_numbers(f"{source}reuse/camera/{camera}", float(kept))
        self._log_numbers(f"{source}reuse/prefix", float(outcome.kept.prefix))

    def _write_tick(
        self, now_s: float, queued: int, action: NDArray[np.float32] | None, held: Cause | None
    ) -> None:
        if held is not None and held != self._held:
            self._write_event(now_s, f"holding: a call is {held}", "WARN")
        self._held = held
        self._set_time(now_s)
        self._log_numbers("queue", queued)
        self._log_numbers("held", float(held is not None))
        if action is not None:
            self._log_numbers("action", action)

    def _write_event(self, now_s: float, text: str, level: str) -> None:
        self._set_time(now_s)
        self._log("events", self._rerun.TextLog(text, level=level))

    def _set_time(self, time_s: float) -> None:
        if self._start_s is None:
            self._start_s = time_s
        self._recording.set_time("time", duration=time_s - self._start_s)

    def _log_numbers(self, entity: str, numbers: Any) -> None:
        self._log(entity, self._rerun.Scalars(np.atleast_1d(np.asarray(numbers, np.float64))))

    def _log(self, entity: str, archetype: Any) -> None:
        self._recording.log(entity, archetype)

    def _picture(self, pixels: NDArray[Any]) -> Any:
        """`pixels` in any form that `Processor` takes."""
        if pixels.shape[0] == 3 and pixels.shape[-1] != 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.dtype.kind == "f":
            pixels = (pixels * 255).astype(np.uint8)
        return self._rerun.Image(pixels).compress(jpeg_quality=_JPEG_QUALITY)


def _rerun() -> ModuleType:
    """rerun, imported only where a recording is asked for: it is large, and optional."""
    try:
        import rerun as module
    except ModuleNotFoundError as error:
        raise ValueError('a recording needs rerun-sdk: pip install "halfpi[rerun]"') from error
    return module
