"""The Python face: a synchronous Engine, and a Conversation that holds token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from midstream.backend import Portal, SyncBackend
from midstream.config import EngineConfig
from midstream.engine.core import EngineStats
from midstream.engine.engine import AsyncEngine
from midstream.errors import InputError, MidstreamError
from midstream.history import Parting, find_parting
from midstream.intrinsics.call import IntrinsicResult, call_intrinsic, call_intrinsics, find
from midstream.intrinsics.render import judged
from midstream.intrinsics.spec import load_contract
from midstream.library import library_adapters
from midstream.models.source import DEFAULT_MODEL
from midstream.types import AdapterInfo, Chat, Completion, Delta, Document, Message, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Reply:
    """The base model's answer. `parting`: where rendering the history anew would lose the prefix, if it would."""

    text: str
    completion: Completion
    parting: Parting | None


class Engine:
    """One base model with its adapters, blocking. `aio` is the asynchronous engine underneath."""

    def __init__(self, aio: AsyncEngine) -> None:
        self.aio = aio
        self.portal = Portal()
        self._sync = SyncBackend(aio, self.portal)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        dtype: str | None = None,
        device: str | None = None,
        progress: bool = False,
    ) -> Engine:
        """Load a known model, a Hugging Face folder or hub id, or a GGUF file. Raises ModelError."""
        return cls(AsyncEngine.load(model, config=config, dtype=dtype, device=device, progress=progress))

    def load_adapter(self, folder: str | Path, *, name: str | None = None, pin: bool = False) -> AdapterInfo:
        """Load a PEFT folder. Raises AdapterFormatError with all that is wrong with it."""
        return self.portal.run(self.aio.load_adapter(folder, name=name, pin=pin))

    def load_library(self) -> tuple[AdapterInfo, ...]:
        """Load every adapter that the library has for this model."""
        return tuple(self.load_adapter(folder) for folder in library_adapters(self.aio.model_name))

    def unload_adapter(self, name: str) -> None:
        self.portal.run(self.aio.unload_adapter(name))

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return self._sync.adapters()

    def complete(self, request: Request) -> Completion:
        return self._sync.complete(request)

    def stream(self, request: Request) -> Iterator[Delta]:
        return self._sync.stream(request)

    def call(self, names: Sequence[str], chat: Chat) -> list[IntrinsicResult | MidstreamError]:
        """Call intrinsics on a chat, all at once."""
        return self.portal.run(call_intrinsics(self.aio, names, chat))

    def conversation(self, system: str | None = None) -> Conversation:
        """A new conversation, with a system message if one is given."""
        messages = () if system is None else (Message(role="system", content=system),)
        return Conversation(self, messages)

    def stats(self) -> EngineStats:
        return self.portal.run(self.aio.stats())

    def clear_cache(self) -> None:
        """Forget all KV that no running request uses."""
        self.portal.run(self.aio.clear_cache())

    def close(self) -> None:
        self.portal.run(self.aio.aclose())
        self.portal.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Conversation:
    """Messages together with the very token ids that were computed for them.

    A generated answer is kept as its tokens and never tokenized again, so what the base model has computed stays
    reusable whatever the chat template does to it.
    """

    def __init__(self, engine: Engine, messages: Sequence[Message] = ()) -> None:
        self.engine = engine
        self.messages: tuple[Message, ...] = ()
        self.token_ids: tuple[int, ...] = ()
        self._ends: dict[str, int] = {}
        self._warming: Future[None] | None = None
        for message in messages:
            self._add(message)

    @classmethod
    def from_chat(cls, engine: Engine, chat: Chat) -> Conversation:
        """A conversation from a chat file; its documents go to the last user turn."""
        last = max((i for i, m in enumerate(chat.messages) if m.role == "user"), default=None)
        if chat.documents and last is None:
            raise InputError("documents need a user message to stand in")
        messages = [
            m.model_copy(update={"documents": (*m.documents, *chat.documents)}) if i == last else m
            for i, m in enumerate(chat.messages)
        ]
        return cls(engine, messages)

    def branch(self) -> Conversation:
        """A copy that goes its own way. No KV is copied: both share what is computed up to here."""
        other = Conversation(self.engine)
        other.messages, other.token_ids, other._ends = self.messages, self.token_ids, dict(self._ends)
        other._warming = self._warming
        return other

    def user(self, text: str, documents: Sequence[Document] = ()) -> Conversation:
        """Add a user turn with the passages that were retrieved for it; returns this conversation."""
        self._add(Message(role="user", content=text, documents=tuple(documents)))
        return self

    def parting(self) -> Parting | None:
        """Where rendering all messages anew would part from the held tokens, and why."""
        if not self.messages:
            return None
        chat = self.engine.aio.chat
        return find_parting(self.token_ids, chat.history(Chat(messages=self.messages)), chat.decode)

    def reply(self, *, on_text: Callable[[str], None] | None = None, **sampling: Any) -> Reply:
        """Let the base model answer and add its answer. `sampling` are fields of SamplingParams."""
        return self.engine.portal.run(self.areply(on_text=on_text, **sampling))

    async def areply(self, *, on_text: Callable[[str], None] | None = None, **sampling: Any) -> Reply:
        """Like `reply`. The answer is added only when it is whole."""
        if not self.messages or self.messages[-1].role == "assistant":
            raise InputError("there is no user turn to answer: add one with user()")
        if sampling.get("n", 1) != 1:
            raise InputError("a conversation takes one answer: branch() it to compare several")
        prompt = (*self.token_ids, *self.engine.aio.chat.reply_header(Chat(messages=self.messages)))
        request = Request(prompt=prompt, params=SamplingParams(**sampling))
        completion: Completion | None = None
        async for delta in self.engine.aio.stream(request):
            if delta.text and on_text is not None:
                on_text(delta.text)
            completion = delta.completion or completion
        assert completion is not None
        self._append_answer(completion, prompt)
        return Reply(completion.text, completion, self.parting())

    def call(self, name: str, *, keep: bool = False, arguments: Mapping[str, Any] | None = None) -> IntrinsicResult:
        """Call an intrinsic on the conversation. Its answer stays out of the history unless `keep`."""
        return self.engine.portal.run(self.acall(name, keep=keep, arguments=arguments))

    async def acall(
        self, name: str, *, keep: bool = False, arguments: Mapping[str, Any] | None = None
    ) -> IntrinsicResult:
        """Like `call`. With `keep`, the base model will re-read the invocation and the answer as its own tokens."""
        await self._warmed()
        known = {info.name: info for info in await self.engine.aio.adapters()}
        info = find(known, name)
        judged_part = self._judged(info)
        result = await call_intrinsic(self.engine.aio, info, judged_part, arguments)
        if isinstance(judged_part, Chat):
            result = replace(result, parting=self.parting())
        if keep:
            self._keep(result)
        return result

    def call_many(self, names: Sequence[str]) -> list[IntrinsicResult | MidstreamError]:
        """Call several intrinsics at once; one that fails leaves the others their results."""
        return self.engine.portal.run(self.acall_many(names))

    async def acall_many(self, names: Sequence[str]) -> list[IntrinsicResult | MidstreamError]:
        """Like `call_many`."""

        async def one(name: str) -> IntrinsicResult | MidstreamError:
            try:
                return await self.acall(name)
            except MidstreamError as error:
                return error

        return await asyncio.gather(*(one(name) for name in names))

    # ------------------------------------------------------------------ inside

    def _add(self, message: Message) -> None:
        """Append what the template adds for one more message; what is held stays as it is."""
        chat = self.engine.aio.chat
        after = chat.history(Chat(messages=(*self.messages, message)))
        before = chat.history(Chat(messages=self.messages)) if self.messages else ()
        if after[: len(before)] != before:
            parting = find_parting(before, after, chat.decode)
            raise InputError(
                "the chat template rewrites earlier turns when one is added, so they cannot be kept: "
                + (parting.reason if parting else "it drops some")
            )
        self._set(message, (*self.token_ids, *after[len(before) :]))

    def _append_answer(self, completion: Completion, prompt: tuple[int, ...]) -> None:
        chat = self.engine.aio.chat
        answer = Message(role="assistant", content=completion.text)
        rendered = chat.history(Chat(messages=(*self.messages, answer)))
        closing = _closing(rendered, chat.eos_token_ids)
        tokens = completion.token_ids
        if tokens and tokens[-1] in chat.eos_token_ids:
            closing = closing[1:]
        self._set(answer, (*prompt, *tokens, *closing))
        # On the portal's loop, not the caller's: the next call may come from another one.
        self._warming = self.engine.portal.submit(self._warm(self.token_ids))

    async def _warm(self, tokens: tuple[int, ...]) -> None:
        """Compute the turn's closing tokens now, while the caller reads the answer, so that a call finds all there."""
        try:
            await self.engine.aio.warm(tokens)
        except MidstreamError:
            return  # nothing is lost: the next request computes them, or says what is wrong

    async def _warmed(self) -> None:
        if self._warming is not None:
            await asyncio.shield(asyncio.wrap_future(self._warming))

    def _set(self, message: Message, tokens: tuple[int, ...]) -> None:
        self.messages = (*self.messages, message)
        self.token_ids = tokens
        self._ends[message.role] = len(tokens)

    def _judged(self, info: AdapterInfo) -> tuple[int, ...] | Chat:
        """The tokens up to the end of the turn that the adapter judges; messages where its contract rewrites them."""
        if not self.messages:
            raise InputError("the conversation is empty: there is nothing to judge")
        chat = Chat(messages=self.messages)
        reads = str(info.metadata.get("reads", "any"))
        judged(chat, info)  # refuses a conversation without such a turn
        if load_contract(info).needs_messages:
            return chat
        return self.token_ids if reads == "any" else self.token_ids[: self._ends[reads]]

    def _keep(self, result: IntrinsicResult) -> None:
        chat = self.engine.aio.chat
        prompt = result.completion.prompt_token_ids
        if result.prefix_rewritten is not None:
            raise InputError(f"{result.intrinsic} rewrote what it judged, so its answer cannot be kept at the end")
        if prompt[: len(self.token_ids)] != self.token_ids:
            raise InputError(f"{result.intrinsic} judged an earlier turn, so its answer cannot be kept at the end")
        tokens = result.completion.token_ids
        end = () if tokens and tokens[-1] in chat.eos_token_ids else (min(chat.eos_token_ids),)
        newline = chat.encode("\n")
        message = Message(role="assistant", content=result.completion.text)
        self._set(message, (*prompt, *tokens, *end, *newline))


def _closing(rendered: tuple[int, ...], eos: frozenset[int]) -> tuple[int, ...]:
    """What the template puts after an answer: from the last end-of-sequence token on."""
    for index in range(len(rendered) - 1, -1, -1):
        if rendered[index] in eos:
            return rendered[index:]
    return ()
