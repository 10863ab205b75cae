"""RemoteBackend: the Backend protocol spoken with a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Self

import httpx

from midstream.adapters.activation import activation_index, find_last
from midstream.errors import (
    AdapterNotFound,
    BackendError,
    DeadlineExceeded,
    InputError,
    InvocationError,
    ModelError,
    ModelNotFound,
    Unsupported,
)
from midstream.remote.affinity import Sessions
from midstream.remote.answer import AnswerReader, Asked
from midstream.remote.catalogue import Catalogue, read_catalogue
from midstream.remote.channel import Channel
from midstream.remote.faults import PathMissing
from midstream.remote.folders import Described, read_folders
from midstream.remote.load import Load, read_load
from midstream.remote.options import Parting, find_parting
from midstream.remote.reply import ChoiceReply, Reply, ScoreReply, checked, joined
from midstream.remote.request import completion_body, score_body, with_logprobs
from midstream.remote.resume import resumed
from midstream.remote.scoring import prompt_logprobs_body, scored
from midstream.remote.tokens import Tokens, TokenSource, difference
from midstream.types import AdapterInfo, Chat, Choice, Completion, Delta, Request, Score

_COMPLETIONS = "v1/completions"
# A caller may ask for ever new options; those of contracts are few.
_MAX_PARTINGS = 1024


class RemoteBackend:
    """A midstream server, or vLLM 0.10.2 or later, as a Backend. An asynchronous context manager.

    `url` is the server's address, with or without /v1. `model`: the base model's name, by default what the server
    lists. `timeout_s`: how long the server may stay silent; a request's own deadline bounds it whole. `adapters`:
    PEFT folders of adapters that the server serves under the folder's name without saying how they are called, as
    vLLM does; or what was read of such folders. `tokens`: the model's tokenizer, where it is at hand; else the server
    is asked. `look_up`: off, what is served is asked for by `catalogue` alone, not for each call of an adapter.
    `repeats`: how often a request is sent again whose replica was lost before its answer was whole; 0 sends nothing
    twice. `transport`: for networks of one's own.

    Behind `url` there may be a router to several replicas: each request says in the header x-session-id to which
    conversation it belongs, the same for the base model and all adapters.

    Every verb raises what the engine would, the server's error as its own type, and BackendError where the server
    cannot be reached or understood. Cancelling a call or closing a stream closes its connection, which frees its KV.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        repeats: int = 3,
        adapters: Sequence[Described] = (),
        tokens: TokenSource | None = None,
        look_up: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._channel = Channel(
            url,
            api_key=api_key,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            repeats=repeats,
            transport=transport,
        )
        self._server_tokens = Tokens(self._channel)
        self._tokens: TokenSource = tokens or self._server_tokens
        self._answers = AnswerReader(self._tokens, self._channel.url)
        self._model = model
        self._look_up = look_up
        self._local = read_folders(adapters)
        self._known: Catalogue | None = None
        self._sessions = Sessions(self.tokenize)
        self._partings: dict[tuple[str, ...], Parting | None] = {}

    @property
    def url(self) -> str:
        """The server's address, without credentials."""
        return self._channel.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Later requests raise EngineStopped."""
        await self._channel.aclose()

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion:
        """Run a request to its end."""
        async with _until(_end_of(request), request):
            asked = await self._asked(request)
            with _as_adapter(request):
                answered = await self._channel.post(_COMPLETIONS, asked.body, session=asked.session)
                reply = checked(Reply, answered, self.url)
            return await self._answers.completion(asked, reply)

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Run a request and yield its text as it comes. Closing the iterator cancels the request."""
        end = _end_of(request)
        async with _until(end, request):
            asked = await self._asked(request)
        pieces: dict[int, list[ChoiceReply]] = {}
        last = Reply()
        async with aclosing(self._replies(asked, end)) as replies:
            async for reply in replies:
                last = reply if reply.usage is not None else last
                for piece in reply.choices:
                    pieces.setdefault(piece.index, []).append(piece)
                    if piece.text or piece.token_ids:
                        asked.mark_first_token()
                        async with _until(end, request):
                            delta = await self._answers.delta(asked, piece)
                        yield delta
        whole = last.model_copy(update={"choices": [joined(pieces[index]) for index in sorted(pieces)]})
        async with _until(end, request):
            completion = await self._answers.completion(asked, whole)
        yield Delta(0, "", completion=completion)

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        """Log-probabilities of each continuation (token ids) after the prompt.

        vLLM reads each as a prompt of its own, and its prefix is not reused.
        """
        if request.invocable:
            raise InputError("score writes no output that could invoke an adapter: leave `invocable` out")
        async with _until(_end_of(request), request):
            asked = await self._asked(request)
            with _as_adapter(request):
                if self._ours:
                    body = score_body(request, asked.prompt, continuations, asked.model)
                    found = await self._channel.post("v1/score_continuations", body, session=asked.session)
                    return checked(ScoreReply, found, self.url).score()
                return await self._score_as_prompts(asked, continuations)

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        base = (await self._catalogue()).base
        if isinstance(prompt, str):
            return await self._tokens.of_text(prompt, base)
        return await self._tokens.of_chat(prompt, base, header=header, ours=self._ours)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests may name, asked of the server each time: one may be replaced under its name.

        One that the server does not describe and no local folder either is not among them.
        """
        return (await self.catalogue()).adapters

    # ------------------------------------------------------------------ the server itself

    async def catalogue(self) -> Catalogue:
        """What the server serves now."""
        reply = await self._channel.get("v1/models")
        self._known = read_catalogue(reply, self.url, base=self._model, local=self._local)
        return self._known

    async def check_tokens(self) -> None:
        """Raises ModelError where the server's model has other tokens than `tokens`, PathMissing where it cannot be
        asked."""
        catalogue = await self._catalogue()
        found = await difference(self._tokens, self._server_tokens, catalogue.base, ours=catalogue.ours)
        if found is not None:
            raise ModelError(f"{self.url} serves {catalogue.base}, whose {found} is another one than the model's here")

    async def load(self) -> Load:
        """How busy the server is, as its metrics say."""
        return read_load(await self._channel.text("metrics"))

    async def load_adapter(self, adapter: Described) -> AdapterInfo:
        """Have the server load a PEFT folder, which it must find under the same path; one of the same name is replaced.

        Raises Unsupported where the server loads none while it runs.
        """
        (info,) = (await asyncio.to_thread(read_folders, [adapter])).values()
        catalogue = await self.catalogue()
        served = {*catalogue.undescribed, *(each.name for each in catalogue.adapters)}
        body = {"lora_name": info.name, "lora_path": info.path, "load_inplace": info.name in served}
        await self._change("v1/load_lora_adapter", body)
        self._local[info.name] = info
        return (await self.catalogue()).find(info.name)

    async def unload_adapter(self, name: str) -> None:
        """Have the server take an adapter out. Raises AdapterNotFound, and Unsupported as `load_adapter` does."""
        try:
            await self._change("v1/unload_lora_adapter", {"lora_name": name})
        except ModelNotFound as error:
            raise AdapterNotFound(str(error)) from error
        self._local.pop(name, None)
        await self.catalogue()

    # ------------------------------------------------------------------ inside

    async def _change(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._channel.tell(path, body)
        except PathMissing as error:
            raise Unsupported(
                f"{self.url} loads no adapters while it runs: vLLM does with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            ) from error

    @property
    def _ours(self) -> bool:
        """Whether it is a midstream server; known once the catalogue has been read."""
        return self._known is not None and self._known.ours

    async def _catalogue(self, *, fresh: bool = False) -> Catalogue:
        """What the server serves. The base model stays; adapters may change, so whoever needs them asks anew."""
        return await self.catalogue() if fresh or self._known is None else self._known

    async def _asked(self, request: Request) -> Asked:
        """A request with its prompt's tokens. Raises InputError for what the engine would refuse before it runs."""
        started = time.perf_counter()
        looked_up = request.adapter is not None and (request.invoke or not self._ours)
        catalogue = await self._catalogue(fresh=looked_up and self._look_up)
        info = catalogue.find(request.adapter) if looked_up and request.adapter is not None else None
        prompt = await self._prompt(request, info)
        model = request.adapter or catalogue.base
        asked = Asked(request, prompt, model, completion_body(request, prompt, model), started=started)
        if not catalogue.ours:
            await self._prepare_plain(asked, info)
        asked.session = await self._sessions.of(prompt, request.cache_scope, self._invoked(asked, info))
        return asked

    def _invoked(self, asked: Asked, info: AdapterInfo | None) -> int | None:
        """Where the adapter's invocation begins, so far as that is known without asking."""
        adapters = () if self._known is None else self._known.adapters
        known = info or next((each for each in adapters if each.name == asked.request.adapter), None)
        return asked.activation_index if known is None else find_last(asked.prompt, known.invocation_tokens)

    async def _prompt(self, request: Request, info: AdapterInfo | None) -> tuple[int, ...]:
        tokens = request.prompt
        if isinstance(tokens, Chat):
            tokens = await self.tokenize(tokens, header=not request.invoke)
        return (*tokens, *await self._invocation(info)) if request.invoke else tokens

    async def _invocation(self, info: AdapterInfo | None) -> tuple[int, ...]:
        """The tokens that call an adapter: an aLoRA's invocation tokens, or a plain LoRA's calling text."""
        if info is None:
            raise InvocationError("invoke needs an adapter: name one in `adapter`")
        if info.invocation_tokens:
            return info.invocation_tokens
        if info.invocation_text:
            return await self.tokenize(info.invocation_text)
        raise InvocationError(
            f"adapter {info.name} is a plain LoRA without a calling text, so nothing can be appended to invoke it: "
            "send a prompt that asks for its answer instead"
        )

    async def _prepare_plain(self, asked: Asked, info: AdapterInfo | None) -> None:
        """What a server without our extensions does not say or refuse itself."""
        if asked.request.invocable:
            raise InputError(f"{self.url} is no midstream server, so the base model's output can invoke no adapters")
        if info is not None:
            # Refused here: such a server might answer with the base model where the invocation is missing.
            alora = info.kind == "alora"
            asked.activation_index = (
                activation_index(asked.prompt, info.invocation_tokens, adapter=info.name) if alora else 0
            )
        constraint = asked.request.params.constraint
        if isinstance(constraint, Choice):
            asked.parting = await self._parting(constraint.options)
        if asked.parting is not None:
            asked.body = with_logprobs(asked.body)

    async def _parting(self, options: tuple[str, ...]) -> Parting | None:
        if options not in self._partings:
            if len(self._partings) >= _MAX_PARTINGS:
                self._partings.clear()
            tokens = await asyncio.gather(*(self.tokenize(option) for option in dict.fromkeys(options)))
            self._partings[options] = find_parting(dict(zip(dict.fromkeys(options), tokens, strict=True)))
        return self._partings[options]

    async def _replies(self, asked: Asked, end: float | None) -> AsyncGenerator[Reply, None]:
        """The pieces of a streamed reply, each awaited no longer than until `end`."""

        async def once() -> AsyncGenerator[Reply, None]:
            body = {**asked.body, "stream": True, "stream_options": {"include_usage": True}}
            async with aclosing(self._channel.events(_COMPLETIONS, body, session=asked.session)) as events:
                async for event in events:
                    yield checked(Reply, event, self.url)

        async with aclosing(resumed(once, asked.request.params, self._channel.repeats, self.url)) as replies:
            while True:
                async with _until(end, asked.request):
                    with _as_adapter(asked.request):
                        reply = await anext(replies, None)
                if reply is None:
                    return
                yield reply

    async def _score_as_prompts(self, asked: Asked, continuations: Sequence[Sequence[int]]) -> Score:
        if not continuations or not all(continuations):
            raise InputError("score needs at least one continuation, and none may be empty")
        body = prompt_logprobs_body(asked.request, asked.prompt, continuations, asked.model)
        reply = checked(Reply, await self._channel.post(_COMPLETIONS, body, session=asked.session), self.url)
        if len(reply.choices) != len(continuations):
            raise BackendError(f"{self.url} scored {len(reply.choices)} of {len(continuations)} continuations")
        return Score(
            logprobs=tuple(
                scored(choice, continuation, self.url)
                for choice, continuation in zip(reply.choices, continuations, strict=True)
            ),
            usage=reply.used(asked.activation_index, self.url),
            activation_index=asked.activation_index,
            seconds=time.perf_counter() - asked.started,
        )


def _end_of(request: Request) -> float | None:
    """When the request's deadline passes, in the event loop's time."""
    return None if request.deadline_s is None else asyncio.get_running_loop().time() + request.deadline_s


@asynccontextmanager
async def _until(end: float | None, request: Request) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(end):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"the server's answer was not whole within {request.deadline_s:.3f} s") from error


@contextmanager
def _as_adapter(request: Request) -> Iterator[None]:
    """To a server an adapter is one of its models."""
    try:
        yield
    except ModelNotFound as error:
        if request.adapter is None:
            raise
        raise AdapterNotFound(str(error)) from error
