"""`/v1/intrinsics`: adapters as functions, one or several on one conversation."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from midstream.errors import MidstreamError
from midstream.intrinsics import call_intrinsic, call_intrinsics, load_contract
from midstream.server import replies
from midstream.server.prompts import chat_of
from midstream.server.schemas import FanOutBody, IntrinsicBody
from midstream.server.service import Exchange, Service
from midstream.server.stream import unless_gone
from midstream.types import AdapterInfo


def routes(service: Service) -> APIRouter:
    """The endpoints of one service."""
    router = APIRouter()

    @router.get("/v1/intrinsics")
    async def list_intrinsics() -> dict[str, Any]:
        """What can be called, what it judges and which arguments it takes. A plain LoRA needs a text that calls it."""
        callable_ones = [i for i in service.engine.adapter_infos() if i.invocation_tokens or i.invocation_text]
        return {"object": "list", "data": [_described(info) for info in callable_ones]}

    @router.post("/v1/intrinsics")
    async def fan_out(body: FanOutBody, http: HttpRequest) -> Response:
        """Several intrinsics on one conversation: one shared prefix, one batch. One that fails leaves the others."""
        started = time.perf_counter()
        chat = chat_of(body.messages, body.documents)
        work = call_intrinsics(service.backend(http), body.names, chat, body.arguments)
        results = await unless_gone(http, work)
        data = [
            {"object": "intrinsic.error", "intrinsic": name, "error": replies.error_object(result)}
            if isinstance(result, MidstreamError)
            else replies.intrinsic_result(result)
            for name, result in zip(body.names, results, strict=True)
        ]
        codes = [result.code for result in results if isinstance(result, MidstreamError)]
        if codes:
            Exchange.of(http).fields["codes"] = codes
        return JSONResponse({"object": "list", "data": data, "seconds": time.perf_counter() - started})

    @router.post("/v1/intrinsics/{name:path}")
    async def call(name: str, body: IntrinsicBody, http: HttpRequest) -> Response:
        """Call one intrinsic on a conversation."""
        adapter = service.intrinsic_of(name)
        chat = chat_of(body.messages, body.documents)
        work = call_intrinsic(service.backend(http), adapter, chat, body.arguments)
        return JSONResponse(replies.intrinsic_result(await unless_gone(http, work)))

    return router


def _described(info: AdapterInfo) -> dict[str, Any]:
    contract = load_contract(info)
    options = contract.options()
    return {
        "object": "intrinsic",
        "name": info.name,
        "kind": info.kind,
        "rank": info.rank,
        "digest": info.digest,
        "reads": info.metadata.get("reads", "any"),
        "arguments": sorted(contract.arguments),
        "labels": list(options) or None,
        "response_format": contract.json_schema,
        "invocation_text": info.invocation_text,
    }
