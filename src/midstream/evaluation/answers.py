"""The base model's own answers to questions with known ones: what `certainty` learns from and is measured against."""

from __future__ import annotations

import asyncio
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midstream.backend import Backend
from midstream.types import Chat, Choice, Document, Message, Request, SamplingParams

_MAX_TOKENS = 16
_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its passage if it has one, the options if it is multiple choice, and the right answers."""

    id: str
    source: str
    chat: Chat
    options: tuple[str, ...]
    right: tuple[str, ...]


def read_question(row: Mapping[str, Any]) -> Question:
    """A question from {question, [passage], choices, gold} or {question, answers}. Raises KeyError, ValueError."""
    options = tuple(str(choice) for choice in row.get("choices") or ())
    right = (_gold(options, row["gold"]),) if options else _answers(row["answers"])
    documents = (Document(text=row["passage"]),) if row.get("passage") else ()
    message = Message(role="user", content=_ask(row["question"], options), documents=documents)
    return Question(str(row["id"]), str(row.get("source", "")), Chat(messages=(message,)), options, right)


def _gold(options: Sequence[str], gold: Any) -> str:
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold {gold!r} is no index of the {len(options)} choices")
    return options[gold]


def _answers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f"answers {value!r} is no list of texts")
    return tuple(value)


def _ask(question: str, options: Sequence[str]) -> str:
    if options:
        return "\n".join([question, "Answer with one of:", *(f"- {option}" for option in options)])
    return f"{question}\nAnswer in a few words."


async def sample_answers(backend: Backend, question: Question, count: int, seed: int) -> list[str]:
    """`count` answers of the base model at temperature 0.7; where there are options, each answer is one of them."""
    params = SamplingParams(
        n=count,
        temperature=_TEMPERATURE,
        max_tokens=max(_MAX_TOKENS, 4 * max(map(len, question.options), default=0)),
        stop=() if question.options else ("\n",),
        constraint=Choice(options=tuple(dict.fromkeys(question.options))) if question.options else None,
        seed=seed,
    )
    completion = await backend.complete(Request(prompt=question.chat, params=params))
    return [choice.text if question.options else choice.text.strip() for choice in completion.choices]


def is_right(answer: str, right: Sequence[str]) -> bool:
    """Whether a free answer has a right one in it, by words as SQuAD normalises them (Rajpurkar et al., 2016)."""
    words = f" {_normalise(answer)} "
    return any(f" {_normalise(each)} " in words for each in right if _normalise(each))


def _normalise(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def certainty_row(question: Question, answers: Sequence[str]) -> dict[str, Any]:
    """A training row: the question with the first answer, and the share of the answers that are right.

    The answers are drawn alike, so that share is the chance that the one shown is right.
    """
    correct = _correct(question, answers)
    return {
        **_shown(question, answers[0]),
        "share": sum(correct) / len(correct),
        "correct": correct[0],
        "answers": list(answers),
    }


def answer_rows(question: Question, answers: Sequence[str], each: int) -> list[dict[str, Any]]:
    """A row for each of the first `each` answers, whose share says whether that very answer is right: 1 or 0.

    What is learned from these tells answers to one question apart; the one share of `certainty_row` cannot.
    """
    correct = _correct(question, answers[:each])
    return [
        {**_shown(question, answer), "id": f"{question.id}#{number}", "share": float(right), "correct": right}
        for number, (answer, right) in enumerate(zip(answers, correct, strict=False))
    ]


def _correct(question: Question, answers: Sequence[str]) -> list[bool]:
    return [answer in question.right if question.options else is_right(answer, question.right) for answer in answers]


def _shown(question: Question, answer: str) -> dict[str, Any]:
    shown = Message(role="assistant", content=answer or "I do not know.")
    return {
        "id": question.id,
        "source": question.source,
        "messages": [message.model_dump() for message in (*question.chat.messages, shown)],
    }


async def certainty_rows(
    backend: Backend, questions: Sequence[Question], *, count: int, seed: int, each: int = 0, at_once: int = 8
) -> list[dict[str, Any]]:
    """Ask the base model each question `count` times; rows in the order of the questions, one for each question or,
    with `each`, one for each of so many of its answers."""
    room = asyncio.Semaphore(at_once)

    async def one(question: Question) -> list[dict[str, Any]]:
        async with room:
            # The seed is the question's own, so that the rest of the file does not change its answers.
            own = random.Random(f"{seed}:{question.id}").getrandbits(62)
            answers = await sample_answers(backend, question, count, own)
            return answer_rows(question, answers, each) if each else [certainty_row(question, answers)]

    return [row for rows in await asyncio.gather(*(one(question) for question in questions)) for row in rows]
