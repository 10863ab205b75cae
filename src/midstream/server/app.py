"""The ASGI application of one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from midstream.config import ServerConfig
from midstream.errors import InputError, MidstreamError
from midstream.server import completions, flows, intrinsics, models, operations
from midstream.server.middleware import Front, error_response
from midstream.server.served import ServedEngine
from midstream.server.service import Exchange, Service


def create_app(engine: ServedEngine, config: ServerConfig | None = None) -> FastAPI:
    """An application over an engine that is ready. Closes it when it shuts down. `app.state.service` is its state."""
    service = Service(engine, config or ServerConfig())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.draining = True
        await engine.aclose()

    app = FastAPI(
        title="midstream",
        version=version("midstream"),
        description="Activated LoRA adapters on one shared KV cache, behind OpenAI's interface.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for each in (completions, intrinsics, flows, models, operations):
        app.include_router(each.routes(service))
    app.add_exception_handler(MidstreamError, _midstream_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Front, service=service)
    return app


async def _midstream_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, MidstreamError)
    Exchange.of(http).fields["code"] = error.code
    return error_response(error)


async def _validation_error(http: HttpRequest, error: Exception) -> Response:
    """All that is wrong with a body, in one message; `param` names the first place."""
    assert isinstance(error, RequestValidationError)
    places = [(".".join(map(str, e["loc"][1:])) or str(e["loc"][0]), e["msg"]) for e in error.errors()]
    message = "; ".join(f"{place}: {reason}" for place, reason in places[:8])
    if len(places) > 8:
        message += f"; and {len(places) - 8} more"
    Exchange.of(http).fields["code"] = InputError.code
    return error_response(InputError(message), places[0][0])


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods, in the same shape as every other error."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request_error")
    body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)
