"""`/v1/chat/completions`, `/v1/completions` and `/v1/score_continuations`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from midstream.errors import InputError, MidstreamError
from midstream.server import replies
from midstream.server.invocables import invocables_of
from midstream.server.params import defaults_of, max_tokens_of, params_of, wrong
from midstream.server.prompts import chat_of, prompt_of
from midstream.server.replies import Head, Shown
from midstream.server.schemas import ChatBody, Sampling, ScoreBody, TextBody
from midstream.server.service import Exchange, Service
from midstream.server.stream import DONE, EventStream, event, unless_gone
from midstream.together import together
from midstream.types import AdapterInfo, Completion, CompletionChoice, Delta, Invocable, Request, SamplingParams

Chunk = Callable[[Delta, bool], dict[str, Any]]
End = Callable[[CompletionChoice, Completion], dict[str, Any]]

# OpenAI's defaults of the older endpoint, which knows nothing of an adapter's contract.
_MAX_PROMPTS = 128
_TEXT = SamplingParams(temperature=1.0, max_tokens=16)


def routes(service: Service) -> APIRouter:
    """The endpoints of one service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation with the base model, or with the adapter that `model` names."""
        adapter, template_arguments = service.chosen(body.model, body.chat_template_kwargs)
        chat = chat_of(body.messages, body.documents, _tools(body), template_arguments)
        prompt = await asyncio.to_thread(
            prompt_of, service.engine.chat, chat, adapter, with_header=body.add_generation_prompt
        )
        asked = body.max_completion_tokens or body.max_tokens
        logprobs = bool(body.logprobs)
        defaults = defaults_of(adapter, max_tokens=service.config.default_max_tokens)
        invocable = await invocables_of(service.backend(http), body.invocable)
        request = _request(service, body, prompt, adapter, defaults, asked, logprobs, body.top_logprobs or 0, invocable)
        head, shown = Head.chat(adapter.name if adapter else service.model_name), _shown(body, logprobs)
        if not body.stream:
            completion = await unless_gone(http, service.backend(http).complete(request))
            return JSONResponse(replies.chat_completion(head, completion, shown))

        def chunk(delta: Delta, first: bool) -> dict[str, Any]:
            return replies.chat_chunk(head, delta, shown, first=first, prompt=prompt)

        def end(choice: CompletionChoice, completion: Completion) -> dict[str, Any]:
            return replies.chat_end(head, choice, completion)

        return await _streamed(service, http, body, request, head, chunk, end)

    @router.post("/v1/completions")
    async def completions(body: TextBody, http: HttpRequest) -> Response:
        """Go on with a text, several texts, or token ids. An activated adapter's invocation must be in them."""
        adapter = service.adapter_of(body.model)
        prompts = await asyncio.to_thread(_prompts, service, body)
        logprobs = body.logprobs is not None
        invocable = await invocables_of(service.backend(http), body.invocable)
        requests = [
            _request(service, body, prompt, adapter, _TEXT, body.max_tokens, logprobs, body.logprobs or 0, invocable)
            for prompt in prompts
        ]
        head, shown = Head.text(adapter.name if adapter else service.model_name), _shown(body, logprobs)
        backend = service.backend(http)
        if not body.stream:
            completions = await unless_gone(http, together([backend.complete(request) for request in requests]))
            return JSONResponse(replies.text_completion(head, completions, shown))
        if len(requests) > 1:
            raise InputError("stream takes one prompt: send several requests, or do not stream")
        lengths: dict[int, int] = {}

        def chunk(delta: Delta, first: bool) -> dict[str, Any]:
            offset = lengths.get(delta.index, 0)
            lengths[delta.index] = offset + sum(len(token.text) for token in delta.logprobs)
            return replies.text_chunk(head, delta, shown, offset=offset, first=first, prompt=prompts[0])

        def end(choice: CompletionChoice, completion: Completion) -> dict[str, Any]:
            return replies.text_end(head, choice, completion)

        return await _streamed(service, http, body, requests[0], head, chunk, end)

    @router.post("/v1/score_continuations")
    async def score_continuations(body: ScoreBody, http: HttpRequest) -> Response:
        """Log-probabilities of each token of several continuations of one prompt."""
        adapter = service.adapter_of(body.model)
        name = adapter.name if adapter else None
        request = Request(prompt=tuple(body.prompt), adapter=name, cache_scope=body.cache_salt or "")
        found = await unless_gone(http, service.backend(http).score(request, body.continuations))
        return JSONResponse(replies.score(name or service.model_name, found))

    return router


async def _streamed(
    service: Service, http: HttpRequest, body: Sampling, request: Request, head: Head, chunk: Chunk, end: End
) -> Response:
    """Answer with events. What fails before the first of them is a plain error with its own status."""
    deltas = service.backend(http).stream(request)
    try:
        first = await unless_gone(http, anext(deltas))
    except BaseException:
        await deltas.aclose()
        raise
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    exchange = Exchange.of(http)
    events = _events(first, deltas, head, chunk, end, with_usage=with_usage, exchange=exchange)
    return EventStream(events, stall_s=service.config.stall_timeout_s)


async def _events(
    first: Delta,
    rest: AsyncGenerator[Delta, None],
    head: Head,
    chunk: Chunk,
    end: End,
    *,
    with_usage: bool,
    exchange: Exchange,
) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    # OpenAI sends a null usage in every chunk but the last, where usage is asked for.
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    async with aclosing(rest):
        try:
            delta = first
            while delta.completion is None:
                yield event({**chunk(delta, delta.index not in begun), **empty})
                begun.add(delta.index)
                delta = await anext(rest)
            for choice in delta.completion.choices:
                yield event({**end(choice, delta.completion), **empty})
            if with_usage:
                kind = "chat.completion.chunk" if head.id.startswith("chat") else "text_completion"
                used = replies.usage(delta.completion.usage)
                yield event(head.of(kind, [], usage=used, **replies.times(delta.completion)))
        except MidstreamError as error:
            exchange.fields["code"] = error.code
            yield event({"error": replies.error_object(error)})
        yield DONE


def _tools(body: ChatBody) -> Sequence[dict[str, Any]] | None:
    return None if body.tool_choice == "none" else body.tools


def _prompts(service: Service, body: TextBody) -> list[tuple[int, ...]]:
    prompt = body.prompt
    if len(prompt) > _MAX_PROMPTS and not isinstance(prompt, str) and not isinstance(prompt[0], int):
        raise InputError(f"prompt has {len(prompt)} texts: send at most {_MAX_PROMPTS} at a time")
    if isinstance(prompt, str):
        return [service.engine.chat.encode(prompt)]
    if not prompt:
        raise InputError("prompt is an empty list")
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [service.engine.chat.encode(one) if isinstance(one, str) else tuple(one) for one in prompt]


def _request(
    service: Service,
    body: Sampling,
    prompt: tuple[int, ...],
    adapter: AdapterInfo | None,
    defaults: SamplingParams,
    asked: int | None,
    logprobs: bool,
    top_logprobs: int,
    invocable: tuple[Invocable, ...],
) -> Request:
    context = service.engine.max_context_tokens
    max_tokens = max_tokens_of(asked, len(prompt), default=defaults.max_tokens, context=context)
    params = params_of(body, defaults, max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs)
    name = adapter.name if adapter else None
    try:
        return Request(
            prompt=prompt,
            adapter=name,
            params=params,
            cache_scope=body.cache_salt or "",
            invocable=invocable,
            max_invocations=body.max_invocations,
        )
    except ValidationError as error:
        raise wrong(error) from error


def _shown(body: Sampling, logprobs: bool) -> Shown:
    return Shown(logprobs, bool(body.return_token_ids), bool(body.return_tokens_as_token_ids))
