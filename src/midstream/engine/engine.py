"""The embedded engine: a Backend over one model in this process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Self, TypeVar

import psutil
import torch

from midstream.adapters import Adapter, AdapterRegistry, load_adapter
from midstream.config import EngineConfig
from midstream.engine.apart import apart
from midstream.engine.core import CacheNode, CacheView, EngineCore, EngineStats
from midstream.engine.kv_tree import KVTree
from midstream.engine.loop import EngineLoop
from midstream.engine.output import OutputWriter
from midstream.engine.pace import Pace
from midstream.engine.reader import RequestReader
from midstream.engine.request import Job, Outcome
from midstream.engine.runner import Runner
from midstream.engine.scheduler import Scheduler
from midstream.engine.upgrade import KernelUpgrade
from midstream.errors import Cancelled, DeadlineExceeded, EngineStopped, MidstreamError, ModelError
from midstream.models.chat import ChatTokenizer
from midstream.models.load import LoadedModel, load_model
from midstream.models.pool import KVPool
from midstream.models.source import DEFAULT_MODEL
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score

T = TypeVar("T")

_DEFAULT_KV_BYTES = 512 * 1024**2


class AsyncEngine:
    """One base model, its adapters and their shared KV cache. Implements the Backend protocol."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        if config.kv_dtype is not None and loaded.device.type != "cpu":
            raise ModelError(f"kv_dtype {config.kv_dtype} is not implemented on {loaded.device.type}; leave it out")
        self._loaded = loaded
        self._kv_dtype = config.kv_dtype
        self._max_context = min(loaded.max_context_tokens, config.max_context_tokens or loaded.max_context_tokens)
        per_slot = KVPool.bytes_per_slot(loaded.kv_shapes, loaded.dtype, config.kv_dtype)
        tree = KVTree(_num_slots(config, per_slot, self._max_context, loaded.device))
        self._core = EngineCore(
            tree=tree,
            scheduler=Scheduler(
                tree,
                max_step_tokens=config.max_step_tokens,
                max_running=config.max_running_sequences,
                pace=Pace(config.prefill_step_s),
            ),
            registry=AdapterRegistry(config.adapter_budget_bytes),
            writer=OutputWriter(loaded.chat.decode, loaded.chat.eos_token_ids, loaded.chat.token_text),
            max_queued=config.max_queued_requests,
            bytes_per_slot=per_slot,
        )
        self._reader = RequestReader(
            loaded.chat,
            self._core.registry,
            vocab_size=loaded.vocab_size,
            max_context=self._max_context,
            num_slots=tree.num_slots,
        )
        runner = Runner(loaded, tree.num_slots, self._core.weights_of, config.kv_dtype)
        self._loop = EngineLoop(self._core, runner)
        self._upgrade = KernelUpgrade(loaded, self._loop)
        self._ids = itertools.count(1)

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
    ) -> AsyncEngine:
        """Load a model (a known name, a Hugging Face folder or hub id, a GGUF file).

        On a machine that has no kernels compiled yet, it answers on torch's until they are there; `wait_for_kernels`,
        for what is measured or compared, waits for them here. Raises ModelError when it cannot be loaded, or not with
        this configuration.
        """
        options = {"dtype": dtype, "device": device, "weights": weights}
        return cls(
            apart(lambda: load_model(model, **options, wait_for_kernels=wait_for_kernels, progress=progress)), config
        )

    @property
    def chat(self) -> ChatTokenizer:
        return self._loaded.chat

    @property
    def model_name(self) -> str:
        return self._loaded.name

    @property
    def vocab_size(self) -> int:
        return self._loaded.vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt with its answer: the context, or what the KV budget holds."""
        return min(self._max_context, self._core.tree.num_slots)

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._loop.running

    @property
    def fault(self) -> MidstreamError | None:
        """Why requests would fail now; None where they are taken."""
        return None if self.running else EngineStopped("the engine has stopped: start it anew")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion:
        """Run a request to its end. Raises InputError before it runs, other MidstreamErrors while it does."""
        async with aclosing(self._outcomes(request, streaming=False)) as outcomes:
            outcome = await anext(outcomes)
        assert isinstance(outcome, Completion)
        return outcome

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Run a request and yield its text as it comes. Closing the iterator cancels the request."""
        async with aclosing(self._outcomes(request, streaming=True)) as outcomes:
            async for outcome in outcomes:
                assert isinstance(outcome, Delta)
                yield outcome

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        """Log-probabilities of each continuation (token ids) after the prompt, in as few forwards as fit a step."""
        async with aclosing(self._outcomes(request, streaming=False, continuations=continuations)) as outcomes:
            outcome = await anext(outcomes)
        assert isinstance(outcome, Score)
        return outcome

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await asyncio.to_thread(self.chat.of, prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return self.adapter_infos()

    def adapter_infos(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests may name. Safe in any thread."""
        return self._core.registry.infos()

    def adapter(self, name: str) -> AdapterInfo | None:
        """The adapter of that name, if one is loaded."""
        return self._core.registry.info(name)

    async def warm(self, tokens: Sequence[int]) -> None:
        """Compute the base model's KV of all `tokens`, so that what follows them reuses every one."""
        await self.score(Request(prompt=tuple(tokens)), [[0]])

    # ------------------------------------------------------------------ adapters

    async def load_adapter(self, folder: str | Path, *, name: str | None = None, pin: bool = False) -> AdapterInfo:
        """Load a PEFT folder. One of the same name is replaced; requests that run on it keep it."""
        adapter = await asyncio.to_thread(apart, lambda: self._read_adapter(Path(folder), name))
        return await self._on_loop(lambda: self._core.add_adapter(adapter, pin=pin))

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter out; requests that run on it keep it. Raises AdapterNotFound."""
        await self._on_loop(lambda: self._core.registry.remove(name))

    async def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter from eviction. Raises AdapterNotFound."""
        await self._on_loop(lambda: self._core.registry.pin(name, pinned))

    # ------------------------------------------------------------------ the engine itself

    async def cache_nodes(self, *, scope: str | None = None, limit: int = 500) -> list[CacheNode]:
        """The KV tree as it is now, at most `limit` nodes, parents before children."""
        return await self._on_loop(lambda: self._core.cache_nodes(scope, limit))

    async def cache_view(self, *, scope: str | None = None, limit: int = 500) -> CacheView:
        """The engine's figures and its KV tree as of one moment."""
        return await self._on_loop(lambda: CacheView(self._core.stats(), self._core.cache_nodes(scope, limit)))

    async def stats(self) -> EngineStats:
        return await self._on_loop(self._core.stats)

    async def check_integrity(self) -> None:
        """Raise AssertionError where an invariant of the engine's state is broken."""
        await self._on_loop(self._core.check_integrity)

    async def clear_cache(self, scope: str | None = None) -> None:
        """Forget all KV that no running request uses, or that of one cache scope."""
        await self._on_loop(lambda: self._core.tree.evict_all(scope))

    async def aclose(self) -> None:
        """Stop; running requests end with EngineStopped."""
        await asyncio.to_thread(self._loop.close)
        await asyncio.to_thread(self._upgrade.close)

    # ------------------------------------------------------------------ inside

    async def _on_loop(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._loop.call(function))

    async def _outcomes(
        self,
        request: Request,
        *,
        streaming: bool,
        continuations: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        loop = asyncio.get_running_loop()
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

        def listener(outcome: Outcome) -> None:
            # A loop that has ended waits for nothing: its requests end like those of a client that has gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        started = time.perf_counter()
        request_id = f"req-{next(self._ids)}"

        def read() -> Job:
            job = self._reader.read(request_id, request, continuations, listener)
            job.streaming = streaming
            job.started = started
            if request.deadline_s is not None:
                job.deadline = started + request.deadline_s
            return job

        finished = False
        try:
            try:
                async with asyncio.timeout(request.deadline_s):
                    await self._admit(read)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"request {request_id} was not read within {request.deadline_s:.3f} s"
                ) from error
            while not finished:
                outcome = await outcomes.get()
                if isinstance(outcome, MidstreamError):
                    finished = True
                    raise outcome
                finished = not isinstance(outcome, Delta) or outcome.completion is not None
                yield outcome
        finally:
            if not finished:
                self._cancel(request_id)

    async def _admit(self, read: Callable[[], Job]) -> None:
        """Read a request and queue its job; anew where its adapter was replaced in between."""
        while True:
            with self._loop.expecting():
                job = await asyncio.to_thread(read)
                added = self._loop.call(functools.partial(self._core.add, job))
            if await asyncio.wrap_future(added):
                return

    def _cancel(self, request_id: str) -> None:
        error = Cancelled(f"request {request_id} was cancelled")
        try:
            self._loop.call(lambda: self._core.cancel(request_id, error))
        except MidstreamError:
            return  # the engine is closed and has ended every job

    def _read_adapter(self, folder: Path, name: str | None) -> Adapter:
        return load_adapter(
            folder,
            shapes=self._loaded.linear_shapes,
            name=name,
            encode=self.chat.encode,
            vocab_size=self._loaded.vocab_size,
            dtype=self._loaded.dtype,
            device=self._loaded.device,
        )


def _num_slots(config: EngineConfig, bytes_per_slot: int, max_context: int, device: torch.device) -> int:
    """Slots of the KV pool: the budget given, else room for one full context but at least a fixed size,
    and never more than a quarter of the memory that is free."""
    if config.kv_budget_bytes is not None:
        return max(1, config.kv_budget_bytes // bytes_per_slot)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    wanted = max(_DEFAULT_KV_BYTES, max_context * bytes_per_slot)
    return int(max(1, min(wanted, free // 4) // bytes_per_slot))
