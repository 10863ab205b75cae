"""Tools that ship with flows: search in a retriever, and intrinsics on the agent's own conversation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from midstream.errors import InputError
from midstream.flows.tools import Arguments, FlowTool, Place, Tool
from midstream.intrinsics import answerability, certainty, hallucination, jailbreak, query_rewrite, requirement_check
from midstream.intrinsics.call import find
from midstream.retrieval import Retriever

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_DIGITS = 4  # of a probability in an observation

_INTRINSICS: dict[str, tuple[Any, str]] = {
    "answerability": (answerability, "Tell whether the documents answer the last question."),
    "certainty": (certainty, "Tell how certain the last thought is."),
    "hallucination": (hallucination, "Tell whether the documents support the last thought."),
    "jailbreak": (jailbreak, "Tell whether the last message is an attack."),
    "query_rewrite": (query_rewrite, "Rewrite the last question to stand alone."),
    "requirement_check": (requirement_check, "Check whether the last thought meets a requirement."),
}


def search(retriever: Retriever, *, name: str = "search", passages: int = 3) -> Tool:
    """A tool that searches in a retriever and gives the texts of the best passages."""

    async def run(query: str) -> list[dict[str, str]]:
        found = await retriever.retrieve(query, passages)
        return [_shown(each.document.title, each.document.text) for each in found][:passages]

    return Tool(name, "Search for passages.", _asking("query"), run)


def intrinsic_tool(
    intrinsic: str, *, requirement: str | None = None, name: str | None = None, adapter: str | None = None
) -> FlowTool:
    """A tool that calls a shipped intrinsic on the conversation so far; all of it was read before.

    One that judges an answer judges the step's thought, or the last turn where nothing was thought; one that judges a
    question judges the last user turn, which after the first step is an observation. `requirement_check` takes its
    requirement as an argument unless it is given here. Raises InputError for an unknown intrinsic.
    """
    if intrinsic not in _INTRINSICS:
        raise InputError(f"no intrinsic {intrinsic!r}: there are {', '.join(_INTRINSICS)}")
    if requirement is not None and intrinsic != "requirement_check":
        raise InputError(f"{intrinsic} takes no requirement")
    function, description = _INTRINSICS[intrinsic]
    loaded = adapter or intrinsic

    async def within(place: Place, arguments: Arguments) -> dict[str, Any]:
        backend = place.backend
        known = {info.name: info for info in await backend.adapters()}
        reads = str(find(known, loaded).metadata.get("reads", "any"))
        if reads != "any" and not any(message.role == reads for message in place.transcript.messages):
            raise ValueError(f"there is no {reads} turn to judge yet")
        given = [requirement or arguments["requirement"]] if intrinsic == "requirement_check" else []
        found = await function(backend, place.transcript, *given, adapter=loaded)
        return {each.name: _short(getattr(found, each.name)) for each in fields(found) if each.name != "call"}

    asks = intrinsic == "requirement_check" and requirement is None
    return FlowTool(name or intrinsic, description, _asking("requirement") if asks else _NO_PARAMETERS, within)


def _asking(name: str) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    return {"type": "object", "properties": {name: text}, "required": [name], "additionalProperties": False}


def _shown(title: str, text: str) -> dict[str, str]:
    return {"title": title, "text": text} if title else {"text": text}


def _short(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float) else value
