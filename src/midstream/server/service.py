"""What all endpoints share: the engine, its names, and how a request is run, counted and given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from midstream.config import ServerConfig
from midstream.errors import InputError, ModelNotFound
from midstream.intrinsics.call import find
from midstream.server.served import ServedEngine
from midstream.server.telemetry import Telemetry
from midstream.server.tracing import span
from midstream.types import AdapterInfo, Completion, Delta, Request, Score

log = logging.getLogger("midstream.server")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: a key's number ("" where none are set), where its KV is shared, and what it may do."""

    key: str = ""
    scope: str = ""
    admin: bool = False


@dataclass(slots=True)
class Exchange:
    """One HTTP request as the middleware and the endpoints see it. `fields` go into its log line."""

    id: str
    caller: Caller = field(default_factory=Caller)
    fields: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(request: HttpRequest) -> Exchange:
        exchange: Exchange = request.scope["midstream"]
        return exchange


class Service:
    """One engine behind one server."""

    def __init__(self, engine: ServedEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_name = config.served_name or engine.model_name
        self.telemetry = Telemetry(self.model_name)
        self.started = int(time.time())
        self.draining = False
        self.open_requests: Counter[str] = Counter()

    def adapter_of(self, model: str | None) -> AdapterInfo | None:
        """The adapter of that model name, None for the base model. Raises ModelNotFound, which lists what there is."""
        if model is None or model in (self.model_name, self.engine.model_name):
            return None
        found = self.engine.adapter(model)
        if found is None:
            names = ", ".join([self.model_name, *(info.name for info in self.engine.adapter_infos())])
            raise ModelNotFound(f"model {model!r} does not exist; there are: {names}")
        return found

    def chosen(
        self, model: str | None, template_arguments: dict[str, Any] | None
    ) -> tuple[AdapterInfo | None, dict[str, Any]]:
        """The adapter that `model` or `chat_template_kwargs.adapter_name` names, and the template's own arguments."""
        arguments = dict(template_arguments or {})
        named = arguments.pop("adapter_name", None)
        if named is not None and not isinstance(named, str):
            raise InputError("chat_template_kwargs.adapter_name is not a text")
        adapter = self.adapter_of(model)
        if named is None or (adapter is not None and adapter.name == named):
            return adapter, arguments
        if adapter is not None:
            raise InputError(f"one adapter per request: model names {adapter.name}, adapter_name names {named}")
        return self.adapter_of(named), arguments

    def intrinsic_of(self, name: str) -> AdapterInfo:
        """The adapter of that name. Raises AdapterNotFound: what there is, or why it cannot be called."""
        return self.engine.adapter(name) or find({info.name: info for info in self.engine.adapter_infos()}, name)

    def backend(self, request: HttpRequest) -> ScopedBackend:
        """The engine as this caller's requests see it."""
        return ScopedBackend(self, Exchange.of(request), dict(request.headers))


# One HTTP request may be a flow of many; so many are before the engine at a time, whose queue is for all.
_AT_ONCE = 16


class ScopedBackend:
    """The engine for one HTTP request: its cache scope and deadline, counted, logged and traced. A Backend.

    At most 16 requests at a time reach the engine; what begins beyond that waits here.
    """

    def __init__(self, service: Service, exchange: Exchange, headers: dict[str, str]) -> None:
        self._service = service
        self._exchange = exchange
        self._headers = headers
        self._deadline = time.monotonic() + service.config.request_timeout_s
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def complete(self, request: Request) -> Completion:
        async with self._room:
            return await self._complete(request)

    async def _complete(self, request: Request) -> Completion:
        with span("midstream.complete", self._headers, self._attributes(request)) as current:
            completion = await self._service.engine.complete(self._mine(request))
            self._finish(completion, current)
        return completion

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        # The span is not made current: a generator may be closed in another context than it was begun in.
        async with self._room, aclosing(self._service.engine.stream(self._mine(request))) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    with span("midstream.stream", self._headers, self._attributes(request)) as current:
                        self._finish(delta.completion, current)
                yield delta

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        async with self._room:
            return await self._service.engine.score(self._mine(request), continuations)

    async def tokenize(self, prompt: Any, *, header: bool = True) -> tuple[int, ...]:
        return await self._service.engine.tokenize(prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return self._service.engine.adapter_infos()

    def _mine(self, request: Request) -> Request:
        left = max(0.001, self._deadline - time.monotonic())
        return request.model_copy(update={"cache_scope": self._scope(request.cache_scope), "deadline_s": left})

    def _scope(self, salt: str) -> str:
        """The caller's scope, and within it that of a salt. Callers' own scopes have no colon."""
        own = self._exchange.caller.scope
        return f"{own}:{salt}" if salt else own

    def _attributes(self, request: Request) -> dict[str, Any]:
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": request.adapter or self._service.model_name,
            "gen_ai.request.max_tokens": request.params.max_tokens,
            "midstream.request_id": self._exchange.id,
        }

    def _finish(self, completion: Completion, current: Any) -> None:
        self._service.telemetry.finished(completion)
        usage = completion.usage
        totals = self._exchange.fields
        for name, value in usage.as_dict().items():
            totals[name] = totals.get(name, 0) + value
        totals["model"] = completion.adapter or self._service.model_name
        if completion.time_to_first_token_s is not None:
            totals["first_token_s"] = round(completion.time_to_first_token_s, 4)
        if self._service.config.log_text:
            decode = self._service.engine.chat.decode
            totals.setdefault("prompts", []).append(decode(completion.prompt_token_ids))
            totals.setdefault("answers", []).extend(choice.text for choice in completion.choices)
        if current is not None:
            current.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "midstream.cached_tokens": usage.cached_tokens,
                }
            )
