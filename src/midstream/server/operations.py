"""Health, metrics, tokens, the cache as it is, and the playground's files."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from midstream.errors import InputError, ModelNotFound
from midstream.server.prompts import chat_of, prompt_of
from midstream.server.replies import error_object
from midstream.server.schemas import DetokenizeBody, TokenizeBody
from midstream.server.service import Exchange, Service

_PLAYGROUND = Path(__file__).parent / "playground"
_MAX_NODES = 500
# A page from the version before would speak to this one's interface.
_REVALIDATE = {"Cache-Control": "no-cache"}


def routes(service: Service) -> APIRouter:
    """The endpoints of one service."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while requests are taken, 503 while not, and why."""
        fault = service.engine.fault
        if service.draining:
            return JSONResponse({"status": "stopping"}, status_code=503)
        if fault is not None:
            return JSONResponse({"status": "unavailable", "error": error_object(fault)}, status_code=503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        stats = await service.engine.stats()
        return Response(service.telemetry.exposition(stats), media_type="text/plain; version=0.0.4")

    @router.get("/v1/cache")
    async def cache(http: HttpRequest) -> dict[str, Any]:
        """The KV cache: memory, hit rate and the tree's nodes. Under isolation, the caller's own nodes only, and no
        hits: they are counted over all keys."""
        scope = Exchange.of(http).caller.scope if service.config.isolate_cache else None
        view = await service.engine.cache_view(scope=scope, limit=_MAX_NODES + 1)
        stats, nodes = view.stats, view.nodes
        queried, hit = service.telemetry.queried_tokens, service.telemetry.hit_tokens
        return {
            "kv_used_bytes": stats.kv_used_bytes,
            "kv_total_bytes": stats.kv_total_bytes,
            "running": stats.running,
            "waiting": stats.queued,
            "prefix_cache_queries": queried if scope is None else None,
            "prefix_cache_hits": hit if scope is None else None,
            "hit_rate": hit / queried if scope is None and queried else None,
            "prefill_seconds_per_token": stats.prefill_seconds_per_token,
            "nodes": [asdict(node) for node in nodes[:_MAX_NODES]],
            "truncated": len(nodes) > _MAX_NODES,
        }

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text, or of messages as the named model would see them."""
        return await asyncio.to_thread(_tokenized, service, body)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids."""
        return await asyncio.to_thread(_detokenized, service, body)

    if service.config.playground:
        _add_playground(router)
    return router


def _add_playground(router: APIRouter) -> None:
    files = {path.name: path for path in _PLAYGROUND.iterdir() if path.is_file()}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(files["index.html"], headers=_REVALIDATE)

    @router.get("/playground/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise ModelNotFound(f"the playground has no file {name!r}")
        return FileResponse(files[name], headers=_REVALIDATE)


def _tokenized(service: Service, body: TokenizeBody) -> dict[str, Any]:
    tokens = _tokens(service, body)
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.engine.max_context_tokens,
        "tokens": list(tokens),
    }
    if body.return_token_strs:
        found["token_strs"] = [service.engine.chat.token_text(token) for token in tokens]
    return found


def _detokenized(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    service.adapter_of(body.model)
    wrong = next((token for token in body.tokens if token >= service.engine.vocab_size), None)
    if wrong is not None:
        raise InputError(f"token id {wrong} is not in the vocabulary of {service.engine.vocab_size}")
    return {"prompt": service.engine.chat.decode(body.tokens)}


def _tokens(service: Service, body: TokenizeBody) -> tuple[int, ...]:
    adapter, template_arguments = service.chosen(body.model, body.chat_template_kwargs)
    tokenizer = service.engine.chat
    if body.chat is not None:
        return tokenizer.of(body.chat, header=body.add_generation_prompt)
    if body.messages is None:
        return tokenizer.encode(body.prompt or "")
    chat = chat_of(body.messages, body.documents, body.tools, template_arguments)
    return prompt_of(tokenizer, chat, adapter, with_header=body.add_generation_prompt)
