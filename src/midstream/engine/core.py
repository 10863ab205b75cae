"""The engine's loop body, synchronous and single-threaded: schedule → run → commit."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from midstream.adapters import Adapter, AdapterRegistry
from midstream.adapters.weights import LoraWeights
from midstream.engine.calls import Calls
from midstream.engine.integrity import check_integrity, check_schedule
from midstream.engine.kv_tree import KVTree, Node
from midstream.engine.output import OutputWriter
from midstream.engine.request import Branch, Job
from midstream.engine.sampler import choose, logprob_of
from midstream.engine.scheduler import Scheduler
from midstream.engine.step import Step
from midstream.errors import DeadlineExceeded, ForwardFailed, MidstreamError, OverloadedError
from midstream.types import AdapterInfo, Completion, Delta, Score, TokenLogprob

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What the core needs of the runner; the tests give it another."""

    def run(self, step: Step) -> dict[Branch, Tensor]: ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of a running engine."""

    kv_used_bytes: int
    kv_total_bytes: int
    cached_nodes: int
    running: int
    queued: int
    forwards: int
    prefill_seconds_per_token: float | None

    @property
    def kv_usage(self) -> float:
        """The share of the KV memory that is in use."""
        return self.kv_used_bytes / self.kv_total_bytes


@dataclass(frozen=True, slots=True)
class CacheNode:
    """A run of cached tokens with one owner (an adapter's name, or None), below the node `parent` (0: a root)."""

    id: int
    parent: int
    tokens: int
    owner: str | None
    held: bool


@dataclass(frozen=True, slots=True)
class CacheView:
    """The engine's figures and the KV tree at one moment, parents before children."""

    stats: EngineStats
    nodes: list[CacheNode]


class EngineCore:
    """All mutable state of an engine: the tree, the queue, the running jobs and the adapters."""

    def __init__(
        self,
        *,
        tree: KVTree,
        scheduler: Scheduler,
        registry: AdapterRegistry,
        writer: OutputWriter,
        max_queued: int,
        bytes_per_slot: int,
    ) -> None:
        self.tree = tree
        self.scheduler = scheduler
        self.registry = registry
        self._writer = writer
        self._calls = Calls(writer)
        self._max_queued = max_queued
        self._bytes_per_slot = bytes_per_slot
        self._jobs: dict[str, Job] = {}
        self._digests: dict[str, Adapter] = {}
        self.forwards = 0

    # ------------------------------------------------------------------ jobs

    def add(self, job: Job) -> bool:
        """Queue a job and acquire its adapters. Raises OverloadedError when the queue is full.

        False, with nothing done, when one of them was replaced or taken out since the job was read.
        """
        queued = len({branch.job.request_id for branch in self.scheduler.waiting})
        if queued >= self._max_queued:
            raise OverloadedError(f"{queued} requests are queued already; try again later")
        if not all(self.registry.holds(adapter) for adapter in job.adapters):
            return False
        for adapter in job.adapters:
            self.registry.acquire(adapter.spec.name)
            self._digests[adapter.digest] = adapter
        self._jobs[job.request_id] = job
        self.scheduler.add(self._begin(job.branches))
        self._settle([job])
        return True

    def cancel(self, request_id: str, error: MidstreamError) -> None:
        """End a job at once and free what it holds; unknown or finished ones are left alone."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job, error)

    def fail_all(self, error: MidstreamError) -> None:
        for job in list(self._jobs.values()):
            self._end(job, error)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # ------------------------------------------------------------------ the loop body

    def step(self, runner: StepRunner) -> bool:
        """One forward. False when there was nothing to do."""
        self._expire()
        step = self.scheduler.schedule()
        if step is None:
            return False
        started = time.perf_counter()
        try:
            logits = runner.run(step)
        except Exception:
            log.exception("a forward failed")
            self._run_apart(step, runner)
            return True
        self.scheduler.pace.note(step.num_tokens, time.perf_counter() - started)
        self.commit(step, logits)
        return True

    def _run_apart(self, step: Step, runner: StepRunner) -> None:
        """After a failed forward: each of its jobs in a forward of its own, so that only those that fail end.

        The tree knows of no KV that the failed one computed, so each is planned anew.
        """
        for job in {segment.branch.job: None for segment in step.segments}:
            alone = None if job.root.done else self.scheduler.schedule_only(job)
            if alone is None:
                continue
            try:
                logits = runner.run(alone)
            except Exception as error:
                self._end(job, ForwardFailed(f"the forward of request {job.request_id} failed: {error}"))
            else:
                self.commit(alone, logits)

    def commit(self, step: Step, logits: Mapping[Branch, Tensor]) -> None:
        """Note the KV that the step computed, sample, and tell the listeners."""
        self.forwards += 1
        self._account(step)
        touched: dict[Job, None] = {}
        for branch in (harvest.branch for harvest in step.harvests):
            if branch.job.root.done:
                continue  # another of its branches has failed in this step
            touched[branch.job] = None
            try:
                self._advance(branch, logits[branch])
            except MidstreamError as error:
                self._end(branch.job, error)
            except Exception as error:
                log.exception("sampling failed")
                self._end(branch.job, ForwardFailed(f"sampling for request {branch.job.request_id} failed: {error}"))
        self._settle(touched)

    def _account(self, step: Step) -> None:
        jobs: dict[Job, None] = {}
        for segment in step.segments:
            segment.node.computed = max(segment.node.computed, segment.offset + segment.count)
            jobs[segment.branch.job] = None
            segment.branch.job.charge(segment.position, segment.count)
        for job in jobs:
            job.forwards += 1

    def _advance(self, branch: Branch, logits: Tensor) -> None:
        if branch.job.continuations is not None:
            self._score(branch, logits)
        else:
            self._sample(branch, logits[-1])
        if branch.finish is not None or branch.pausing:
            self.scheduler.retire(branch)

    def _score(self, branch: Branch, logits: Tensor) -> None:
        done = len(branch.scores)
        targets = torch.tensor(branch.output[done : done + logits.shape[0]], device=logits.device)
        logprobs = torch.log_softmax(logits[: len(targets)], dim=-1)
        branch.scores.extend(logprobs.gather(1, targets[:, None])[:, 0].tolist())
        if len(branch.scores) >= len(branch.output):
            branch.finish = "scored"

    def _sample(self, branch: Branch, logits: Tensor) -> None:
        job = branch.job
        matcher = branch.matcher
        allowed = logits if matcher is None else matcher.restrict(logits)
        token = choose(allowed, job.params, branch.generator)
        if job.params.logprobs:
            branch.logprobs.append(logprob_of(logits, token, job.params.top_logprobs))
        if job.first_token_at is None:
            job.first_token_at = time.perf_counter()
        if matcher is not None:
            matcher.accept(token)
        self._take(branch, token)
        self._jump(branch)

    def _jump(self, branch: Branch) -> None:
        """Append the tokens that the branch's constraint forces, without a forward each."""
        matcher = branch.matcher
        if matcher is None or branch.finish == "stop":
            return
        branch.forced.extend(matcher.forced())
        while branch.forced and branch.finish is None and not branch.pausing:
            token = branch.forced.popleft()
            if branch.job.params.logprobs:
                # Nothing was computed for a forced token: the constraint makes it certain.
                branch.logprobs.append(TokenLogprob(token, 0.0))
            self._take(branch, token)
        # Where tokens are left, what the constraint wants was cut short, or an adapter has its turn first.
        if branch.constraint_met and not branch.pausing:
            self._writer.finish_whole(branch)

    def _take(self, branch: Branch, token: int) -> None:
        self._writer.take(branch, token)
        self._calls.notice(branch)
        if branch.finish is None and branch.lease is not None:
            self.tree.append(branch.lease, token)

    # ------------------------------------------------------------------ beginning, calling, telling

    def _begin(self, branches: Sequence[Branch]) -> list[Branch]:
        """Branches without a lease append what is forced; those that need a forward now."""
        for branch in branches:
            if branch.finish is None:
                self._jump(branch)
        return [branch for branch in branches if branch.finish is None and not branch.pausing]

    def _settle(self, touched: Iterable[Job]) -> None:
        """Start the calls that jobs made, hand answers to their callers, and tell the listeners.

        Until all that is left needs a forward: a call whose answer is forced whole ends here.
        """
        jobs = deque(touched)
        while jobs:
            job = jobs.popleft()
            if job.root.done:
                continue
            try:
                jobs.extend(self._start_calls(job) if job.caller is None else self._hand_over(job))
            except MidstreamError as error:
                self._end(job, error)
            except Exception as error:
                log.exception("reporting failed")
                self._end(job, ForwardFailed(f"the answer of request {job.request_id} cannot be told: {error}"))

    def _start_calls(self, job: Job) -> list[Job]:
        calls = [call for branch in job.branches if (call := self._calls.begin(branch)) is not None]
        self.scheduler.add_first(self._begin([call.branches[0] for call in calls]))
        self._report(job)
        return calls

    def _hand_over(self, call: Job) -> list[Job]:
        if not call.finished:
            return []
        caller = self._calls.answer(call)
        self.scheduler.add_first(self._begin([caller]))
        return [caller.job]

    def _report(self, job: Job) -> None:
        if job.streaming:
            for branch in job.branches:
                delta = self._writer.pending(branch)
                if delta is not None:
                    job.listener(delta)
        if job.finished:
            self._close(job)
            job.listener(self._result(job))

    def _result(self, job: Job) -> Completion | Score | Delta:
        seconds = time.perf_counter() - job.started
        if job.continuations is not None:
            scores = tuple(tuple(branch.scores) for branch in job.branches)
            return Score(scores, job.usage(), job.activation, seconds)
        completion = Completion(
            request_id=job.request_id,
            choices=tuple(self._writer.choice(branch) for branch in job.branches),
            usage=job.usage(),
            prompt_token_ids=job.prompt,
            adapter=job.adapter.spec.name if job.adapter is not None else None,
            activation_index=job.activation,
            seconds=seconds,
            time_to_first_token_s=None if job.first_token_at is None else job.first_token_at - job.started,
        )
        return Delta(0, "", completion=completion) if job.streaming else completion

    def _end(self, job: Job, error: MidstreamError) -> None:
        """End a request, with the calls that run on its behalf: a call's failure is its caller's."""
        root = job.root
        if root.done:
            return
        for part in (root, *root.running_calls):
            self.scheduler.remove(part)
        self._close(root)
        root.listener(error)

    def _close(self, job: Job) -> None:
        job.done = True
        self._jobs.pop(job.request_id, None)
        for adapter in job.adapters:
            self.registry.release(adapter)
        used = {adapter.digest for other in self._jobs.values() for adapter in other.adapters}
        for digest in {adapter.digest for adapter in job.adapters} - used:
            del self._digests[digest]

    def _expire(self) -> None:
        now = time.perf_counter()
        for job in [j for j in self._jobs.values() if j.deadline is not None and j.deadline < now]:
            assert job.deadline is not None
            limit = job.deadline - job.started
            self._end(job, DeadlineExceeded(f"request {job.request_id} did not finish within {limit:.3f} s"))

    # ------------------------------------------------------------------ adapters and figures

    def add_adapter(self, adapter: Adapter, *, pin: bool) -> AdapterInfo:
        """Register a loaded adapter, in place of one of the same name."""
        self.registry.add(adapter, pin=pin)
        return next(info for info in self.registry.infos() if info.name == adapter.spec.name)

    def weights_of(self, digest: str) -> Mapping[str, LoraWeights]:
        return self._digests[digest].weights

    def stats(self) -> EngineStats:
        used = self.tree.num_slots - self.tree.slots.num_free
        return EngineStats(
            kv_used_bytes=used * self._bytes_per_slot,
            kv_total_bytes=self.tree.num_slots * self._bytes_per_slot,
            cached_nodes=sum(1 for _ in self.tree.nodes()),
            running=len(self.scheduler.running),
            queued=len(self.scheduler.waiting),
            forwards=self.forwards,
            prefill_seconds_per_token=self.scheduler.pace.seconds_per_token,
        )

    def cache_nodes(self, scope: str | None, limit: int) -> list[CacheNode]:
        """At most `limit` nodes of the tree (of one scope, if one is given), parents before children."""
        names = {info.digest: info.name for info in self.registry.infos()}
        ids: dict[Node, int] = {}
        found: list[CacheNode] = []
        for node in islice(self.tree.nodes(scope), limit):
            ids[node] = len(ids) + 1
            owner = None if node.owner is None else names.get(node.owner, node.owner[:8])
            parent = 0 if node.parent is None else ids.get(node.parent, 0)
            found.append(CacheNode(ids[node], parent, len(node.tokens), owner, node.refs > 0))
        return found

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant of the tree, the leases or the registry is broken."""
        check_integrity(self.tree)
        self.registry.check_integrity()
        check_schedule(self.scheduler, self._jobs.values())
