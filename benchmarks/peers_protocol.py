"""What the harness and its workers say to each other: one JSON object a line. Standard library only, for it runs in
the peers' own environments too.

The harness writes `{"op": NAME, ...}` to a worker's standard input and reads `{"ok": ...}`, `{"absent": REASON}` (this
peer cannot be had here) or `{"error": TEXT}` from its standard output. What the worker's libraries print goes to its
standard error. The end of the standard input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO


class Absent(Exception):
    """A peer that cannot be had on this machine, with the reason."""


@dataclass(frozen=True, slots=True)
class Label:
    """An answer that is one of `options` (texts), which all begin with the tokens `opening` and then part.

    `parting[i]` is the token of option i there, so that one decoded token decides.
    """

    options: tuple[str, ...]
    opening: tuple[int, ...]
    parting: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One question. `adapter` None is the base model. The answer is exactly `tokens` tokens, or a label."""

    adapter: str | None
    prompt: tuple[int, ...]
    tokens: int
    label: Label | None = None

    @classmethod
    def read(cls, value: dict[str, Any]) -> Call:
        label = value["label"]
        if label is not None:
            label = Label(tuple(label["options"]), tuple(label["opening"]), tuple(label["parting"]))
        return cls(value["adapter"], tuple(value["prompt"]), value["tokens"], label)


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens`: the answer's; of a label, only the one in which it parts. `computed`: prompt tokens computed for it.

    `logprobs`: natural logarithms of the tokens' probabilities before any mask, where they were asked for.
    """

    tokens: tuple[int, ...]
    computed: int
    logprobs: tuple[float, ...] = ()

    @classmethod
    def read(cls, value: dict[str, Any]) -> Answer:
        return cls(tuple(value["tokens"]), value["computed"], tuple(value["logprobs"]))


@dataclass(frozen=True, slots=True)
class Setup:
    """What a side is loaded with.

    `model`: a Hugging Face folder, or the file that the peer reads. `adapters`: folder or file by name. `streams`
    conversations of at most `max_tokens` tokens each are served at once. `options` are the peer's own.
    """

    model: str
    dtype: str
    threads: int
    adapters: dict[str, str]
    streams: int
    max_tokens: int
    kv_bytes: int
    options: dict[str, Any] = field(default_factory=dict)


class Side(Protocol):
    """One engine, in a process of its own."""

    def load(self, setup: Setup) -> dict[str, Any]:
        """Make everything ready to answer. Returns facts for the report, such as `version` and `format`."""
        ...

    def clear(self) -> None:
        """Forget all KV."""
        ...

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Let the base model read these conversations."""
        ...

    def run(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        """Answer all calls, in the way that is fastest for this engine."""
        ...

    def close(self) -> None: ...


def serve(side: Side, source: TextIO | None = None, target: TextIO | None = None) -> None:
    """Obey the harness until its end of the line is closed."""
    if target is None:
        target = _private_stdout()
    try:
        for line in source or sys.stdin:
            target.write(json.dumps(_obey(side, json.loads(line))) + "\n")
            target.flush()
    finally:
        side.close()


def _private_stdout() -> TextIO:
    """The standard output for us alone; whatever else prints there is sent to the standard error."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return private


def _obey(side: Side, message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": _OPERATIONS[message["op"]](side, message)}
    except Absent as error:
        return {"absent": str(error)}
    except Exception as error:
        # Peers raise whatever they like; the harness reports it and goes on with the others.
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _load(side: Side, message: dict[str, Any]) -> dict[str, Any]:
    return side.load(Setup(**message["setup"]))


def _clear(side: Side, message: dict[str, Any]) -> None:
    side.clear()


def _warm(side: Side, message: dict[str, Any]) -> None:
    side.warm([tuple(prompt) for prompt in message["prompts"]])


def _run(side: Side, message: dict[str, Any]) -> dict[str, Any]:
    """The answers and the wall seconds that they took, without the reading and writing of these lines."""
    calls = [Call.read(call) for call in message["calls"]]
    started = time.perf_counter()
    answers = side.run(calls, bool(message.get("logprobs")))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "answers": [asdict(answer) for answer in answers]}


_OPERATIONS = {"load": _load, "clear": _clear, "warm": _warm, "run": _run}
