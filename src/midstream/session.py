"""The Python face: a synchronous Engine, and a Conversation that holds token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from midstream.backend import Portal, SyncBackend
from midstream.config import EngineConfig
from midstream.engine.core import EngineStats
from midstream.engine.engine import AsyncEngine
from midstream.errors import InputError, MidstreamError
from midstream.history import Parting, find_parting
from midstream.intrinsics.call import IntrinsicResult, call_intrinsic, call_intrinsics, find
from midstream.library import library_adapters
from midstream.models.source import DEFAULT_MODEL
from midstream.transcript import Transcript
from midstream.types import AdapterInfo, Chat, Completion, Delta, Document, Message, Request, SamplingParams

T = TypeVar("T")


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
        weights: str | None = None,
        wait_for_kernels: bool = False,
        progress: bool = False,
    ) -> Engine:
        """Load a known model, a Hugging Face folder or hub id, or a GGUF file. Raises ModelError.

        `wait_for_kernels`: until they are compiled, where the machine has none yet; see AsyncEngine.load.
        """
        options = {"dtype": dtype, "device": device, "weights": weights}
        return cls(
            AsyncEngine.load(model, config=config, **options, wait_for_kernels=wait_for_kernels, progress=progress)
        )

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

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses `aio` to its end, such as a flow's, and return its result."""
        return self.portal.run(coroutine)

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
    """A transcript that grows: messages together with the very token ids that were computed for them."""

    def __init__(self, engine: Engine, messages: Sequence[Message] = ()) -> None:
        self.engine = engine
        self.transcript = Transcript()
        self._warming: Future[None] | None = None
        self._add(*messages)

    @classmethod
    def from_chat(cls, engine: Engine, chat: Chat) -> Conversation:
        """A conversation from a chat file; its documents go to the last user turn."""
        conversation = cls(engine)
        conversation.transcript = engine.portal.run(Transcript.of(engine.aio, chat))
        return conversation

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.transcript.messages

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.transcript.tokens

    def branch(self) -> Conversation:
        """A copy that goes its own way. No KV is copied: both share what is computed up to here."""
        other = Conversation(self.engine)
        other.transcript, other._warming = self.transcript, self._warming
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
        if sampling.get("n", 1) != 1:
            raise InputError("a conversation takes one answer: branch() it to compare several")
        prompt = await self.transcript.prompt(self.engine.aio)
        request = Request(prompt=prompt, params=SamplingParams(**sampling))
        completion: Completion | None = None
        async with aclosing(self.engine.aio.stream(request)) as deltas:
            async for delta in deltas:
                if delta.text and on_text is not None:
                    on_text(delta.text)
                completion = delta.completion or completion
        assert completion is not None
        self.transcript = await self.transcript.answered(self.engine.aio, prompt, completion.choices[0])
        # On the portal's loop, not the caller's: the next call may come from another one.
        self._warming = self.engine.portal.submit(self._warm(self.token_ids))
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
        if not self.messages:
            raise InputError("the conversation is empty: there is nothing to judge")
        result = await call_intrinsic(self.engine.aio, find(known, name), self.transcript, arguments)
        if result.prefix_rewritten is not None:
            result = replace(result, parting=self.parting())
        if keep:
            await self._keep(result)
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

    def _add(self, *messages: Message) -> None:
        if messages:
            self.transcript = self.engine.portal.run(self.transcript.add(self.engine.aio, *messages))

    async def _warm(self, tokens: tuple[int, ...]) -> None:
        """Compute the turn's closing tokens now, while the caller reads the answer, so that a call finds all there."""
        try:
            await self.engine.aio.warm(tokens)
        except MidstreamError:
            return  # nothing is lost: the next request computes them, or says what is wrong

    async def _warmed(self) -> None:
        if self._warming is not None:
            await asyncio.shield(asyncio.wrap_future(self._warming))

    async def _keep(self, result: IntrinsicResult) -> None:
        prompt = result.completion.prompt_token_ids
        if result.prefix_rewritten is not None:
            raise InputError(f"{result.intrinsic} rewrote what it judged, so its answer cannot be kept at the end")
        if prompt[: len(self.token_ids)] != self.token_ids:
            raise InputError(f"{result.intrinsic} judged an earlier turn, so its answer cannot be kept at the end")
        self.transcript = await self.transcript.answered(self.engine.aio, prompt, result.completion.choices[0])
