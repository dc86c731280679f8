"""What is looked at before a request is answered: where it comes from, its key, its size.

A web page that the user visits can send requests to 127.0.0.1. Its Origin tells it apart, and
its Host too, where it has made its own name point here (DNS rebinding).
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1 << 20
_BODY_S = 20.0  # in which a body must have come
# Can be asked for without a key: they hold nothing of the user's.
_OPEN = ("/", "/page.js", "/page.css", "/health")

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests before they reach an application."""

    def __init__(
        self, app: App, hosts: Collection[str] | None, origins: Iterable[str], api_key: str
    ) -> None:
        """
        Args:
            app: what is guarded.
            hosts: names that this server may be asked by, with their port; None for all.
            origins: of web pages that may use it, beside its own.
            api_key: expected as a bearer token; "" for none.
        """
        self._app = app
        self._hosts = hosts
        self._origins = set(origins)
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        origin = headers.get("origin", "")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = dict(SECURITY_HEADERS)
                if origin in self._origins:
                    extra["Access-Control-Allow-Origin"] = origin
                    extra["Vary"] = "Origin"
                    extra["Cross-Origin-Resource-Policy"] = "cross-origin"
                pairs = [(k.lower().encode(), v.encode()) for k, v in extra.items()]
                message["headers"] = [*message.get("headers", []), *pairs]
            await send(message)

        if refusal := self._refusal(scope, headers):
            await send_error(send_with_headers, *refusal)
            return
        if scope["method"] == "OPTIONS" and origin in self._origins:
            await _send_preflight(send_with_headers)
            return
        if scope["method"] == "POST":
            body = await _read_body(headers, receive)
            if not isinstance(body, bytes):
                await send_error(send_with_headers, *body)
                return
            receive = _replayed(body, receive)
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, message and code, if a request is refused for where it comes from."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self._hosts is not None and host.lower() not in self._hosts:
            return 403, "This server is not known by that Host.", "host_not_allowed"
        is_own = bool(origin) and urlsplit(origin).netloc.lower() == host.lower()
        if origin and not is_own and origin not in self._origins:
            return 403, "Web pages of that Origin may not use this server.", "origin_not_allowed"
        is_preflight = scope["method"] == "OPTIONS" and origin in self._origins
        if self._api_key and scope["path"] not in _OPEN and not is_preflight:
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")
            if not (hmac.compare_digest(given, self._api_key) and kind.lower() == "bearer"):
                return 401, "The API key is missing or wrong.", "invalid_api_key"
        return None


async def _read_body(headers: dict[str, str], receive: Receive) -> bytes | tuple[int, str, str]:
    """The body of a request, or the status, message and code of its refusal."""
    too_large = 413, f"The body has more than {MAX_BODY_BYTES} bytes.", "body_too_large"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return 415, "Content-Type: expected application/json.", "unsupported_media_type"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
        return too_large
    body = b""
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return 400, "The body did not come whole.", "incomplete_body"
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    return too_large
                if not message.get("more_body"):
                    return body
    except TimeoutError:
        return 408, f"The body did not come within {_BODY_S:.0f} s.", "body_timeout"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def send_error(
    send: Send, status: int, message: str, code: str, param: str | None = None
) -> None:
    """Answer with an error in OpenAI's form, and close the connection."""
    body = json.dumps(error_body(status, message, code, param)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(
    status: int, message: str, code: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _send_preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
