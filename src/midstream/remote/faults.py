"""From a server's refusal to the very error it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from midstream.errors import (
    BackendError,
    BodyTimeout,
    BodyTooLarge,
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    Forbidden,
    InputError,
    MidstreamError,
    ModelNotFound,
    OverloadedError,
    PromptTooLong,
    Unauthorized,
)

_SHOWN = 300
# What vLLM says, with status 500, of all that its engine had running when that died.
_DEAD = "EngineCore encountered an issue"
_BY_STATUS: dict[int, type[MidstreamError]] = {
    401: Unauthorized,
    403: Forbidden,
    408: BodyTimeout,
    413: BodyTooLarge,
    429: OverloadedError,
    499: Cancelled,
    503: EngineStopped,
    504: DeadlineExceeded,
}


class PathMissing(BackendError):
    """The server has no such endpoint."""


def error_of_response(url: str, status: int, content: bytes) -> MidstreamError:
    """The error of a reply that is none of success. Servers without our codes are read by status."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error_of_object(url, error, status)
    text = content[:_SHOWN].decode(errors="replace").strip()
    return _by_status(url, status, text or "no reason was given", "")


def error_of_object(url: str, error: dict[str, Any], status: int = 500) -> MidstreamError:
    """The error of OpenAI's error object, which a stream may also carry."""
    message, code = str(error.get("message")), error.get("code")
    known = _BY_CODE.get(code) if isinstance(code, str) else None
    if known is not None:
        return known(message.removesuffix(f" ({code})"))
    if isinstance(code, int) and status == 500:
        status = code  # vLLM repeats the status there
    return _by_status(url, status, message, str(error.get("type")))


def is_lost(error: MidstreamError, status: int | None) -> bool:
    """Whether an error says that a replica is gone or going, so that another one may be asked: not that it failed."""
    return status == 502 or isinstance(error, EngineStopped) or _DEAD in str(error)


def _by_status(url: str, status: int, message: str, kind: str) -> MidstreamError:
    where = f"{message} ({url} answered {status})"
    if status in _BY_STATUS:
        return _BY_STATUS[status](where)
    if status == 404:
        # vLLM's name for an unknown model; any other 404 is a path that the server does not have.
        return ModelNotFound(where) if kind == "NotFoundError" else PathMissing(f"{where}: is it the right server?")
    if "maximum context length" in message:
        return PromptTooLong(where)
    return InputError(where) if 400 <= status < 500 else BackendError(where)


def _tree(root: type[MidstreamError]) -> Iterator[type[MidstreamError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def _by_code() -> dict[str, type[MidstreamError]]:
    """The highest class of each code. Those that are made of more than a message are never sent by a server."""
    found: dict[str, type[MidstreamError]] = {}
    for kind in _tree(MidstreamError):
        if kind.__init__ is MidstreamError.__init__:
            found.setdefault(kind.code, kind)
    return found


_BY_CODE = _by_code()
