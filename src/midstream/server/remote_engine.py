"""An engine behind an address, as the server sees it: its requests go there, its tokenizer is here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Self

from midstream.engine.core import CacheView
from midstream.errors import (
    BackendError,
    EngineStopped,
    Forbidden,
    MidstreamError,
    ModelError,
    Unauthorized,
    Unsupported,
)
from midstream.models.chat import ChatTokenizer
from midstream.remote import RemoteBackend
from midstream.remote.catalogue import Catalogue
from midstream.remote.faults import PathMissing
from midstream.remote.folders import read_folder
from midstream.remote.load import Load
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score

log = logging.getLogger("midstream.server")

_LOOK_EVERY_S = 5.0
_PATIENCE_S = 5.0
# Failing requests have the server looked at at once, but not more often than that.
_REST_S = 0.2


class RemoteEngine:
    """A running server (midstream, or vLLM) as a ServedEngine.

    It is asked what it serves when this is entered and then every five seconds, and at once when a request has failed.
    While it is down, requests fail with BackendError, `fault` says why, and its adapters are those it had. `closing`
    ends what was started for this alone.
    """

    def __init__(
        self,
        backend: RemoteBackend,
        chat: ChatTokenizer,
        *,
        model_name: str,
        vocab_size: int,
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._backend = backend
        self._chat = chat
        self._model_name = model_name
        self._vocab_size = vocab_size
        self._closing = closing
        self._known: Catalogue | None = None
        self._fault: MidstreamError | None = BackendError(f"{backend.url} has not been asked yet")
        self._compared = False
        self._told: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._look = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._open: set[asyncio.Timeout] = set()
        self._ending = asyncio.Lock()
        self._closed = False

    # ------------------------------------------------------------------ what is known

    @property
    def chat(self) -> ChatTokenizer:
        return self._chat

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_context_tokens(self) -> int:
        found = self._catalogue().max_context_tokens
        if found is None:
            raise BackendError(f"{self._backend.url} does not say how long a prompt may be (max_model_len)")
        return found

    @property
    def fault(self) -> MidstreamError | None:
        return self._fault

    def adapter_infos(self) -> tuple[AdapterInfo, ...]:
        return self._catalogue().adapters

    def adapter(self, name: str) -> AdapterInfo | None:
        known = self._catalogue()
        named = {*known.undescribed, *known.unserved, *(info.name for info in known.adapters)}
        return known.find(name) if name in named else None

    def _catalogue(self) -> Catalogue:
        if self._known is None:
            raise BackendError(str(self._fault)) from self._fault
        return self._known

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion:
        async with self._asking():
            return await self._backend.complete(request)

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        # Each step is asked for apart: a generator may be gone on with in another task than it was begun in.
        async with aclosing(self._backend.stream(request)) as deltas:
            while True:
                async with self._asking():
                    delta = await anext(deltas, None)
                if delta is None:
                    return
                yield delta

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        async with self._asking():
            return await self._backend.score(request, continuations)

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await asyncio.to_thread(self._chat.of, prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return self.adapter_infos()

    # ------------------------------------------------------------------ what only a server does

    async def load_adapter(self, folder: str | Path, *, name: str | None = None) -> AdapterInfo:
        async with self._asking():
            read = functools.partial(read_folder, Path(folder), name=name, encode=self._chat.encode)
            info = await self._backend.load_adapter(await asyncio.to_thread(read))
        await self.refresh()
        return info

    async def unload_adapter(self, name: str) -> None:
        async with self._asking():
            await self._backend.unload_adapter(name)
        await self.refresh()

    async def stats(self) -> Load:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._backend.load()
        except (MidstreamError, TimeoutError):
            return Load()

    async def cache_view(self, *, scope: str | None = None, limit: int = 500) -> CacheView:
        raise Unsupported(f"the cache is that of {self._backend.url}, and cannot be looked into from here")

    # ------------------------------------------------------------------ its life

    async def __aenter__(self) -> Self:
        await self.refresh()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Running requests end with EngineStopped."""
        async with self._ending:
            if self._closed:
                return
            self._closed = True
            self._fault = _ended()
            if self._watcher is not None:
                self._watcher.cancel()
                await asyncio.gather(self._watcher, return_exceptions=True)
            for timeout in self._open:
                timeout.reschedule(asyncio.get_running_loop().time())
            while self._open:
                await asyncio.sleep(0.01)
            await self._backend.aclose()
            if self._closing is not None:
                await self._closing()

    async def refresh(self) -> None:
        """Ask the server what it serves. Never raises: `fault` is what came of it."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                self._known = await self._backend.catalogue()
                if not self._compared:
                    await self._compare()
            self._now(None)
            self._tell(self._known)
        except (Unauthorized, Forbidden) as error:
            self._now(_turned_away(error))
        except MidstreamError as error:
            self._now(error)
        except TimeoutError:
            self._now(BackendError(f"{self._backend.url} did not say within {_PATIENCE_S:g} s what it serves"))

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._look.wait()
            self._look.clear()
            await self.refresh()
            await asyncio.sleep(_REST_S)

    async def _compare(self) -> None:
        """Whether the server's tokens are those that are made here; anew whenever it was away."""
        try:
            await self._backend.check_tokens()
        except PathMissing:
            log.warning("%s has no /tokenize, so whether it serves the same model is not known", self._backend.url)
        self._compared = True

    def _now(self, fault: MidstreamError | None) -> None:
        if fault is not None:
            self._compared = False
        if fault is None and self._fault is not None:
            log.info("%s answers", self._backend.url)
        elif fault is not None and str(fault) != str(self._fault):
            log.error("%s", fault)
        self._fault = fault

    def _tell(self, known: Catalogue) -> None:
        """Say, once, which adapters are known on one side alone."""
        told = (known.unserved, known.undescribed)
        if told == self._told:
            return
        self._told = told
        unserved, undescribed = map(", ".join, told)
        if unserved:
            log.warning("%s does not serve adapters whose folders are here: %s", self._backend.url, unserved)
        if undescribed:
            log.warning(
                "%s serves adapters whose folders are not here, so that they cannot be called: %s; name the folders "
                "with --adapter",
                self._backend.url,
                undescribed,
            )

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Around whatever waits for the server."""
        if self._closed:
            raise _ended()
        if isinstance(self._fault, ModelError):
            raise BackendError(str(self._fault))
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._open.add(timeout)
                yield
        except TimeoutError as error:
            raise _ended() from error
        except (BackendError, EngineStopped):
            self._look.set()
            raise
        except (Unauthorized, Forbidden) as error:
            self._look.set()
            raise _turned_away(error) from error
        finally:
            self._open.discard(timeout)


def _turned_away(error: MidstreamError) -> BackendError:
    """It is this server that is turned away, not who sends it requests."""
    return BackendError(f"{error} (said to this server: is --backend-key the right one?)")


def _ended() -> EngineStopped:
    return EngineStopped("the server is shutting down: send the request to another one, or later")
