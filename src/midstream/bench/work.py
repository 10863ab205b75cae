"""What is timed: an adapter's call with all that it is compared with, and decoding. Each in rounds.

One round of calls at a context of n tokens, an invocation of m, all in one cache:

    base            c0 + invocation                  P(0→n+m): prefill, and the bound's numerator
    alora           c0 + invocation  → label         computes m
    base            c0 + m others                    P(n→n+m): the bound's denominator
    alora           c1 + invocation  → 16 tokens     computes m
    six aloras      c2 + invocations → labels        compute m each, in one batch
    (cleared) lora  c0 + invocation  → label         computes n + m
    (cleared) lora  c1 + invocation  → 16 tokens     computes n + m

c0, c1 and c2 have n tokens and share all but the last few; the base model has read each before it is called on, so
that every call is its adapter's first there without n tokens being read anew for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from midstream.bench.adapters import FANOUT, Adapters
from midstream.bench.contexts import Tokens, parting_early, parting_late
from midstream.bench.figures import timed
from midstream.bench.machine import read_bandwidth
from midstream.bench.model import ModelFacts
from midstream.errors import MidstreamError
from midstream.session import Engine
from midstream.types import AdapterInfo, Choice, Completion, Request, SamplingParams, Score

FREE_TOKENS = 16
STEPS = 24
STREAMS = 8
LABEL = SamplingParams(max_tokens=8, constraint=Choice(options=('"yes"', '"no"')))
FREE = SamplingParams(max_tokens=FREE_TOKENS, ignore_eos=True)
FIRST_STEPS = SamplingParams(max_tokens=2, ignore_eos=True)
STEADY = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)

Samples = dict[str, float]
"""One round's measurements by name; the name ends with the unit."""


class Answered(NamedTuple):
    """A completion, and when on the clock of time.perf_counter its request was made."""

    completion: Completion
    started: float

    @property
    def first(self) -> float:
        return self.started + (self.completion.time_to_first_token_s or 0.0)

    @property
    def end(self) -> float:
        return self.started + self.completion.seconds


class Work:
    """Measurements on one engine with its adapters."""

    def __init__(self, engine: Engine, facts: ModelFacts, adapters: Adapters) -> None:
        self._engine = engine
        self._facts = facts
        self._adapters = adapters
        self._chat = engine.aio.chat

    # ------------------------------------------------------------------ room

    def needs(self, tokens: int) -> tuple[int, int]:
        """The longest sequence at that context, and the KV slots of a round of calls and of one stream."""
        m = self._adapters.longest_invocation
        longest = tokens + m + STEPS + LABEL.max_tokens
        return longest, longest + 3 * m + 64 + (m + LABEL.max_tokens) * (FANOUT + 1)

    def stream_slots(self, tokens: int) -> int:
        """The KV slots of all streams together."""
        return STREAMS * (tokens + 2 * STEPS)

    # ------------------------------------------------------------------ calls

    def calls(self, tokens: int) -> Samples:
        """One round of calls on a conversation of so many tokens. Raises MidstreamError where one read too much."""
        first, lora = self._adapters.alora[0], self._adapters.lora
        c0, c1, c2 = (parting_late(self._chat, tokens, number) for number in range(3))
        prompt, invocation = (*c0, *first.invocation_tokens), len(first.invocation_tokens)
        found: Samples = {}
        self._engine.clear_cache()
        found["base_all_s"] = self._read(prompt, len(prompt))
        held = self._kv_bytes()
        found["label_alora_s"] = self._timed([(first, c0)], LABEL, invocation)
        found["kv_one_bytes"] = tokens * self._facts.token_bytes + self._kv_bytes() - held
        found["base_last_s"] = self._read((*c0, *self._others(first)), invocation)
        self._read(c1)
        found["free_alora_s"] = self._timed([(first, c1)], FREE, invocation)
        self._read(c2)
        held = self._kv_bytes()
        found["fanout_s"] = self._timed([(info, c2) for info in self._adapters.alora], LABEL)
        found["kv_all_bytes"] = tokens * self._facts.token_bytes + self._kv_bytes() - held
        for name, params, context in (("label_lora_s", LABEL, c0), ("free_lora_s", FREE, c1)):
            self._engine.clear_cache()
            found[name] = self._timed([(lora, context)], params, len(prompt))
        return found

    def _timed(
        self, calls: Sequence[tuple[AdapterInfo, Tokens]], params: SamplingParams, computed: int | None = None
    ) -> float:
        """Seconds of calls at once, seen from outside. Each must compute what it claims to, its invocation if None."""
        # A plain LoRA is called with its twin's invocation, which to it is text like any other.
        text = self._adapters.alora[0].invocation_tokens
        requests = [
            Request(prompt=(*context, *(info.invocation_tokens or text)), adapter=info.name, params=params)
            for info, context in calls
        ]
        answers: list[Answered] = []
        seconds = timed(lambda: answers.extend(self._together(requests)))
        for (info, _), answer in zip(calls, answers, strict=True):
            wanted = len(info.invocation_tokens) if computed is None else computed
            _require(f"a call of {info.name}", answer.completion.usage.computed_tokens, wanted)
        return seconds

    def _read(self, prompt: Tokens, computed: int | None = None) -> float:
        """Seconds in which the base model reads a prompt, seen from outside; it must compute so many tokens of it."""
        scores: list[Score] = []
        request = Request(prompt=prompt)
        seconds = timed(lambda: scores.append(self._engine.run(self._engine.aio.score(request, [[0]]))))
        if computed is not None:
            _require("the base model's reading", scores[0].usage.computed_tokens, computed)
        return seconds

    def _others(self, info: AdapterInfo) -> Tokens:
        """As many tokens as an invocation has, and no invocation: the first is another one."""
        return tuple((token + 1) % self._engine.aio.vocab_size for token in info.invocation_tokens)

    def _kv_bytes(self) -> int:
        return self._engine.stats().kv_used_bytes

    # ------------------------------------------------------------------ decoding

    def read_streams(self, tokens: int, streams: int) -> None:
        """Have the base model read the conversations of so many streams, and take first steps, untimed."""
        self._engine.clear_cache()
        prompts = [parting_early(self._chat, tokens, number) for number in range(streams)]
        for prompt in prompts:
            self._read(prompt)
        self._together([Request(prompt=prompt, params=FIRST_STEPS) for prompt in prompts])

    def decode(self, tokens: int, streams: int) -> Samples:
        """One round of decoding behind conversations that have been read: one stream, then all, if several fit."""
        found: Samples = {"read_bytes_per_s": read_bandwidth(self._facts.device) * 1e9}
        found["step_s"] = self._step(tokens, 1)
        if streams > 1:
            found["streams_step_s"] = self._step(tokens, streams)
        return found

    def _step(self, tokens: int, streams: int) -> float:
        """Seconds of a step of all streams: from the first token of any to the last of all."""
        prompts = [parting_early(self._chat, tokens, number) for number in range(streams)]
        answers = self._together([Request(prompt=prompt, params=STEADY) for prompt in prompts])
        for answer in answers:
            _require("a stream", answer.completion.usage.computed_tokens, 1)
        return (max(a.end for a in answers) - min(a.first for a in answers)) / STEPS

    # ------------------------------------------------------------------ inside

    def _together(self, requests: Sequence[Request]) -> list[Answered]:
        async def one(request: Request) -> Answered:
            started = time.perf_counter()
            return Answered(await self._engine.aio.complete(request), started)

        async def all_() -> list[Answered]:
            return await asyncio.gather(*(one(request) for request in requests))

        return self._engine.run(all_())


def _require(what: str, computed: int, wanted: int) -> None:
    """A measurement that read more or less than it claims to measures something else."""
    if computed != wanted:
        raise MidstreamError(f"{what} computed {computed} tokens where {wanted} were to be measured")
