"""Requirements that an answer has to meet, and how each is judged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.flows.run import Run
from midstream.intrinsics import requirement_check
from midstream.intrinsics.call import find
from midstream.transcript import Transcript

Judge = Literal["check", "requirement_check"]


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an answer has to be, in words. With a `check`, that decides on the answer's text, else an intrinsic does."""

    text: str
    check: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer meets a requirement, by whose judgement, and the probability: 0 or 1 where a check decides."""

    requirement: str
    met: bool
    probability: float
    judge: Judge

    def as_dict(self) -> dict[str, Any]:
        return {
            "requirement": self.requirement,
            "met": self.met,
            "probability": self.probability,
            "judge": self.judge,
        }


async def verdict(backend: Backend, answered: Transcript, requirement: Requirement, threshold: float) -> Verdict:
    """Judge the last answer; an intrinsic's probability has to reach the threshold.

    Raises InputError, which names the requirement, where its check fails.
    """
    if requirement.check is not None:
        met = _checked(requirement.text, requirement.check, answered.messages[-1].content)
        return Verdict(requirement.text, met, float(met), "check")
    found = await requirement_check(backend, answered, requirement.text)
    return Verdict(requirement.text, found.probability >= threshold, found.probability, "requirement_check")


async def judgeable(backend: Backend, run: Run, requirements: Sequence[Requirement]) -> None:
    """Look for what is needed before anything is generated. Raises AdapterNotFound, or InputError for an empty text."""
    for requirement in requirements:
        if not requirement.text.strip():
            raise InputError("a requirement has no text: say in words what it asks for")
    if any(requirement.check is None for requirement in requirements):
        find({info.name: info for info in await run.adapters_of(backend)}, "requirement_check")


def _checked(text: str, check: Callable[[str], bool], answer: str) -> bool:
    try:
        met = check(answer)
    except Exception as error:
        # A check is the caller's own and may raise anything.
        raise InputError(f"the check of requirement {text!r} failed: {type(error).__name__}: {error}") from error
    if inspect.iscoroutine(met):
        met.close()
        raise InputError(f"the check of requirement {text!r} is a coroutine function: it must give a truth value")
    return bool(met)
