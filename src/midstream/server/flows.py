"""`/v1/flows`: intrinsics and answers composed, run beside the engine instead of by the client."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from midstream.errors import InputError, MidstreamError, PromptTooLong
from midstream.flows.events import Listener
from midstream.flows.run import FlowResult, Run
from midstream.retrieval import Bm25Retriever, Retriever, read_documents
from midstream.server.flow_bodies import (
    BODIES,
    AgentBody,
    BestOfNBody,
    FlowBody,
    GuardedBody,
    MajorityBody,
    RagBody,
    RepairBody,
    WeightedMajorityBody,
)
from midstream.server.middleware import error_response
from midstream.server.playing import Playing
from midstream.server.service import Exchange, Service
from midstream.server.stream import EventStream, unless_gone


def routes(service: Service) -> APIRouter:
    """The endpoints of one service. Reads its documents. Raises InputError where they cannot be read."""
    router = APIRouter()
    folder = service.config.docs
    docs = None if folder is None else Bm25Retriever(read_documents(folder))

    @router.post("/v1/flows/rag")
    async def rag(body: RagBody, http: HttpRequest) -> Response:
        """Answer a question from documents: guarded, rewritten, retrieved for, answered if it can be, and checked."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/best-of-n")
    async def best_of_n(body: BestOfNBody, http: HttpRequest) -> Response:
        """Draw several answers, score each by intrinsics, and take the best."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/majority")
    async def majority(body: MajorityBody, http: HttpRequest) -> Response:
        """Draw several answers and take the one that most agree on."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/weighted-majority")
    async def weighted_majority(body: WeightedMajorityBody, http: HttpRequest) -> Response:
        """Draw several answers, of which each counts as much as its score, and take the one with most weight."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/repair")
    async def repair(body: RepairBody, http: HttpRequest) -> Response:
        """Answer, judge the answer by requirements, and have it repaired until it meets all of them."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/guarded")
    async def guarded(body: GuardedBody, http: HttpRequest) -> Response:
        """Answer between two checks: of the question for attacks, and of the answer by requirements."""
        return await _served(service, http, body, docs)

    @router.post("/v1/flows/agent")
    async def agent(body: AgentBody, http: HttpRequest) -> Response:
        """Answer with the help of tools: a calculator, a search, and intrinsics."""
        return await _served(service, http, body, docs)

    endpoints = (rag, best_of_n, majority, weighted_majority, repair, guarded, agent)
    listed = [_described(body, inspect.getdoc(each) or "") for body, each in zip(BODIES, endpoints, strict=True)]

    @router.get("/v1/flows")
    async def list_flows() -> dict[str, Any]:
        """The flows: what each does, and the JSON schema of its settings."""
        return {"object": "list", "data": listed}

    return router


def _described(body: type[FlowBody], text: str) -> dict[str, Any]:
    return {
        "object": "flow",
        "name": body.flow,
        "description": text,
        "settings": body.settings_type().model_json_schema(),
    }


async def _served(service: Service, http: HttpRequest, body: FlowBody, docs: Retriever | None) -> Response:
    """Run a flow and answer with its result, or with its events and then its result."""
    exchange = Exchange.of(http)
    exchange.fields["flow"] = body.flow
    await _check_fits(service, body)

    async def flow(listener: Listener | None) -> FlowResult:
        return await _counted(service, http, body, docs, listener)

    if not body.stream:
        return _response(await unless_gone(http, flow(None)))
    playing = Playing(flow)
    try:
        begun = await unless_gone(http, playing.begun())
        if not begun:
            result = playing.result()
            if result.error is not None:
                return _response(result)
    except BaseException:
        await playing.aclose()
        raise
    return EventStream(playing, stall_s=service.config.stall_timeout_s)


async def _check_fits(service: Service, body: FlowBody) -> None:
    """Refuse a conversation that is too long before anything is done for it. A transcript renders it turn by turn."""
    tokens = await asyncio.to_thread(service.engine.chat.history, body.chat())
    room = service.engine.max_context_tokens
    if len(tokens) >= room:
        raise PromptTooLong(f"the conversation has {len(tokens)} tokens and the context {room}: send less of it")


async def _counted(
    service: Service, http: HttpRequest, body: FlowBody, docs: Retriever | None, listener: Listener | None
) -> FlowResult:
    """Run a flow within the server's limits, and count how it ended."""
    limit = service.config.request_timeout_s
    deadline_s = limit if body.deadline_s is None else min(limit, body.deadline_s)
    run = Run(deadline_s=deadline_s, max_tokens=body.max_tokens, seed=body.seed, on_event=listener)
    outcome = MidstreamError.code
    try:
        result = await body.perform(service.backend(http), run, docs)
        outcome = "ended" if result.error is None else result.error.code
        if result.error is not None:
            Exchange.of(http).fields["code"] = outcome
        return result
    except MidstreamError as error:
        outcome = error.code
        raise
    except asyncio.CancelledError:
        outcome = "left"
        raise
    finally:
        service.telemetry.flow_ended(body.flow, outcome)


def _response(result: FlowResult) -> Response:
    """A result; of a flow that was stopped, its error with what there is. Raises an InputError beside which there is
    nothing."""
    error = result.error
    if error is None:
        return JSONResponse(result.as_dict())
    if isinstance(error, InputError) and all(isinstance(call.outcome, MidstreamError) for call in result.calls):
        raise error
    return error_response(error, result=result.as_dict())
