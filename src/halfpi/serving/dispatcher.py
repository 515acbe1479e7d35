"""Who gets the policy next, and what happens when it fails, hangs or is replaced."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfpi.integrations.openpi import Answer, OpenpiPolicy
from halfpi.serving.logs import fields
from halfpi.serving.metrics import Metrics
from halfpi.serving.requests import FairQueue, Outcome, Request, RequestError
from halfpi.serving.worker import Worker

logger = logging.getLogger(__name__)


class ReloadError(RuntimeError):
    """The policy was not replaced; the one before still serves."""


class Dispatcher:
    """Owns the policy and the queue in front of it; one call runs at a time.

    factory: builds a policy, ready to be called; called again for every replacement.
    deadline_s: every request is answered within it, with an error if need be.
    max_batch: requests that go into a call together. batch_wait_s: how long a call waits for
    clients that have asked before; it never waits for more than there are.
    watch: is shown every answer with the client's number, on the event loop.
    """

    def __init__(
        self,
        factory: Callable[[], OpenpiPolicy],
        metrics: Metrics,
        *,
        deadline_s: float,
        max_queued_bytes: int,
        max_batch: int,
        batch_wait_s: float,
        watch: Callable[[int, Answer], None] | None = None,
    ) -> None:
        self._factory = factory
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._queue = FairQueue(max_queued_bytes)
        self._max_batch = max_batch
        self._batch_wait_s = batch_wait_s
        self._watch = watch
        self._clients: set[int] = set()
        metrics.queue_depth.set_function(lambda: len(self._queue))
        metrics.queued_bytes.set_function(lambda: self._queue.size_bytes)
        metrics.hanging.set_function(lambda: self.hangs)
        self._worker: Worker
        self._policy: OpenpiPolicy
        self._retired: Worker | None = None
        self._reload: asyncio.Task[None] | None = None
        self._calling_since_s: float | None = None
        self._proof: tuple[Mapping[str, Any], tuple[int, ...]] | None = None

    async def start(self) -> None:
        """Build the policy. Raises what the factory raises."""
        self._worker, self._policy = await self._build()

    @property
    def metadata(self) -> dict[str, Any]:
        """What the policy tells clients that connect."""
        return self._policy.metadata

    @property
    def hangs(self) -> bool:
        """Whether the running call takes longer than any request may."""
        since_s = self._calling_since_s
        return since_s is not None and time.perf_counter() - since_s > self._deadline_s

    def submit(self, request: Request) -> None:
        """Queue `request`; its answer is set within the deadline, whatever happens."""
        self._clients.add(request.client)
        timer = asyncio.get_running_loop().call_later(self._deadline_s, self._expire, request)
        request.answer.add_done_callback(lambda _: timer.cancel())
        try:
            older = self._queue.put(request)
        except RequestError as error:
            self.finish(request, error)
            return
        if older is not None:
            message = "superseded: a newer observation came before this one's turn"
            self.finish(older, RequestError(Outcome.SUPERSEDED, message))

    def finish(self, request: Request, answer: Answer | RequestError) -> None:
        """Give `request` its answer, unless it has one."""
        if not request.answer.done():
            outcome = answer.outcome if isinstance(answer, RequestError) else Outcome.ANSWERED
            self._metrics.finished(request, outcome, time.perf_counter())
            request.finish(answer)

    def forget(self, client: int) -> None:
        """Drop what waits for a client that left."""
        self._clients.discard(client)
        request = self._queue.waiting(client)
        if request is not None:
            self._queue.remove(request)
            self.finish(request, RequestError(Outcome.ABANDONED, "the client left"))

    async def run(self) -> None:
        """Serve the queue; returns only when cancelled."""
        while True:
            most = min(self._max_batch, len(self._clients)) if self._policy.can_batch else 1
            requests = await self._queue.get(max(1, most), self._batch_wait_s)
            for request in requests:
                self._metrics.started(request, time.perf_counter())
            await self._serve(requests)

    async def reload(self) -> None:
        """Build a policy beside the one that serves, and put it in its place between two calls.

        It must first answer the last observation that was answered, with actions of the same shape;
        that also warms it up. Raises ReloadError that says why the old policy stays.
        """
        if self._reload is None or self._reload.done():
            self._reload = asyncio.create_task(self._replace())
        await asyncio.shield(self._reload)

    async def _serve(self, requests: Sequence[Request]) -> None:
        worker, policy = self._worker, self._policy
        observations = [request.observation for request in requests]
        self._calling_since_s = time.perf_counter()
        call = worker.submit(lambda: policy.answer_many(observations))
        if await self._returned(worker, call):
            self._metrics.batched(len(requests))
            for request, observation, outcome in zip(
                requests, observations, call.result(), strict=True
            ):
                self._conclude(request, observation, outcome)
            self._metrics.looked_up(*policy.lookups())
        self._calling_since_s = None

    def _conclude(
        self, request: Request, observation: Mapping[str, Any], outcome: Answer | Exception
    ) -> None:
        if isinstance(outcome, Answer):
            self._proof = observation, outcome.reply["actions"].shape
            self._metrics.called(outcome)
            if self._watch is not None:
                self._watch(request.client, outcome)
            self.finish(request, outcome)
        elif isinstance(outcome, ValueError):
            self.finish(request, RequestError(Outcome.REFUSED, f"refused: {outcome}"))
        else:
            logger.error("policy failed", exc_info=outcome, extra=fields(connection=request.client))
            message = f"the policy failed: {type(outcome).__name__}: {outcome}"
            self.finish(request, RequestError(Outcome.FAILED, message))

    async def _returned(self, worker: Worker, call: asyncio.Future[Any]) -> bool:
        """Wait for `call`, but past the deadline no longer than another policy needs to take over.

        Its own client has been told by then; this is for the sake of the others.
        """
        while True:
            await asyncio.wait({call}, timeout=self._deadline_s)
            if call.done():
                return True
            logger.error("policy hangs", extra=fields(deadline_s=self._deadline_s))
            either: set[asyncio.Future[Any]] = {call, asyncio.create_task(self._try_reload())}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._worker is not worker and not call.done():
                call.cancel()  # nobody waits for it now; its thread ends when it returns
                return False

    async def _try_reload(self) -> None:
        try:
            await self.reload()
        except ReloadError as error:
            logger.error("reload failed", extra=fields(error=str(error)))

    async def _replace(self) -> None:
        # A thread that hangs keeps its policy in memory: there are never more than two.
        if self._retired is not None and self._retired.alive:
            raise ReloadError("the policy before this one has not returned from its last call")
        try:
            worker, policy = await self._build()
        except Exception as error:
            self._metrics.reloaded("failed")
            raise ReloadError(f"{type(error).__name__}: {error}") from error
        self._retired, self._worker, self._policy = self._worker, worker, policy
        self._retired.retire()
        self._metrics.reloaded("done")
        logger.info("policy replaced")

    async def _build(self) -> tuple[Worker, OpenpiPolicy]:
        worker = Worker()
        try:
            policy = await worker.submit(self._factory)
            if self._proof is not None:
                observation, shape = self._proof
                answer = await worker.submit(lambda: policy.answer(observation))
                if answer.reply["actions"].shape != shape:
                    raise ValueError(
                        f"actions have shape {answer.reply['actions'].shape}, but clients are used "
                        f"to {shape}"
                    )
        except BaseException:
            worker.retire()
            raise
        return worker, policy

    def _expire(self, request: Request) -> None:
        waited = self._queue.waiting(request.client) is request
        self._queue.remove(request)
        where = "waiting for the policy" if waited else "in the policy"
        message = f"deadline of {self._deadline_s:g} s exceeded {where}"
        self.finish(request, RequestError(Outcome.EXPIRED, message))
