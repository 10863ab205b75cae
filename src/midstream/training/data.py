"""From rows to token ids: a prefix that the base model reads, then the invocation and the answer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from midstream.errors import DataError, InputError
from midstream.models.chat import ChatTokenizer
from midstream.training import invocation
from midstream.training.tasks import Row, Task


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids: the base model's prefix, then the invocation and the target, which the adapter owns.

    `label` is the answer where it is one of a few, else empty.
    """

    prefix: tuple[int, ...]
    invocation: tuple[int, ...]
    target: tuple[int, ...]
    group: str = ""
    label: str = ""


def prefix_tokens(row: Row, task: Task, chat: ChatTokenizer) -> tuple[int, ...]:
    """The conversation of a row, with the task's instruction if it has one, as the adapter is called on it."""
    conversation = row.chat
    if task.instruction is not None:
        try:
            conversation = conversation.instructed(task.instruction, row.arguments)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise InputError(f"the instruction {task.instruction!r} needs argument {error}") from error
    return chat.history(conversation)


def propose_invocation(rows: Iterable[Row], task: Task, chat: ChatTokenizer) -> str:
    """An invocation text for a task. Raises InvocationError when none is found.

    Rows that cannot be rendered are passed over here: `encode` reports them all.
    """
    prefixes: list[tuple[int, ...]] = []
    answers: list[str] = []
    for row in rows:
        with suppress(InputError):
            prefixes.append(prefix_tokens(row, task, chat))
        answers.append(task.answer(row.target))
    return invocation.propose(task.name, chat, prefixes, answers)


def encode(rows: Iterable[Row], task: Task, chat: ChatTokenizer, text: str) -> list[Example]:
    """Rows as token ids. Raises DataError with every row that cannot be rendered or makes the invocation ambiguous."""
    tokens = chat.encode(text)
    examples: list[Example] = []
    problems: list[str] = []
    for row in rows:
        answer = task.answer(row.target)
        try:
            prefix = prefix_tokens(row, task, chat)
            invocation.check(text, chat, prefix)
            invocation.check_answer(text, chat, answer)
        except InputError as error:
            problems.append(f"{row.place or 'a row'}: {error}")
            continue
        target = chat.encode(answer)
        # A grammar ends a JSON answer; plain text ends itself.
        target += (min(chat.eos_token_ids),) if task.schema is None else ()
        label = answer if task.kind == "label" else ""
        examples.append(Example(prefix, tokens, target, row.group, label))
    if problems:
        raise DataError("data", problems)
    return examples


def sample(examples: Sequence[Example], count: int | None, max_prefix: int | None, seed: int) -> list[Example]:
    """At most `count` examples, none with a longer prefix than `max_prefix`.

    As many of each label as there are, up to an equal share; where a label has fewer, the others fill the count.
    """
    kept = [e for e in examples if max_prefix is None or len(e.prefix) <= max_prefix]
    random.Random(seed).shuffle(kept)
    if count is None or count >= len(kept):
        return kept
    labels = sorted({example.label for example in kept})
    by_label = {label: [e for e in kept if e.label == label] for label in labels}
    share = count // len(labels)
    picked = [e for label in labels for e in by_label[label][:share]]
    rest = [e for label in labels for e in by_label[label][share:]]
    random.Random(seed + 2).shuffle(rest)
    picked += rest[: count - len(picked)]
    random.Random(seed + 1).shuffle(picked)
    return picked
