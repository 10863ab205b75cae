"""HTTP to one server: JSON and server-sent events, within time limits, with every fault a typed error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import httpx

from midstream.errors import BackendError, EngineStopped, InputError, MidstreamError
from midstream.remote.affinity import SESSION_HEADER
from midstream.remote.faults import error_of_object, error_of_response, is_lost
from midstream.remote.repeat import Lost, repeated

_JSON = {"content-type": "application/json"}


class Channel:
    """Requests to one server. `url` is its address without credentials and without /v1.

    Where the answer was lost with its replica, a request is sent again, up to `repeats` times. Connections belong to
    the event loop in which they were opened.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        connect_timeout_s: float,
        repeats: int,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        root, auth = _address(url, api_key)
        self.url = str(root)
        self.repeats = repeats
        self._timeout_s = timeout_s
        self._options: dict[str, Any] = {
            "base_url": root,
            "headers": {} if api_key is None else {"authorization": f"Bearer {_header_safe(api_key)}"},
            "auth": auth,
            "timeout": httpx.Timeout(timeout_s, connect=connect_timeout_s),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
            "transport": transport,
        }
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()
        self._closed = False

    async def get(self, path: str) -> Any:
        """The JSON object at a path."""
        return await repeated(lambda: self._once("GET", path, None, {}), self.repeats)

    async def post(self, path: str, body: dict[str, Any], *, session: str | None = None) -> Any:
        """The JSON object that answers a body. `session`: whose requests a router is to keep to one replica."""
        content, headers = _written(body), _headers(session)
        return await repeated(lambda: self._once("POST", path, content, headers), self.repeats)

    async def tell(self, path: str, body: dict[str, Any]) -> None:
        """Send a body whose answer says nothing but that it was taken. Never sent twice: it changes the server."""
        await repeated(lambda: self._response("POST", path, _written(body), _JSON), 0)

    async def text(self, path: str) -> str:
        """The text at a path."""
        return (await repeated(lambda: self._response("GET", path, None, {}), self.repeats)).text

    async def events(
        self, path: str, body: dict[str, Any], *, session: str | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events that answer a body, of one try: raises Lost where they break off or do not end with [DONE].

        Closing the iterator closes the connection.
        """
        content, headers = _written(body), _headers(session)
        with self._faults():
            async with self._client().stream("POST", path, content=content, headers=headers) as response:
                if not response.is_success:
                    raise _told(error_of_response(self.url, response.status_code, await response.aread()), response)
                async for line in _lines(response.aiter_bytes()):
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield self._object(data)
        raise Lost(BackendError(f"the stream of {self.url} ended before it was whole: send the request again"))

    async def aclose(self) -> None:
        """Close the connections of this event loop. Later requests raise EngineStopped."""
        self._closed = True
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _once(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> dict[str, Any]:
        return self._object((await self._response(method, path, content, headers)).content)

    async def _response(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> httpx.Response:
        with self._faults():
            response = await self._client().request(method, path, content=content, headers=headers)
        if not response.is_success:
            raise _told(error_of_response(self.url, response.status_code, response.content), response)
        return response

    def _client(self) -> httpx.AsyncClient:
        if self._closed:
            raise EngineStopped(f"the backend to {self.url} was closed: make a new one")
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(**self._options)
        return self._clients[loop]

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Faults of the connection. A silent server is no lost one: it may be busy, and would be all the more so."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Lost(BackendError(f"{self.url} cannot be reached ({error}): is a server running there?")) from error
        except httpx.TimeoutException as error:
            raise BackendError(
                f"{self.url} sent or took nothing for {self._timeout_s:g} s: it may be overloaded, or needs a larger "
                "timeout_s"
            ) from error
        except httpx.HTTPError as error:
            raise Lost(
                BackendError(
                    f"the connection to {self.url} broke off ({error or type(error).__name__}): send the request again"
                )
            ) from error

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BackendError(
                f"{self.url} answered with what is no JSON: is it an OpenAI-compatible server?"
            ) from error
        if not isinstance(found, dict):
            raise BackendError(f"{self.url} answered with JSON that is no object: is it an OpenAI-compatible server?")
        if isinstance(found.get("error"), dict):
            raise _told(error_of_object(self.url, found["error"]))
        return found


def _told(error: MidstreamError, response: httpx.Response | None = None) -> MidstreamError | Lost:
    """What a server said, and whether it said that it is lost."""
    return Lost(error) if is_lost(error, None if response is None else response.status_code) else error


def _headers(session: str | None) -> dict[str, str]:
    return _JSON if session is None else {**_JSON, SESSION_HEADER: session}


def _address(url: str, api_key: str | None) -> tuple[httpx.URL, httpx.BasicAuth | None]:
    """Where the server is, and the credentials that the address itself holds."""
    # No message repeats the address: it may hold a password.
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"the backend's address cannot be read: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("the backend's address must begin with http:// or https:// and a host: http://localhost:8000")
    if parsed.query or parsed.fragment:
        raise InputError("the backend's address cannot have a query or a fragment: give it up to /v1")
    auth = httpx.BasicAuth(parsed.username, parsed.password) if parsed.userinfo else None
    if auth is not None and api_key is not None:
        raise InputError("give either an api_key or credentials in the backend's address, not both")
    path = parsed.path.rstrip("/").removesuffix("/v1")
    return parsed.copy_with(username=None, password=None, path=path or "/"), auth


def _header_safe(api_key: str) -> str:
    if not (api_key.isascii() and api_key.isprintable()):
        raise InputError("the api_key has characters that no HTTP header can hold")
    return api_key


def _written(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the request cannot be written as JSON: {error}") from error


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines as they are whole. Only a newline ends one: JSON may hold Unicode's other line separators as they are."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line
