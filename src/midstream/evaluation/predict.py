"""What each side answers: an adapter, and the base model asked in words, freely or held to the same answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from midstream.backend import Backend
from midstream.errors import OutputError
from midstream.intrinsics.call import call_intrinsic
from midstream.training.tasks import BINS, Row, Task
from midstream.types import AdapterInfo, Choice, JsonSchema, Request, SamplingParams

_TEXT_TOKENS = 96
_LABEL_TOKENS = 12


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
    """Predictions in the order of the rows, all asked at once."""

    async def one(row: Row) -> Prediction:
        found = await predictor(row)
        tick()
        return found

    return await asyncio.gather(*(one(row) for row in rows))


def by_adapter(backend: Backend, task: Task, adapter: AdapterInfo) -> Predictor:
    """The adapter, called as any user would call it."""

    async def ask(row: Row) -> Prediction:
        arguments = _wanted(row, task)
        try:
            result = await call_intrinsic(backend, adapter, row.chat, arguments)
        except OutputError:
            return Prediction(None)
        shares = result.probabilities
        return Prediction(result.result, None if shares is None else tuple(shares[o] for o in task.options))

    return ask


def _wanted(row: Row, task: Task) -> dict[str, str] | None:
    """Of a row's arguments, those that the instruction has a place for."""
    if task.instruction is None:
        return None
    fields = {field for _, field, _, _ in Formatter().parse(task.instruction) if field}
    return {key: value for key, value in row.arguments.items() if key in fields}


def by_base(backend: Backend, task: Task, *, constrained: bool) -> Predictor:
    """The base model, asked in words after the conversation: for free text, or held to the task's answers.

    Asked freely for a label, its probabilities are those of the constrained answer: only what it says differs.
    """

    async def held(row: Row) -> Prediction:
        request = Request(prompt=_asked(row, task), params=_params(task))
        choice = (await backend.complete(request)).choices[0]
        shares = choice.probabilities
        probabilities = None if shares is None else tuple(shares[task.answer(o)] for o in task.options)
        return Prediction(_parsed(choice.text), probabilities)

    async def free(row: Row) -> Prediction:
        tokens = _TEXT_TOKENS if task.kind == "text" else _LABEL_TOKENS
        request = Request(prompt=_asked(row, task), params=SamplingParams(max_tokens=tokens))
        answer = understand((await backend.complete(request)).text, task)
        return Prediction(answer, (await held(row)).probabilities if task.kind == "label" else None)

    return held if constrained else free


def _asked(row: Row, task: Task) -> Any:
    """The conversation and the task's question as one more turn."""
    question = task.question
    if task.instruction is None:
        question = question.replace("{", "{{").replace("}", "}}")
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

    A label: the one that the text begins with, else the only one in it, unless it is denied. A digit: a whole number
    from 0 to 9. Text: its first line.
    """
    if task.kind == "text":
        line = text.strip().split("\n")[0].strip().strip('"')
        return {task.key: line} if task.key else line
    if task.kind == "scale":
        number = re.match(r"\D*(\d+)(?![\d%])", text)
        return int(number.group(1)) if number and int(number.group(1)) < BINS else None
    return _label_in(text, task.labels)


def _label_in(text: str, labels: Sequence[Any]) -> Any:
    shown = {label: str(label).lower() for label in labels}
    for label, name in shown.items():
        if text.strip().strip('".').lower() == name:
            return label
    words = f" {_words(text)} "
    names = {label: f" {_words(name)} " for label, name in shown.items() if _words(name)}
    first = [label for label, name in names.items() if words.startswith(name)]
    if first:
        return max(first, key=lambda label: len(names[label]))
    found = [label for label, name in names.items() if name in words]
    # "not met" contains "met": the longer one is meant.
    longest = [a for a in found if not any(a is not b and names[a] in names[b] for b in found)]
    if len(longest) != 1 or _DENIAL.search(words.split(names[longest[0]])[0]):
        return None
    return longest[0]


_DENIAL = re.compile(r"\b(not|no|never|cannot|isn t|doesn t|don t)\b")


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
