"""What `GET /metrics` tells Prometheus. Times are in seconds there, as is its custom."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halfpi.integrations.openpi import Answer
from halfpi.serving.requests import Outcome, Request

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_STAGES = ("processing", "vision", "prefill", "denoise")
# A client may close with any code up to 4999: only these are counted apart.
_CLOSE_CODES = (1000, 1001, 1002, 1006, 1007, 1009, 1011)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.connections = Gauge(
            "halfpi_connections", "Robots that are connected", registry=registry
        )
        self.queue_depth = Gauge(
            "halfpi_queue_depth", "Requests that wait for the policy", registry=registry
        )
        self.queued_bytes = Gauge(
            "halfpi_queued_bytes", "Bytes of observations that wait", registry=registry
        )
        self.hanging = Gauge(
            "halfpi_policy_hangs", "1 while a call is past its deadline", registry=registry
        )
        self._wait = Histogram(
            "halfpi_queue_wait_seconds",
            "From the arrival of a request to its turn",
            buckets=_SECONDS,
            registry=registry,
        )
        self._stage = Histogram(
            "halfpi_stage_seconds",
            "Time of a request in a stage, of the pass it shared",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._request = Histogram(
            "halfpi_request_seconds",
            "From the arrival of a request to its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self._requests = _counter("requests", "How requests ended", "outcome", Outcome, registry)
        self._refused = _counter(
            "refused_connections", "HTTP status of refusals", "status", ("401", "503"), registry
        )
        self._closed = _counter(
            "closed_connections",
            "Close codes",
            "code",
            (*map(str, _CLOSE_CODES), "other"),
            registry,
        )
        self._reloads = _counter(
            "reloads", "Replacements of the policy", "outcome", ("done", "failed"), registry
        )
        self._batch = Histogram(
            "halfpi_batch_size", "Requests in a pass", buckets=_BATCHES, registry=registry
        )
        self._lookups = _counter(
            "prompt_lookups",
            "Prompts whose tokens were remembered (hit) or computed (miss)",
            "outcome",
            ("hit", "miss"),
            registry,
        )
        for stage in _STAGES:
            self._stage.labels(stage)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def started(self, request: Request, now_s: float) -> None:
        """The turn of `request` came."""
        self._wait.observe(now_s - request.arrived_s)

    def finished(self, request: Request, outcome: Outcome, now_s: float) -> None:
        """`request` ended."""
        self._requests.labels(outcome).inc()
        self._request.observe(now_s - request.arrived_s)

    def called(self, answer: Answer) -> None:
        """The policy gave `answer`; its stages are those of the pass that it was computed in."""
        for stage in _STAGES:
            self._stage.labels(stage).observe(getattr(answer.chunk.times, f"{stage}_ms") / 1000)

    def batched(self, requests: int) -> None:
        """So many `requests` were computed together."""
        self._batch.observe(requests)

    def looked_up(self, hits: int, misses: int) -> None:
        """Prompts were found among those remembered, or not."""
        self._lookups.labels("hit").inc(hits)
        self._lookups.labels("miss").inc(misses)

    def refused(self, status: int) -> None:
        """A client was refused: 401 for its key, 503 because the server is full."""
        self._refused.labels(int(status)).inc()

    def closed(self, code: int | None) -> None:
        """A connection was closed with `code`."""
        self._closed.labels(str(code) if code in _CLOSE_CODES else "other").inc()

    def reloaded(self, outcome: str) -> None:
        """The policy was replaced ("done") or stayed ("failed")."""
        self._reloads.labels(outcome).inc()


def _counter(
    name: str,
    text: str,
    label: str,
    values: tuple[str, ...] | type[Outcome],
    registry: CollectorRegistry,
) -> Counter:
    """A counter that shows every value of its label from the start, at 0."""
    counter = Counter(f"halfpi_{name}", text, [label], registry=registry)
    for value in values:
        counter.labels(value)
    return counter
