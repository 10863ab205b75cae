"""What the server stands in front of: all that its endpoints know of an engine, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from midstream.engine.core import CacheView
from midstream.errors import MidstreamError
from midstream.models.chat import ChatTokenizer
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score


class Occupancy(Protocol):
    """How busy an engine is. `kv_usage`: share of the KV memory in use. None: not known now."""

    @property
    def running(self) -> int | None: ...

    @property
    def queued(self) -> int | None: ...

    @property
    def kv_usage(self) -> float | None: ...


class ServedEngine(Protocol):
    """A Backend that a server can be put over. Entering it makes it ready in this event loop; leaving closes it.

    Its properties and lookups ask nobody: they tell what is known now, and raise BackendError where that is nothing.
    """

    @property
    def chat(self) -> ChatTokenizer:
        """The model's tokenizer, in this process. It blocks: to be called beside the event loop."""
        ...

    @property
    def model_name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt with its answer."""
        ...

    @property
    def fault(self) -> MidstreamError | None:
        """Why requests would fail now; None where they are taken."""
        ...

    def adapter_infos(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests may name."""
        ...

    def adapter(self, name: str) -> AdapterInfo | None:
        """The adapter of that name, None where there is none. Raises AdapterNotFound, with what to do, for one that is
        known but cannot be called."""
        ...

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion: ...

    def stream(self, request: Request) -> AsyncGenerator[Delta, None]: ...

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score: ...

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]: ...

    async def adapters(self) -> tuple[AdapterInfo, ...]: ...

    # ------------------------------------------------------------------ what only a server does

    async def load_adapter(self, folder: str | Path, *, name: str | None = None) -> AdapterInfo:
        """Load a PEFT folder; one of the same name is replaced."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter out. Raises AdapterNotFound."""
        ...

    async def stats(self) -> Occupancy:
        """How busy it is. Never fails."""
        ...

    async def cache_view(self, *, scope: str | None = None, limit: int = 500) -> CacheView:
        """The KV cache as it is now, at most `limit` nodes. Raises Unsupported where it cannot be seen from here."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def aclose(self) -> None:
        """Stop; running requests end with EngineStopped. May be called again."""
        ...
