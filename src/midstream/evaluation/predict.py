"""What each side answers: an adapter, and the base model asked in words, freely or held to the same answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.backend import Backend
from midstream.errors import OutputError
from midstream.intrinsics.call import call_intrinsic
from midstream.training.tasks import BINS, Row, Task
from midstream.types import AdapterInfo, Choice, JsonSchema, Request, SamplingParams

_AT_ONCE = 8
_TEXT_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer: a JSON value, None where the output is none of the answers; and each option's probability."""

    answer: Any
    probabilities: tuple[float, ...] | None = None

    def value(self) -> float:
        """On a scale: the expected chance."""
        if self.probabilities is None:
            return 0.5 if self.answer is None else (self.answer + 0.5) / BINS
        return sum(p * (k + 0.5) / BINS for k, p in enumerate(self.probabilities))


Predictor = Callable[[Row], Awaitable[Prediction]]


async def predict(predictor: Predictor, rows: Sequence[Row], tick: Callable[[], None]) -> list[Prediction]:
    """Predictions in the order of the rows, a few asked at once."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(row: Row) -> Prediction:
        async with room:
            found = await predictor(row)
            tick()
            return found

    return await asyncio.gather(*(one(row) for row in rows))


def by_adapter(backend: Backend, task: Task, adapter: AdapterInfo) -> Predictor:
    """The adapter, called as any user would call it."""

    async def ask(row: Row) -> Prediction:
        arguments = row.arguments if task.instruction is not None else None
        try:
            result = await call_intrinsic(backend, adapter, row.chat, arguments)
        except OutputError:
            return Prediction(None)
        shares = result.probabilities
        return Prediction(result.result, None if shares is None else tuple(shares[o] for o in task.options))

    return ask


def by_base(backend: Backend, task: Task, *, constrained: bool) -> Predictor:
    """The base model, asked in words after the conversation: for free text, or held to the task's answers.

    Asked for a label or a digit, its probabilities are those of the constrained answer in both cases: only what it
    says differs.
    """

    async def held(row: Row) -> Prediction:
        request = Request(prompt=_asked(row, task), params=_params(task))
        choice = (await backend.complete(request)).choices[0]
        shares = choice.probabilities
        probabilities = None if shares is None else tuple(shares[task.answer(o)] for o in task.options)
        return Prediction(_parsed(choice.text), probabilities)

    async def free(row: Row) -> Prediction:
        tokens = _TEXT_TOKENS if task.kind == "text" else 12
        request = Request(prompt=_asked(row, task), params=SamplingParams(max_tokens=tokens))
        completion, bound = await asyncio.gather(backend.complete(request), _bound(row))
        return Prediction(understand(completion.text, task), bound)

    async def _bound(row: Row) -> tuple[float, ...] | None:
        return None if task.kind == "text" else (await held(row)).probabilities

    return held if constrained else free


def _asked(row: Row, task: Task) -> Any:
    """The conversation and the task's question as one more turn. Braces in a question without arguments stay."""
    question = task.question if row.arguments else task.question.replace("{", "{{").replace("}", "}}")
    return row.chat.instructed(question, row.arguments)


def _params(task: Task) -> SamplingParams:
    if task.options:
        options = tuple(task.answer(option) for option in task.options)
        return SamplingParams(max_tokens=32, constraint=Choice(options=options))
    constraint = None if task.schema is None else JsonSchema(schema_text=json.dumps(task.schema))
    return SamplingParams(max_tokens=_TEXT_TOKENS, constraint=constraint)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def understand(text: str, task: Task) -> Any:
    """The answer that a free text gives, None if it is not clear which.

    A label: the one that the text begins with, else the only one in it. A digit: the first. Text: its first line.
    """
    if task.kind == "text":
        line = text.strip().split("\n")[0].strip().strip('"')
        return {task.key: line} if task.key else line
    if task.kind == "scale":
        digit = re.search(r"\d", text)
        return int(digit.group()) if digit else None
    words = _words(text)
    first = [label for label in task.labels if f" {words} ".startswith(f" {_words(label)} ")]
    found = first or [label for label in task.labels if f" {_words(label)} " in f" {words} "]
    return found[0] if len(found) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
