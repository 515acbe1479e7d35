"""The thread that a policy lives in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """One thread that runs what it is given, in order.

    A policy is built and called in the same thread, because a captured graph may be bound to the
    one that captured it. The thread is a daemon: a call that never returns cannot be stopped, and
    must not keep the process from ending.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="halfpi-policy", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it may still run something."""
        return self._thread.is_alive()

    def submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """What `function` gives or raises, once its turn has come."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # so that cancelling the outer one leaves it alone
        self._jobs.put((function, future))
        return asyncio.wrap_future(future)

    def retire(self) -> None:
        """End after what was submitted."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 (whoever waits for it gets it)
                future.set_exception(error)
            del job, function, future  # nothing of a call outlives it here
