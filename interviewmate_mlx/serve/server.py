"""Runs the server: listens, logs a line a request, and ends when it is asked to."""

import asyncio
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.serve.answers import Service, log
from interviewmate_mlx.serve.api import make_app
from interviewmate_mlx.serve.guard import App, Guard, Message, Receive, Scope, Send

_MAX_CONNECTIONS = 1000  # more are answered with 503
_OTHER_FILES = 200
_HEAD_S = 10.0  # in which a request's head must have come
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """Where to listen, and who may ask. Checked when it is made.

    Attributes:
        host: an address or a name.
        port: 0 for any that is free.
        api_key: "" for none; needed where others can reach the host.
        origins: of web pages that may use the server, such as `http://localhost:3000`.
    """

    host: str
    port: int
    api_key: str = ""
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.api_key:
            raise ConfigError(
                f"host {self.host}: others can reach it, so an API key is needed.\n"
                "Give one, or stay on 127.0.0.1.",
                "api_key",
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in _LOOPBACK

    def listen(self) -> socket.socket:
        """A socket that listens.

        Raises:
            ConfigError: the port is taken, or the host is not this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
            sock.listen(256)
        except (OSError, OverflowError) as error:
            sock.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"Cannot listen on {self.host}:{self.port}: {reason}.\n"
                "Choose another port, or an address of this machine.",
                "port",
                "host",
            ) from error
        return sock

    def names(self, port: int) -> set[str] | None:
        """What a request's Host may be; None for all, where a key is asked for anyway."""
        if not self.is_loopback:
            return None
        return {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}


class RequestLog:
    """Writes a line for each request, without what was said in it, and counts it."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            facts: dict[str, Any] = state.get("facts", {})
            adapter = facts.get("adapter", "")
            self._service.metrics.requests.labels(adapter, str(status)).inc()
            path = scope["path"].encode("unicode_escape").decode()[:200]
            words = [f"{name}={value}" for name, value in facts.items()]
            seconds = f"{time.monotonic() - started:.3f}s"
            log.info(" ".join([scope["method"], path, str(status), seconds, *words]))


class _PatientProtocol(H11Protocol):
    """Closes a connection whose request does not begin in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_timer = self.loop.call_later(_HEAD_S, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._begin_timer.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends after SIGTERM and SIGINT with what runs answered, and leaves the exit code to us."""

    received: int = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.handle_exit(number, frame)


def serve(service: Service, address: Address, sock: socket.socket) -> int:
    """Serve until a signal ends it.

    Args:
        service: what answers; its engine runs.
        address: who may ask.
        sock: from `address.listen`.

    Returns:
        The signal's number.
    """
    _allow_connections()
    port = sock.getsockname()[1]
    app: Any = Guard(make_app(service), address.names(port), address.origins, address.api_key)
    config = uvicorn.Config(
        RequestLog(app, service),
        http=_PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(service.timeout_s) + 1,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    server.run(sockets=[sock])
    return server.received


def _allow_connections() -> None:
    """Raise the limit of open files, as far as the system lets us: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_FILES
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_up_log() -> None:
    """A line a request on stderr, with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
