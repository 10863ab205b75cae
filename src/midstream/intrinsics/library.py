"""The shipped intrinsics as functions: each calls the adapter of its name and gives back what that one decides.

All raise AdapterNotFound when no such adapter is loaded, ContractError when the one of that name answers something
else, and what `call_intrinsic` raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midstream.backend import Backend
from midstream.errors import ContractError, OutputError
from midstream.intrinsics.call import IntrinsicResult, call_intrinsic, find
from midstream.intrinsics.render import Conversation
from midstream.intrinsics.spec import Contract, load_contract
from midstream.types import AdapterInfo

_BINS = 10  # certainty's digit k stands for a chance of (k + 0.5) / 10
_QUESTION = "rewritten_question"


@dataclass(frozen=True, slots=True)
class QueryRewrite:
    """The last question, so put that it can be understood alone."""

    question: str
    call: IntrinsicResult


@dataclass(frozen=True, slots=True)
class Answerability:
    """Whether the documents answer the last question, and the probability that they do."""

    answerable: bool
    probability: float
    call: IntrinsicResult


@dataclass(frozen=True, slots=True)
class Certainty:
    """The expected chance, between 0 and 1, that the last answer is right."""

    certainty: float
    call: IntrinsicResult


@dataclass(frozen=True, slots=True)
class Hallucination:
    """Whether the documents support all that the last answer says, and the probability that they do."""

    grounded: bool
    probability: float
    call: IntrinsicResult


@dataclass(frozen=True, slots=True)
class Jailbreak:
    """Whether the last user turn tries to break the assistant's rules, and the probability that it does."""

    jailbreak: bool
    probability: float
    call: IntrinsicResult


@dataclass(frozen=True, slots=True)
class RequirementCheck:
    """Whether the last answer meets the requirement, and the probability that it does."""

    met: bool
    probability: float
    call: IntrinsicResult


async def query_rewrite(
    backend: Backend, conversation: Conversation, *, adapter: str = "query_rewrite"
) -> QueryRewrite:
    """Rewrite the last question so that it needs no conversation."""
    info, contract = await _loaded(backend, adapter)
    properties = (contract.json_schema or {}).get("properties") or {}
    if contract.transformations or _QUESTION not in properties:
        raise _another(adapter, contract, f"an object with {_QUESTION!r}")
    call = await call_intrinsic(backend, info, conversation)
    question = call.result.get(_QUESTION) if isinstance(call.result, dict) else None
    if not isinstance(question, str):
        raise OutputError(f"adapter {adapter} gave {call.result!r}, which has no {_QUESTION}")
    return QueryRewrite(question, call)


async def answerability(
    backend: Backend, conversation: Conversation, *, adapter: str = "answerability"
) -> Answerability:
    """Tell whether the documents answer the last question."""
    call = await _choose(backend, adapter, conversation, ("answerable", "unanswerable"))
    return Answerability(call.result == "answerable", _share(call, "answerable"), call)


async def certainty(backend: Backend, conversation: Conversation, *, adapter: str = "certainty") -> Certainty:
    """Tell how likely the last answer is right."""
    call = await _choose(backend, adapter, conversation, tuple(range(_BINS)))
    return Certainty(sum(_share(call, k) * (k + 0.5) / _BINS for k in range(_BINS)), call)


async def hallucination(
    backend: Backend, conversation: Conversation, *, adapter: str = "hallucination"
) -> Hallucination:
    """Tell whether the last answer keeps to the documents."""
    call = await _choose(backend, adapter, conversation, ("grounded", "ungrounded"))
    return Hallucination(call.result == "grounded", _share(call, "grounded"), call)


async def jailbreak(backend: Backend, conversation: Conversation, *, adapter: str = "jailbreak") -> Jailbreak:
    """Tell whether the last user turn is an attack on the assistant's rules."""
    call = await _choose(backend, adapter, conversation, ("yes", "no"))
    return Jailbreak(call.result == "yes", _share(call, "yes"), call)


async def requirement_check(
    backend: Backend, conversation: Conversation, requirement: str, *, adapter: str = "requirement_check"
) -> RequirementCheck:
    """Tell whether the last answer meets a requirement, given in words."""
    call = await _choose(backend, adapter, conversation, ("met", "not_met"), {"requirement": requirement})
    return RequirementCheck(call.result == "met", _share(call, "met"), call)


async def _loaded(backend: Backend, adapter: str) -> tuple[AdapterInfo, Contract]:
    info = find({info.name: info for info in await backend.adapters()}, adapter)
    return info, load_contract(info)


async def _choose(
    backend: Backend,
    adapter: str,
    conversation: Conversation,
    labels: tuple[str | int, ...],
    arguments: Mapping[str, Any] | None = None,
) -> IntrinsicResult:
    """Call an adapter that answers with one of `labels`, after a look at its contract."""
    info, contract = await _loaded(backend, adapter)
    if contract.transformations or set(contract.options()) != set(labels):
        raise _another(adapter, contract, f"one of {', '.join(map(repr, labels))}")
    call = await call_intrinsic(backend, info, conversation, arguments)
    if call.probabilities is None:
        raise OutputError(f"adapter {adapter} answered {call.result!r} without the probabilities of its labels")
    return call


def _share(call: IntrinsicResult, label: str | int) -> float:
    return (call.probabilities or {}).get(label, 0.0)


def _another(adapter: str, contract: Contract, promised: str) -> ContractError:
    given = contract.response_format or "plain text"
    changed = ", which is then transformed" if contract.transformations else ""
    return ContractError(f"adapter {adapter} answers with {given}{changed}; this function needs {promised}")
