"""From a request to a job: rendering, tokenizing, finding the activation, compiling the constraint, checking it fits.

None of it touches the core's state but for looking adapters up, so it runs in the callers' threads and a long prompt or
a large grammar keeps nobody else waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

from midstream.adapters import Adapter, AdapterRegistry, activation_index
from midstream.engine.callee import Callee, check_callable, check_reachable
from midstream.engine.constraints import ConstraintCompiler
from midstream.engine.request import Branch, Job, Listener
from midstream.engine.sampler import make_generator
from midstream.errors import InputError, InvocationError, PromptTooLong
from midstream.models.chat import ChatTokenizer
from midstream.types import Chat, Invocable, Request, SamplingParams


class RequestReader:
    """Checks requests whole before any of them reaches the engine's thread."""

    def __init__(
        self, chat: ChatTokenizer, registry: AdapterRegistry, *, vocab_size: int, max_context: int, num_slots: int
    ) -> None:
        self._chat = chat
        self._registry = registry
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._num_slots = num_slots
        self._constraints = ConstraintCompiler(chat.tokenizer, chat.encode, sorted(chat.eos_token_ids), vocab_size)

    def read(
        self,
        request_id: str,
        request: Request,
        continuations: Sequence[Sequence[int]] | None,
        listener: Listener,
    ) -> Job:
        """A job whose adapters are looked up but not acquired. Raises InputError for all that can never run."""
        adapter = None if request.adapter is None else self._registry.get(request.adapter)
        prompt = self._prompt(request, adapter)
        job = Job(
            request_id=request_id,
            prompt=prompt,
            adapter=adapter,
            activation=None if adapter is None else self._activation(prompt, adapter),
            params=request.params,
            listener=listener,
            continuations=continuations,
            scope=request.cache_scope,
            max_invocations=request.max_invocations,
        )
        job.branches = [Branch(job, index) for index in range(_num_branches(request.params, continuations))]
        for index, continuation in enumerate(continuations or ()):
            self._check_tokens(continuation, f"continuation {index}")
            job.branches[index].output = list(continuation)
        self._check_fits(job)
        if continuations is None:
            self._prepare_sampling(job)
            job.callees = self._callees(request)
        elif request.invocable:
            raise InputError("score writes no output that could invoke an adapter: leave `invocable` out")
        return job

    def invocation_of(self, adapter: Adapter | None) -> tuple[int, ...]:
        """The tokens that call an adapter: an aLoRA's invocation tokens, or a plain LoRA's calling text."""
        if adapter is None:
            raise InvocationError("invoke needs an adapter: name one in `adapter`")
        spec = adapter.spec
        if spec.invocation_tokens:
            return spec.invocation_tokens
        if spec.invocation_text:
            return self._chat.encode(spec.invocation_text)
        raise InvocationError(
            f"adapter {spec.name} is a plain LoRA without a calling text, so nothing can be appended to invoke it: "
            "send a prompt that asks for its answer instead"
        )

    def _callees(self, request: Request) -> tuple[Callee, ...]:
        params = request.params
        callees = tuple(self._callee(invocable, params.max_tokens) for invocable in request.invocable)
        ignored = params.ignore_eos and params.constraint is None
        check_reachable(callees, frozenset() if ignored else self._chat.eos_token_ids)
        return callees

    def _callee(self, invocable: Invocable, max_tokens: int) -> Callee:
        adapter = self._registry.get(invocable.adapter)
        check_callable(adapter, invocable.closing, max_tokens)
        if invocable.closing:
            self._check_tokens(invocable.closing, f"the closing of adapter {invocable.adapter}")
        matcher = None
        if invocable.params.constraint is not None:
            room = max_tokens - len(adapter.spec.invocation_tokens)
            matcher = self._constraints.compile(invocable.params.constraint, min(invocable.params.max_tokens, room))
        return Callee(adapter, invocable.params, invocable.closing, matcher)

    def _prepare_sampling(self, job: Job) -> None:
        params = job.params
        matcher = None
        if params.constraint is not None:
            matcher = self._constraints.compile(params.constraint, params.max_tokens)
        for branch in job.branches:
            branch.generator = make_generator(params, branch.index)
            branch.matcher = None if matcher is None else matcher()

    def _prompt(self, request: Request, adapter: Adapter | None) -> tuple[int, ...]:
        if isinstance(request.prompt, Chat):
            if not request.invoke:
                return self._chat.prompt(request.prompt)
            tokens = self._chat.history(request.prompt)
        else:
            tokens = request.prompt
        if request.invoke:
            tokens = (*tokens, *self.invocation_of(adapter))
        self._check_tokens(tokens, "the prompt")
        return tokens

    def _activation(self, prompt: tuple[int, ...], adapter: Adapter) -> int:
        if adapter.spec.kind == "lora":
            return 0
        return activation_index(
            prompt, adapter.spec.invocation_tokens, describe=self._chat.decode, adapter=adapter.spec.name
        )

    def _check_tokens(self, tokens: Sequence[int], what: str) -> None:
        if not tokens:
            raise InputError(f"{what} is empty")
        wrong = next((t for t in tokens if not 0 <= t < self._vocab_size), None)
        if wrong is not None:
            raise InputError(f"{what} has token id {wrong}, but ids go from 0 to {self._vocab_size - 1}")

    def _check_fits(self, job: Job) -> None:
        """Refuse at once what no waiting or eviction could ever make fit."""
        growth = max(branch.growth for branch in job.branches)
        total = len(job.prompt) + growth
        asked = f"the prompt has {len(job.prompt)} tokens and asks for {growth + 1} more"
        if total + 1 > self._max_context:
            raise PromptTooLong(f"{asked}: together over the context of {self._max_context} tokens")
        if total > self._num_slots:
            raise PromptTooLong(f"{asked}: the KV budget holds {self._num_slots} tokens in all")


def _num_branches(params: SamplingParams, continuations: Sequence[Sequence[int]] | None) -> int:
    if continuations is None:
        return params.n
    if not continuations:
        raise InputError("score needs at least one continuation")
    return len(continuations)
