"""The server: its sockets, its HTTP routes, and its life from start to drain.

    run_server(lambda: load_policy("path/to/checkpoint"), ServeConfig(port=8000))

SIGTERM and SIGINT drain: requests that came are answered, new ones are refused. SIGHUP loads the
policy anew without dropping a connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.http11 import Request, Response
from websockets.protocol import State

from halfpi.integrations.openpi import Answer, OpenpiPolicy
from halfpi.policy import Policy
from halfpi.serving.access import ApiKeys, tls_context
from halfpi.serving.config import ServeConfig
from halfpi.serving.connection import Connection
from halfpi.serving.dispatcher import Dispatcher, ReloadError
from halfpi.serving.logs import fields, log_to_stderr
from halfpi.serving.metrics import Metrics

logger = logging.getLogger(__name__)

PolicyFactory = Callable[[], Policy]
Watch = Callable[[int, Answer], None]
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run_server(factory: PolicyFactory, config: ServeConfig, watch: Watch | None = None) -> None:
    """Serve until SIGTERM or SIGINT, with logs on standard error; returns after the drain.

    factory: builds a policy ready to be called; called again at SIGHUP. watch: as in `Server`.
    Raises what the factory raises the first time, ValueError on files of `config` that are wrong,
    OSError if the port is taken.
    """
    log_to_stderr()
    asyncio.run(serve(factory, config, watch))


async def serve(factory: PolicyFactory, config: ServeConfig, watch: Watch | None = None) -> None:
    """`run_server` on a running event loop, logging left alone."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def drain() -> None:
        for number in _STOP_SIGNALS:  # another one ends the process at once
            loop.remove_signal_handler(number)
        stop.set()

    async with Server(factory, config, watch) as server:
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, drain)
        loop.add_signal_handler(signal.SIGHUP, server.reload_soon)
        await server.run_until(stop)


class Server:
    """A policy behind a port; an asynchronous context manager that drains when it is left.

    watch: is shown every answer with the number of its connection; it must not take long.
    """

    def __init__(
        self, factory: PolicyFactory, config: ServeConfig, watch: Watch | None = None
    ) -> None:
        self._config = config
        self._keys = ApiKeys(config.api_key_file)
        self._tls = (
            tls_context(config.tls_cert, config.tls_key)
            if config.tls_cert and config.tls_key
            else None
        )
        metadata = _read_metadata(config.metadata_file)
        self.metrics = Metrics()
        self._dispatcher = Dispatcher(
            lambda: OpenpiPolicy(factory(), metadata=metadata, max_steps=config.max_steps),
            self.metrics,
            deadline_s=config.deadline_s,
            max_queued_bytes=config.max_queued_bytes,
            max_batch=config.max_batch,
            batch_wait_s=config.batch_wait_ms / 1000,
            watch=watch,
        )
        self._admitted: WeakSet[ServerConnection] = WeakSet()
        self._connections: set[Connection] = set()
        self._numbers = 0
        self._draining = False
        self.metrics.connections.set_function(lambda: len(self._connections))
        self._listener: WebsocketServer
        self._dispatching: asyncio.Task[None]
        self._reloading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Server:
        await self._dispatcher.start()
        config = self._config
        self._listener = await serve_websockets(
            self._handle,
            config.host,
            config.port,
            process_request=self._route,
            origins=[None],  # no robot is a web page, and no web page may steer one
            compression=None,  # as openpi: images gain little, and take longer
            max_size=config.max_frame_bytes,
            max_queue=1,
            ping_interval=config.ping_interval_s,
            ping_timeout=config.ping_timeout_s,
            close_timeout=config.write_timeout_s,
            logger=_websockets_logger(),
            ssl=self._tls,
        )
        self._dispatching = asyncio.create_task(self._dispatcher.run())
        logger.info("listening", extra=fields(host=config.host, port=self.port))
        if config.host not in _LOOPBACK and not self._keys:
            logger.warning("anyone who reaches the port may use it: no api_key_file is set")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        logger.info("draining", extra=fields(connections=len(self._connections)))
        self._draining = True
        self._listener.close(close_connections=False)
        for connection in self._connections:
            connection.drain()
        await self._listener.wait_closed()
        self._dispatching.cancel()
        await asyncio.gather(self._dispatching, return_exceptions=True)
        logger.info("stopped")

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = next(iter(self._listener.sockets)).getsockname()[1]
        return port

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, self._dispatching}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._dispatching.done():
            self._dispatching.result()  # it never returns, so it raises

    async def reload(self) -> None:
        """Load the policy anew; connections stay. Raises ReloadError that says why it was kept."""
        try:
            await self._dispatcher.reload()
        except ReloadError as error:
            logger.error("reload failed, the policy stays", extra=fields(error=str(error)))
            raise

    def reload_soon(self) -> None:
        """`reload` in the background; the log and the metrics tell how it went."""
        self._reloading = asyncio.create_task(self.reload())
        self._reloading.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _route(self, socket: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP and refuse handshakes; None lets websockets go on.

        What is neither a known path nor a websocket gets its 426.
        """
        if request.path == "/healthz":
            if self._dispatcher.hangs:
                return socket.respond(HTTPStatus.SERVICE_UNAVAILABLE, "the policy hangs\n")
            return socket.respond(HTTPStatus.OK, "OK\n")
        if not self._keys.accepts(request.headers.get("Authorization")):
            response = self._refuse(socket, HTTPStatus.UNAUTHORIZED, "missing or wrong API key")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if request.path == "/metrics":
            response = socket.respond(HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        # Counted here and not in the handler: a handshake that is under way takes a place, too.
        connected = sum(other.state is not State.CLOSED for other in self._admitted)
        if connected >= self._config.max_connections:
            return self._refuse(socket, HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        self._admitted.add(socket)
        return None

    def _refuse(self, socket: ServerConnection, status: HTTPStatus, reason: str) -> Response:
        self.metrics.refused(status)
        logger.warning("refused", extra=fields(peer=socket.remote_address, reason=reason))
        return socket.respond(status, f"{reason}\n")

    async def _handle(self, socket: ServerConnection) -> None:
        self._numbers += 1
        number = self._numbers
        logger.info(
            "connection opened", extra=fields(connection=number, peer=socket.remote_address)
        )
        connection = Connection(socket, number, self._dispatcher, self._config.write_timeout_s)
        self._connections.add(connection)
        if self._draining:
            connection.drain()
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            await socket.close()
            self.metrics.closed(socket.close_code)
            logger.info(
                "connection closed",
                extra=fields(connection=number, code=socket.close_code, reason=socket.close_reason),
            )


def _read_metadata(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"metadata {path} cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata {path} must be a JSON object, got {metadata!r}")
    return metadata


def _websockets_logger() -> logging.Logger:
    """The library's log, without what shows headers, and so keys, at its lowest level."""
    library = logging.getLogger("halfpi.serving.websockets")
    library.setLevel(logging.WARNING)
    return library
