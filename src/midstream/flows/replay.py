"""Replaying a trace: a backend without a model, which answers as the recorded one did."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from midstream.errors import ReplayError
from midstream.flows.tools import Arguments, Observation
from midstream.flows.trace import DELTAS, GIVEN, Entry, Trace, Verb, asked_of, asked_to_tokenize
from midstream.retrieval import Passage, Retriever
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score

# These compute something, so in which order they end decides how a flow goes on.
_ORDERED: frozenset[Verb] = frozenset({"complete", "stream", "score"})
# These may be asked more often than the recorded run did: they give the same each time.
_LASTING: frozenset[Verb] = frozenset({"tokenize", "adapters"})
_DIFFERENCES_SHOWN = 3


class ReplayBackend:
    """Answers what a recorded run asked, each as it was answered, whenever it is asked.

    Equal requests are answered in the order in which the recorded ones ended. Calls of the model end when the
    recorded ones had: all that began or ended before them has done so. So a replayed run decides as the recorded one
    did; a call that would have to wait longer than `patience_s` is a ReplayError, and so is all that the trace does
    not have. Tools are not called: their recorded observations are given. A replay serves one run, which needs the
    trace's seed and the token budget that the recorded one had.
    """

    def __init__(self, trace: Trace, *, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._left: dict[tuple[Verb, str], deque[Entry]] = defaultdict(deque)
        # Of equal ones those that were answered come first.
        for entry in sorted(trace.entries, key=lambda entry: (entry.interrupted, entry.ended)):
            self._left[_key(entry.verb, entry.asked)].append(entry)
        calls = [entry for entry in trace.entries if entry.verb in _ORDERED]
        self._to_begin = {entry.begun: entry for entry in calls}
        self._to_end = {entry.ended: entry for entry in calls if not entry.interrupted}
        self._moved = asyncio.Condition()
        self._used: set[int] = set()

    @property
    def unused(self) -> tuple[Entry, ...]:
        """What the recorded run asked and this one has not, or not yet."""
        return tuple(entry for left in self._left.values() for entry in left if entry.begun not in self._used)

    def retriever(self) -> Retriever:
        """A retriever that finds what the recorded one found."""
        return _ReplayedRetriever(self)

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion:
        completion: Completion = await self.answer("complete", asked_of(request))
        return completion

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        entry = await self._take("stream", asked_of(request))
        for delta in DELTAS.validate_python(entry.deltas):
            yield delta
        completion: Completion = await self._outcome(entry)
        yield Delta(0, "", completion=completion)

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        score: Score = await self.answer("score", asked_of(request, continuations))
        return score

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        tokens: tuple[int, ...] = await self.answer("tokenize", asked_to_tokenize(prompt, header))
        return tokens

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        infos: tuple[AdapterInfo, ...] = await self.answer("adapters", None)
        return infos

    async def observed(
        self, name: str, arguments: Arguments, work: Callable[[], Awaitable[Observation]]
    ) -> Observation:
        observation: Observation = await self.answer("tool", {"name": name, "arguments": dict(arguments)})
        return observation

    # ------------------------------------------------------------------ answering

    async def answer(self, verb: Verb, asked: Any) -> Any:
        """What the recorded run was given for this. Raises ReplayError, or what the recorded run met with."""
        return await self._outcome(await self._take(verb, asked))

    async def _take(self, verb: Verb, asked: Any) -> Entry:
        left = self._left.get(_key(verb, asked))
        if not left:
            raise ReplayError(self._missing(verb, asked))
        entry = left[0] if verb in _LASTING and len(left) == 1 else left.popleft()
        self._used.add(entry.begun)
        async with self._moved:
            self._to_begin.pop(entry.begun, None)
            self._moved.notify_all()
        return entry

    async def _outcome(self, entry: Entry) -> Any:
        if entry.interrupted:
            await asyncio.sleep(self._patience_s)  # the recorded run did not wait for it: nor should this one
            raise ReplayError(f"the recorded run was stopped while it waited for {_shown(entry)}")
        if entry.verb in _ORDERED:
            await self._reach(entry.ended)
        if entry.error is not None:
            raise entry.error.restored()
        return GIVEN[entry.verb].validate_python(entry.given)

    async def _reach(self, moment: int) -> None:
        """Wait until what had begun or ended before a moment of the recorded run has done so in this one."""
        async with self._moved:
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._moved.wait_for(lambda: not self._before(moment))
            except TimeoutError as error:
                late = self._before(moment)[0]
                raise ReplayError(f"the recorded run had {_shown(late)} before this, and this run has not") from error
            del self._to_end[moment]
            self._moved.notify_all()

    def _before(self, moment: int) -> list[Entry]:
        """What has yet to begin or end before a moment of the recorded run."""
        return [entry for left in (self._to_begin, self._to_end) for at, entry in left.items() if at < moment]

    def _missing(self, verb: Verb, asked: Any) -> str:
        """What a run asks that the trace does not have, and how it differs from the nearest that it has."""
        left = [entry for entry in self.unused if entry.verb == verb]
        if not left:
            return f"the trace has no more of {verb}, and the run asks for one"
        differences = min((_differences(entry.asked, asked) for entry in left), key=len)
        shown = "; ".join(differences[:_DIFFERENCES_SHOWN]) or "it was asked more often than recorded"
        return f"the trace has no such {verb}: {shown}"


class _ReplayedRetriever:
    def __init__(self, replay: ReplayBackend) -> None:
        self._replay = replay

    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        passages: Sequence[Passage] = await self._replay.answer("retrieve", {"query": query, "k": k})
        return passages


def _key(verb: Verb, asked: Any) -> tuple[Verb, str]:
    return verb, json.dumps(asked, sort_keys=True)


def _shown(entry: Entry) -> str:
    if isinstance(entry.asked, Mapping) and "adapter" in entry.asked:
        return f"a {entry.verb} of {entry.asked['adapter'] or 'the base model'}"
    return f"a {entry.verb}"


def _differences(recorded: Any, asked: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, in words."""
    if recorded == asked:
        return []
    if isinstance(recorded, Mapping) and isinstance(asked, Mapping):
        names = sorted(recorded.keys() | asked.keys())
        each = [_differences(recorded.get(n), asked.get(n), f"{at}.{n}" if at else n) for n in names]
        return [difference for differences in each for difference in differences]
    if isinstance(recorded, Sequence) and isinstance(asked, Sequence) and not isinstance(recorded, str):
        pairs = enumerate(zip(recorded, asked, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(recorded), len(asked)))
        return [f"{at} differs from item {first} on, of {len(recorded)} recorded and {len(asked)} asked"]
    return [f"{at or 'it'} was {recorded!r} and is {asked!r}"]
