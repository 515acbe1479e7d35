"""`halfpi serve`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from halfpi.commands.checkpoint import policy_of
from halfpi.integrations.openpi import Answer
from halfpi.runtime.rerun_log import RerunLog
from halfpi.serving.server import Watch, run_server

if TYPE_CHECKING:
    from halfpi.cli import Serve


def serve(options: Serve) -> None:
    """Serve the policy until the process is told to stop."""
    with ExitStack() as stack:
        log = None if options.rerun is None else stack.enter_context(RerunLog(options.rerun))
        watch = None if log is None else _watch(log)
        run_server(lambda: policy_of(options), options.server, watch)


def _watch(log: RerunLog) -> Watch:
    def watch(robot: int, answer: Answer) -> None:
        now_s = time.monotonic()
        began_s = now_s - answer.infer_ms / 1000
        log.inferred(began_s, now_s, answer.observation, answer.chunk, f"robot/{robot}/")

    return watch
