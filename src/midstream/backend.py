"""The Backend protocol: all that intrinsics and flows know of an engine, near or far."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score

T = TypeVar("T")


@runtime_checkable
class Backend(Protocol):
    """Something that completes and scores prompts with a base model and its adapters."""

    async def complete(self, request: Request) -> Completion:
        """Run a request to its end."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        """Run a request and yield its text as it comes; the last delta carries the completion."""
        ...

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        """Log-probabilities of each continuation (token ids) after the request's prompt."""
        ...

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        """Token ids of a text (no special tokens added), or of a chat, with the assistant's header unless told not."""
        ...

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests may name."""
        ...


class Portal:
    """An event loop in a thread of its own, so that synchronous code can run coroutines."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="midstream-portal", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return its result."""
        return self.submit(coroutine).result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; its result can be waited for in any thread or event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call a function in the loop, soon."""
        self._loop.call_soon_threadsafe(function)

    def iterate(self, stream: AsyncIterator[T]) -> Iterator[T]:
        """Yield what an asynchronous iterator yields. Closing this iterator closes that one."""

        async def step() -> tuple[bool, T | None]:
            try:
                return True, await anext(stream)
            except StopAsyncIteration:
                return False, None

        try:
            while True:
                more, item = self.run(step())
                if not more:
                    return
                yield item  # type: ignore[misc]
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                self.run(close())

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncBackend:
    """A Backend's verbs, blocking. The one synchronous wrapper; it adds nothing else."""

    def __init__(self, backend: Backend, portal: Portal) -> None:
        self._backend = backend
        self._portal = portal

    def complete(self, request: Request) -> Completion:
        return self._portal.run(self._backend.complete(request))

    def stream(self, request: Request) -> Iterator[Delta]:
        return self._portal.iterate(self._backend.stream(request))

    def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        return self._portal.run(self._backend.score(request, continuations))

    def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return self._portal.run(self._backend.tokenize(prompt, header=header))

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return self._portal.run(self._backend.adapters())
