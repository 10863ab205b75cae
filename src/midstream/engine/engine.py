"""The embedded engine: a Backend over one model in this process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from midstream.adapters import Adapter, AdapterRegistry, activation_index, load_adapter
from midstream.config import EngineConfig
from midstream.engine.constraints import ConstraintCompiler
from midstream.engine.core import EngineCore, EngineStats
from midstream.engine.kv_tree import KVTree
from midstream.engine.loop import EngineLoop
from midstream.engine.output import OutputWriter
from midstream.engine.request import Branch, Job, Outcome
from midstream.engine.runner import Runner
from midstream.engine.sampler import make_generator
from midstream.engine.scheduler import Scheduler
from midstream.errors import Cancelled, InputError, InvocationError, MidstreamError, PromptTooLong
from midstream.models.attention import KVPool
from midstream.models.chat import ChatTokenizer
from midstream.models.load import LoadedModel, load_model
from midstream.models.source import DEFAULT_MODEL
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, SamplingParams, Score

T = TypeVar("T")

_DEFAULT_KV_BYTES = 512 * 1024**2


class AsyncEngine:
    """One base model, its adapters and their shared KV cache. Implements the Backend protocol."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self._loaded = loaded
        self._max_context = min(loaded.max_context_tokens, config.max_context_tokens or loaded.max_context_tokens)
        per_slot = KVPool.bytes_per_slot(loaded.kv_shapes, loaded.dtype)
        tree = KVTree(_num_slots(config, per_slot, self._max_context, loaded.device))
        self._core = EngineCore(
            tree=tree,
            scheduler=Scheduler(tree, max_step_tokens=config.max_step_tokens, max_running=config.max_running_sequences),
            registry=AdapterRegistry(config.adapter_budget_bytes),
            writer=OutputWriter(loaded.chat.decode, loaded.chat.eos_token_ids, loaded.chat.token_text),
            max_queued=config.max_queued_requests,
            bytes_per_slot=per_slot,
        )
        self._constraints = ConstraintCompiler(
            loaded.chat.tokenizer, loaded.chat.encode, sorted(loaded.chat.eos_token_ids), loaded.vocab_size
        )
        self._loop = EngineLoop(self._core, Runner(loaded, tree.num_slots, self._core.weights_of))
        self._ids = itertools.count(1)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        dtype: str | None = None,
        device: str | None = None,
        progress: bool = False,
    ) -> AsyncEngine:
        """Load a model (a known name, a Hugging Face folder or hub id, a GGUF file). Raises ModelError."""
        return cls(load_model(model, dtype=dtype, device=device, progress=progress), config)

    @property
    def chat(self) -> ChatTokenizer:
        return self._loaded.chat

    @property
    def model_name(self) -> str:
        return self._loaded.name

    @property
    def max_context_tokens(self) -> int:
        return self._max_context

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

    async def tokenize(self, prompt: str | Chat) -> tuple[int, ...]:
        return self.chat.encode(prompt) if isinstance(prompt, str) else self.chat.prompt(prompt)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return await self._on_loop(self._core.registry.infos)

    async def warm(self, tokens: Sequence[int]) -> None:
        """Compute the base model's KV of all `tokens`, so that what follows them reuses every one."""
        await self.score(Request(prompt=tuple(tokens)), [[0]])

    # ------------------------------------------------------------------ adapters

    async def load_adapter(self, folder: str | Path, *, name: str | None = None, pin: bool = False) -> AdapterInfo:
        """Load a PEFT folder. One of the same name is replaced; requests that run on it keep it."""
        adapter = await asyncio.to_thread(self._read_adapter, Path(folder), name)
        return await self._on_loop(lambda: self._core.add_adapter(adapter, pin=pin))

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter out; requests that run on it keep it. Raises AdapterNotFound."""
        await self._on_loop(lambda: self._core.registry.remove(name))

    async def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter from eviction. Raises AdapterNotFound."""
        await self._on_loop(lambda: self._core.registry.pin(name, pinned))

    # ------------------------------------------------------------------ the engine itself

    async def stats(self) -> EngineStats:
        return await self._on_loop(self._core.stats)

    async def check_integrity(self) -> None:
        """Raise AssertionError where an invariant of the engine's state is broken."""
        await self._on_loop(self._core.check_integrity)

    async def clear_cache(self) -> None:
        """Forget all KV that no running request uses."""
        await self._on_loop(self._core.tree.evict_all)

    async def aclose(self) -> None:
        """Stop; running requests end with EngineStopped."""
        await asyncio.to_thread(self._loop.close)

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
            loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        started = time.perf_counter()
        request_id = f"req-{next(self._ids)}"

        def admit() -> None:
            job = self._job(request_id, request, continuations, listener)
            job.streaming = streaming
            job.started = started
            if request.deadline_s is not None:
                job.deadline = started + request.deadline_s
            try:
                self._core.add(job)
            except MidstreamError:
                if job.adapter is not None:
                    self._core.registry.release(job.adapter)
                raise

        finished = False
        try:
            await self._on_loop(admit)
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

    def _cancel(self, request_id: str) -> None:
        error = Cancelled(f"request {request_id} was cancelled")
        try:
            self._loop.call(lambda: self._core.cancel(request_id, error))
        except MidstreamError:
            return  # the engine is closed and has ended every job

    def _job(
        self,
        request_id: str,
        request: Request,
        continuations: Sequence[Sequence[int]] | None,
        listener: Callable[[Outcome], None],
    ) -> Job:
        """Check a request and make the job of it; acquires its adapter last, when nothing can fail any more."""
        registry = self._core.registry
        adapter = None if request.adapter is None else registry.get(request.adapter)
        prompt = self._prompt(request, adapter)
        activation = None if adapter is None else self._activation(prompt, adapter)
        job = Job(
            request_id=request_id,
            prompt=prompt,
            adapter=adapter,
            activation=activation,
            params=request.params,
            listener=listener,
            continuations=continuations,
            scope=request.cache_scope,
        )
        job.branches = [self._branch(job, i) for i in range(_num_branches(request.params, continuations))]
        self._check_fits(job)
        if request.adapter is not None:
            job.adapter = registry.acquire(request.adapter)
        return job

    def _branch(self, job: Job, index: int) -> Branch:
        branch = Branch(job, index)
        if job.continuations is not None:
            branch.output = list(job.continuations[index])
            self._check_tokens(branch.output, f"continuation {index}")
            return branch
        branch.generator = make_generator(job.params, index)
        if job.params.constraint is not None:
            branch.matcher = self._constraints.compile(job.params.constraint, job.params.max_tokens)
        return branch

    def _prompt(self, request: Request, adapter: Adapter | None) -> tuple[int, ...]:
        if isinstance(request.prompt, Chat):
            if not request.invoke:
                return self.chat.prompt(request.prompt)
            tokens = self.chat.history(request.prompt)
        else:
            tokens = request.prompt
        if request.invoke:
            tokens = (*tokens, *self.invocation_of(adapter))
        self._check_tokens(tokens, "the prompt")
        return tokens

    def invocation_of(self, adapter: Adapter | None) -> tuple[int, ...]:
        """The tokens that call an adapter: an aLoRA's invocation tokens, or a plain LoRA's calling text."""
        if adapter is None:
            raise InvocationError("invoke needs an adapter: name one in `adapter`")
        spec = adapter.spec
        if spec.invocation_tokens:
            return spec.invocation_tokens
        if spec.invocation_text:
            return self.chat.encode(spec.invocation_text)
        raise InvocationError(
            f"adapter {spec.name} is a plain LoRA without a calling text, so nothing can be appended to invoke it: "
            "send a prompt that asks for its answer instead"
        )

    def _activation(self, prompt: tuple[int, ...], adapter: Adapter) -> int:
        if adapter.spec.kind == "lora":
            return 0
        return activation_index(
            prompt, adapter.spec.invocation_tokens, describe=self.chat.decode, adapter=adapter.spec.name
        )

    def _check_tokens(self, tokens: Sequence[int], what: str) -> None:
        if not tokens:
            raise InputError(f"{what} is empty")
        wrong = next((t for t in tokens if not 0 <= t < self._loaded.vocab_size), None)
        if wrong is not None:
            raise InputError(f"{what} has token id {wrong}, but ids go from 0 to {self._loaded.vocab_size - 1}")

    def _check_fits(self, job: Job) -> None:
        """Refuse at once what no waiting or eviction could ever make fit."""
        growth = max(branch.growth for branch in job.branches)
        total = len(job.prompt) + growth
        asked = f"the prompt has {len(job.prompt)} tokens and asks for {growth + 1} more"
        if total + 1 > self._max_context:
            raise PromptTooLong(f"{asked}: together over the context of {self._max_context} tokens")
        if total > self._core.tree.num_slots:
            raise PromptTooLong(f"{asked}: the KV budget holds {self._core.tree.num_slots} tokens in all")

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


def _num_branches(params: SamplingParams, continuations: Sequence[Sequence[int]] | None) -> int:
    if continuations is None:
        return params.n
    if not continuations:
        raise InputError("score needs at least one continuation")
    return len(continuations)


def _num_slots(config: EngineConfig, bytes_per_slot: int, max_context: int, device: torch.device) -> int:
    """Slots of the KV pool: the budget given, else room for one full context but at least a fixed size,
    and never more than a quarter of the memory that is free."""
    if config.kv_budget_bytes is not None:
        return max(1, config.kv_budget_bytes // bytes_per_slot)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    wanted = max(_DEFAULT_KV_BYTES, max_context * bytes_per_slot)
    return int(max(1, min(wanted, free // 4) // bytes_per_slot))
