"""What happens around every request: an id, the key, the limits, a log line, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from midstream.errors import (
    AccessError,
    BodyTimeout,
    BodyTooLarge,
    EngineStopped,
    MidstreamError,
    OverloadedError,
    TooManyStreams,
    Unauthorized,
)
from midstream.server.replies import error_object
from midstream.server.service import Caller, Exchange, Service

log = logging.getLogger("midstream.access")

# Everything else is open: health, metrics, the page and the description of the interface.
_GUARDED = ("/v1/", "/tokenize", "/detokenize")

_PAGE_POLICY = (
    "default-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": _PAGE_POLICY,
}


def error_response(error: MidstreamError, param: str | None = None, **more: Any) -> JSONResponse:
    """An error as an HTTP response, with what stands beside it. Whoever has to wait is told how long."""
    headers = {}
    if isinstance(error, OverloadedError | TooManyStreams):
        headers["Retry-After"] = "1"
    elif error.status == 503:
        headers["Retry-After"] = "5"
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(error, param), **more}, status_code=error.status, headers=headers)


class Front:
    """The one middleware. Plain ASGI, so that a client's disconnection reaches the endpoints."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = {
            hashlib.sha256(key.get_secret_value().encode()).digest(): str(number)
            for number, key in enumerate(service.config.api_keys, 1)
        }
        admin = service.config.admin_key
        self._admin = None if admin is None else hashlib.sha256(admin.get_secret_value().encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = Exchange(id=_request_id(headers.get("x-request-id")))
        scope["midstream"] = exchange
        started = time.perf_counter()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_extra_headers(exchange.id)]}
            await send(message)

        try:
            await self._pass(scope, headers, exchange, receive, answer)
        except (AccessError, EngineStopped) as error:
            exchange.fields["code"] = error.code
            await error_response(error)(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", exchange.id)
            if not status:
                error_500 = MidstreamError("the server failed; its log has the reason under this request's id")
                await error_response(error_500)(scope, receive, answer)
        finally:
            seconds = round(time.perf_counter() - started, 4)
            self._log(scope, exchange, status, seconds)

    async def _pass(
        self, scope: Scope, headers: dict[str, str], exchange: Exchange, receive: Receive, send: Send
    ) -> None:
        if not scope["path"].startswith(_GUARDED):
            await self._app(scope, receive, send)
            return
        exchange.caller = caller = self._caller(headers)
        if self._service.draining:
            raise EngineStopped("the server is shutting down: send the request to another one, or later")
        limit = self._service.config.max_streams_per_key
        if self._service.open_requests[caller.key] >= limit:
            raise TooManyStreams(f"{limit} requests of this key are open already; wait for one to end")
        self._service.open_requests[caller.key] += 1
        try:
            body = await self._body(headers, receive)
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._service.open_requests[caller.key] -= 1

    def _caller(self, headers: dict[str, str]) -> Caller:
        kind, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1") if kind.lower() == "bearer" else b""
        given = hashlib.sha256(sent).digest() if sent else b""
        admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        if not self._keys:
            return Caller(admin=admin)
        number = next((name for digest, name in self._keys.items() if hmac.compare_digest(given, digest)), None)
        if number is None and not admin:
            raise Unauthorized("a valid API key is needed: send it as `Authorization: Bearer KEY`")
        number = number or "admin"
        return Caller(key=number, scope=number if self._service.config.isolate_cache else "", admin=admin)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, within the limits of size and patience."""
        limit = self._service.config.max_body_kib * 1024
        too_large = BodyTooLarge(f"the request body is over the limit of {limit // 1024} KiB")
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        patience = self._service.config.stall_timeout_s
        try:
            async with asyncio.timeout(patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise BodyTimeout("the client left before its request was whole")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise BodyTimeout(f"the request body did not come within {patience:.0f} s") from error

    def _log(self, scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
        code = exchange.fields.get("code")
        if code is not None:
            self._service.telemetry.refused(code)
        fields = {
            "request_id": exchange.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": seconds,
            "key": exchange.caller.key,
            **exchange.fields,
        }
        log.info("%s %s %d", scope["method"], scope["path"], status, extra={"fields": fields})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then waits for the client to go."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _request_id(given: str | None) -> str:
    """The caller's own id where it is a harmless one, so that it can be followed through several services."""
    if given and len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


def _extra_headers(request_id: str) -> Iterable[tuple[bytes, bytes]]:
    yield b"x-request-id", request_id.encode()
    for name, value in _SAFE_HEADERS.items():
        yield name.encode(), value.encode()
