"""What scores an answer: the intrinsics that judge one, and a caller's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from midstream.backend import Backend
from midstream.errors import InputError, MidstreamError
from midstream.intrinsics import certainty, hallucination, requirement_check
from midstream.transcript import Transcript

INTRINSICS = ("hallucination", "certainty", "requirement_check")


class Scorer(Protocol):
    """Gives the last answer of a conversation a finite number: the higher, the better."""

    async def __call__(self, backend: Backend, answered: Transcript, /) -> float: ...


async def groundedness(backend: Backend, answered: Transcript) -> float:
    """The probability that the documents support the answer."""
    return (await hallucination(backend, answered)).probability


async def confidence(backend: Backend, answered: Transcript) -> float:
    """The expected chance that the answer is right."""
    return (await certainty(backend, answered)).certainty


def requirement(text: str) -> Scorer:
    """The probability that the answer meets a requirement, given in words."""

    async def met(backend: Backend, answered: Transcript) -> float:
        return (await requirement_check(backend, answered, text)).probability

    return met


def scorers_of(
    weights: Mapping[str, float], requirement_text: str | None, own: Mapping[str, Scorer]
) -> dict[str, Scorer]:
    """The scorers that `weights` names. Raises InputError for a name without a scorer, or a scorer without a weight."""
    known: dict[str, Scorer] = {"hallucination": groundedness, "certainty": confidence}
    if requirement_text is not None:
        known["requirement_check"] = requirement(requirement_text)
    taken = sorted(set(own) & set(INTRINSICS))
    if taken:
        raise InputError(f"scorer {taken[0]!r} has the name of a built-in one: give it another")
    known |= own
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise InputError(f"there is no scorer {unknown[0]!r} (there are {', '.join(sorted(known))})")
    idle = sorted(set(own) - set(weights))
    if idle:
        raise InputError(f"scorer {idle[0]!r} has no weight: name it in `weights`")
    return {name: known[name] for name in weights}


async def scored(scorer: Scorer, name: str, backend: Backend, answered: Transcript) -> float:
    """A scorer's number. Raises InputError where it fails by itself or gives no finite number."""
    try:
        value = await scorer(backend, answered)
    except MidstreamError:
        raise
    except Exception as error:
        # A scorer may be the caller's own and raise anything.
        raise InputError(f"scorer {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"scorer {name!r} gave {value!r}, which is no finite number")
    return float(value)


def has_documents(transcript: Transcript) -> bool:
    """Whether any turn has something that an answer can be grounded in."""
    return any(message.documents or message.role.startswith("document ") for message in transcript.messages)
