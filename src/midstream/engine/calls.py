"""Calls of adapters from a base model's output: noticing them, their own jobs, and what they put into the output.

    prompt │ base's own text … <invocation> │ answer │ closing │ base's own text …
    ───────┴─────────────────┬──────────────┴────────┴─────────┴──────────────────
    the call's prompt ───────┘ ends here; the adapter owns the invocation and the answer

A branch that calls gives its lease back, so the call finds all that it computed in the tree; while the call runs, the
branch waits and holds nothing. It then goes on with everything up to here as its prompt, and reads what it has not read
itself: the last invocation token, the answer and the closing. What was evicted meanwhile is computed again.
"""

from __future__ import annotations

import time

from midstream.engine.callee import Callee, find_called
from midstream.engine.output import OutputWriter
from midstream.engine.request import Branch, Job
from midstream.engine.sampler import make_generator
from midstream.types import InvokedCall, SamplingParams

_SEED_STRIDE = 1_000_003


class Calls:
    """Starts calls and hands their answers over. It keeps no state: that is the branches'."""

    def __init__(self, writer: OutputWriter) -> None:
        self._writer = writer

    def notice(self, branch: Branch) -> None:
        """After a token of the base model's own: mark the branch where its text now ends with an invocation."""
        if branch.job.callees and branch.finish != "stop":
            branch.called = find_called(branch.job.callees, branch.output, branch.own_from)

    def begin(self, branch: Branch) -> Job | None:
        """The job of the call that a branch has made, if it has; a branch without room for one ends."""
        callee, branch.called = branch.called, None
        if callee is None:
            return None
        room = branch.job.params.max_tokens - len(branch.output)
        if room == 0 or len(branch.calls) == branch.job.max_invocations:
            self._writer.cut(branch)
            return None
        branch.call = _call(branch, callee, room)
        return branch.call

    def answer(self, call: Job) -> Branch:
        """Put a finished call's answer and the callee's closing into the caller's output, as far as there is room."""
        branch, callee = call.caller, call.callee
        assert branch is not None
        assert callee is not None
        told = self._writer.choice(call.branches[0])
        answer = self._writer.without_end(call.branches[0])
        branch.call = None
        branch.calls.append(
            InvokedCall(
                adapter=callee.name,
                start=len(branch.output) - len(callee.invocation),
                end=len(branch.output) + len(answer),
                text=told.text,
                token_ids=answer,
                finish_reason=told.finish_reason,
                probabilities=told.probabilities,
                usage=call.usage(),
                seconds=time.perf_counter() - call.started,
            )
        )
        whole = told.finish_reason == "stop" or call.params.max_tokens == callee.params.max_tokens
        self._insert(branch, answer + callee.closing, whole=whole)
        return branch

    def _insert(self, branch: Branch, tokens: tuple[int, ...], *, whole: bool) -> None:
        """`whole`: room did not cut the answer short, so that the output may end with it where a constraint is met."""
        room = branch.job.params.max_tokens - len(branch.output)
        self._writer.insert(branch, tokens[:room])
        if len(tokens) > room or (len(tokens) == room and not (whole and branch.constraint_met)):
            self._writer.cut(branch)


def _call(branch: Branch, callee: Callee, room: int) -> Job:
    prompt = (*branch.job.prompt, *branch.output)
    params = callee.params.model_copy(update={"max_tokens": min(callee.params.max_tokens, room)})
    call = Job(
        request_id=branch.job.request_id,
        prompt=prompt,
        adapter=callee.adapter,
        # The end of the prompt is the invocation's last occurrence.
        activation=len(prompt) - len(callee.invocation),
        params=params,
        listener=branch.job.listener,
        scope=branch.job.scope,
        caller=branch,
        callee=callee,
    )
    sequence = Branch(call, 0)
    sequence.generator = make_generator(_seeded(params, branch), branch.index)
    sequence.matcher = None if callee.matcher is None else callee.matcher()
    call.branches = [sequence]
    return call


def _seeded(params: SamplingParams, branch: Branch) -> SamplingParams:
    """With a seed of its own for each call, where the caller has one and the callee none."""
    seed = branch.job.params.seed
    if params.seed is not None or seed is None:
        return params
    return params.model_copy(update={"seed": (seed + _SEED_STRIDE * (len(branch.calls) + 1)) % 2**63})
