"""Backends for the tests of flows: one that answers by a script, and one that fails at a given call."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from midstream.backend import Backend
from midstream.documents import place_documents
from midstream.errors import AdapterNotFound, ForwardFailed, MidstreamError
from midstream.types import AdapterInfo, Chat, Choice, Completion, CompletionChoice, Delta, Request, Score, Usage

LIBRARY = Path(__file__).parents[2] / "library" / "smollm2-135m-instruct"
READS = {
    "answerability": "user",
    "certainty": "assistant",
    "hallucination": "assistant",
    "jailbreak": "user",
    "query_rewrite": "user",
    "requirement_check": "assistant",
}
END = "\x03"

# What is answered: a text, or the shares of labels (the likeliest is the text), or an error that is raised.
Answer = str | Mapping[str | int, float] | MidstreamError
# Always the same, one after the other (the last stays), or found from the prompt's text and the request.
Script = Answer | Sequence[Answer] | Callable[[str, Request], Answer]


def intrinsic(name: str) -> AdapterInfo:
    """A shipped intrinsic, with its own contract, called by `<name>`."""
    invocation = f"<{name}>"
    contract = (LIBRARY / name / "io.yaml").read_text()
    metadata = {"reads": READS[name]}
    return AdapterInfo(
        name, "alora", f"d-{name}", "", _ids(invocation), invocation, 4, 10, contract=contract, metadata=metadata
    )


class Scripted:
    """Answers by a script for each adapter (None: the base model). A token is a character, its id the code point.

    A turn is `role: content` and an END; an answer that is whole ends with END. Base KV is reused by its longest
    common prefix, so usages are those of an engine that forgets nothing. `requests` are those of `complete`, `stream`
    and `score` in the order in which they began; `running` those that have not ended. `before` is awaited in each.
    """

    def __init__(
        self,
        scripts: Mapping[str | None, Script],
        *,
        adapters: Sequence[str] | None = None,
        before: Callable[[Request], Awaitable[None]] | None = None,
    ) -> None:
        self.scripts = dict(scripts)
        names = [name for name in scripts if name is not None] if adapters is None else adapters
        self.infos = {name: intrinsic(name) for name in names}
        self.before = before
        self.requests: list[Request] = []
        self.running = 0
        self._given: Counter[str | None] = Counter()
        self._read: list[tuple[int, ...]] = []

    async def complete(self, request: Request) -> Completion:
        async with aclosing(self.stream(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                if delta.completion is not None:
                    return delta.completion
        raise AssertionError("a stream ends with its completion")

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.running += 1
        try:
            prompt = self._prompt(request)
            answers = self._answers(request, text_of(prompt))
            await self._wait(request)
            for at in range(max(len(answer.text) for answer in answers)):
                await asyncio.sleep(0)
                for answer in answers:
                    if at < len(answer.text):
                        yield Delta(answer.index, answer.text[at], answer.token_ids[at : at + 1])
            yield Delta(0, "", completion=self._completion(request, prompt, answers))
        finally:
            self.running -= 1

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        """Each token has the probability that the script's shares give the whole continuation's text, else 1/2."""
        self.requests.append(request)
        self.running += 1
        try:
            prompt = self._prompt(request)
            script = self._scripted(request, text_of(prompt))
            await self._wait(request)
        finally:
            self.running -= 1
        shares = script if isinstance(script, Mapping) else {}
        logprobs = tuple((_log(shares.get(text_of(each), 0.5)),) * len(each) for each in continuations)
        return Score(logprobs, self._usage(prompt, sum(map(len, continuations)), request.adapter), None, 0.0)

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return _ids(prompt)
        turns = "".join(f"{turn['role']}: {turn['content']}{END}" for turn in place_documents(prompt))
        return _ids(turns + ("assistant: " if header else ""))

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(self.infos.values())

    # ------------------------------------------------------------------ inside

    async def _wait(self, request: Request) -> None:
        await asyncio.sleep(0)
        if self.before is not None:
            await self.before(request)

    def _prompt(self, request: Request) -> tuple[int, ...]:
        if request.adapter is not None and request.adapter not in self.infos:
            raise AdapterNotFound(f"no adapter {request.adapter!r} is loaded")
        prompt = request.prompt
        if isinstance(prompt, Chat):
            turns = "".join(f"{turn['role']}: {turn['content']}{END}" for turn in place_documents(prompt))
            prompt = _ids(turns + ("" if request.invoke else "assistant: "))
        if request.invoke and request.adapter is not None:
            prompt = (*prompt, *self.infos[request.adapter].invocation_tokens)
        return prompt

    def _scripted(self, request: Request, prompt: str) -> Answer:
        if request.adapter not in self.scripts:
            raise AssertionError(f"no script for {request.adapter}")
        script = self.scripts[request.adapter]
        if callable(script):
            script = script(prompt, request)
        elif isinstance(script, Sequence) and not isinstance(script, str):
            script = script[min(self._given[request.adapter], len(script) - 1)]
        self._given[request.adapter] += 1
        if isinstance(script, MidstreamError):
            raise script
        return script

    def _answers(self, request: Request, prompt: str) -> list[CompletionChoice]:
        return [_choice(index, self._scripted(request, prompt), request) for index in range(request.params.n)]

    def _completion(self, request: Request, prompt: tuple[int, ...], answers: list[CompletionChoice]) -> Completion:
        generated = sum(len(answer.token_ids) for answer in answers)
        usage = self._usage(prompt, generated, request.adapter)
        if request.adapter is None:
            self._read += [(*prompt, *answer.token_ids[:-1]) for answer in answers]
        index = None
        if request.adapter is not None:
            index = len(prompt) - len(self.infos[request.adapter].invocation_tokens)
            self._read.append(prompt[:index])
        return Completion(f"r{len(self.requests)}", tuple(answers), usage, prompt, request.adapter, index, 0.0)

    def _usage(self, prompt: tuple[int, ...], generated: int, adapter: str | None) -> Usage:
        cached = max((_shared(prompt, read) for read in self._read), default=0)
        cached = min(cached, len(prompt) - 1)
        return Usage(len(prompt), cached, 0, len(prompt) - cached, generated, 1)


class Failing:
    """A backend whose call number `at` (the first is 0) raises; None: none does. `calls` has the name of each.

    A stream that is to fail gives `deltas` of its deltas before it does.
    """

    def __init__(
        self, backend: Backend, at: int | None, error: MidstreamError | None = None, *, deltas: int = 0
    ) -> None:
        self.backend = backend
        self.at = at
        self.error = error or ForwardFailed(f"call {at} failed")
        self.deltas = deltas
        self.calls: list[str] = []

    async def complete(self, request: Request) -> Completion:
        self._count("complete")
        return await self.backend.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        failing = len(self.calls) == self.at
        self.calls.append("stream")
        stream = self.backend.stream(request)
        try:
            for number in itertools.count():
                if failing and number == self.deltas:
                    raise self.error
                try:
                    delta = await anext(stream)
                except StopAsyncIteration:
                    return
                yield delta
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        self._count("score")
        return await self.backend.score(request, continuations)

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        self._count("tokenize")
        return await self.backend.tokenize(prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        self._count("adapters")
        return await self.backend.adapters()

    def _count(self, verb: str) -> None:
        self.calls.append(verb)
        if len(self.calls) - 1 == self.at:
            raise self.error


def text_of(tokens: Sequence[int]) -> str:
    """The text of a scripted backend's tokens."""
    return "".join(map(chr, tokens))


def _choice(index: int, answer: Answer, request: Request) -> CompletionChoice:
    assert not isinstance(answer, MidstreamError)
    constraint = request.params.constraint
    shares = None
    if isinstance(constraint, Choice):
        labels = answer if isinstance(answer, Mapping) else {json.loads(answer): 1.0}
        shares = _shares(constraint.options, labels)
        answer = max(shares, key=lambda option: shares[option])
    assert isinstance(answer, str), "shares are of a choice's labels"
    # A label is never cut: the limits of the contracts are for a tokenizer whose tokens are longer than a character.
    chosen = isinstance(constraint, Choice)
    tokens = _ids(answer) if chosen else _ids(answer + END)[: request.params.max_tokens]
    whole = len(tokens) > len(answer) or chosen
    text = answer[: len(tokens)]
    return CompletionChoice(index, text, tokens, "stop" if whole else "length", None, shares)


def _shares(options: Sequence[str], labels: Mapping[str | int, float]) -> dict[str, float]:
    """The shares of all options: those that are not told of share what is left."""
    told = {option: labels[json.loads(option)] for option in options if json.loads(option) in labels}
    assert len(told) == len(labels), f"{sorted(map(str, labels))} are not all among {options}"
    left = max(0.0, 1.0 - sum(told.values())) / max(1, len(options) - len(told))
    return {option: told.get(option, left) for option in options}


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two sequences share at their start."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
