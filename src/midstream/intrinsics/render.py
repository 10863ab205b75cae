"""From a conversation and a contract to a request. Append only: nothing before the end is ever changed."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from pydantic import ValidationError

from midstream.adapters.activation import find_last
from midstream.backend import Backend
from midstream.errors import ContractError, InputError
from midstream.intrinsics.spec import Contract
from midstream.types import AdapterInfo, Chat, Request, SamplingParams

_PARAMETERS = {"max_completion_tokens": "max_tokens"}


async def render(
    backend: Backend,
    adapter: AdapterInfo,
    contract: Contract,
    conversation: tuple[int, ...] | Chat,
    arguments: Mapping[str, Any] | None = None,
) -> Request:
    """The request that calls an intrinsic on a conversation, given as token ids or as messages."""
    params = _params(contract)
    if contract.instruction is None:
        if arguments:
            raise InputError(f"intrinsic {adapter.name} takes no arguments, {sorted(arguments)} were given")
        prompt = judged(conversation, adapter) if isinstance(conversation, Chat) else conversation
        return Request(prompt=prompt, adapter=adapter.name, invoke=True, params=params)
    if not isinstance(conversation, Chat):
        raise ContractError(f"intrinsic {adapter.name} has an instruction, so it needs messages, not token ids")
    conversation = judged(conversation, adapter)
    chat = _with_instruction(conversation, contract.instruction, adapter.name, arguments or {})
    tokens = await backend.tokenize(chat)
    start = find_last(tokens, adapter.invocation_tokens)
    # Only one in what was appended counts: an earlier one is a quotation, or another call's.
    shared = _common(tokens, await backend.tokenize(conversation))
    if start is not None and start + len(adapter.invocation_tokens) > shared:
        return Request(prompt=tokens, adapter=adapter.name, params=params)
    return Request(prompt=chat, adapter=adapter.name, invoke=True, params=params)


def judged(chat: Chat, adapter: AdapterInfo) -> Chat:
    """The chat up to the turn that the adapter judges."""
    reads = adapter.metadata.get("reads", "any")
    if reads == "any":
        return chat
    ends = [i for i, message in enumerate(chat.messages) if message.role == reads]
    if not ends:
        raise InputError(f"intrinsic {adapter.name} judges {reads} turns, and the conversation has none")
    return chat.model_copy(update={"messages": chat.messages[: ends[-1] + 1]})


def _with_instruction(chat: Chat, instruction: str, name: str, arguments: Mapping[str, Any]) -> Chat:
    fields = _fields(instruction, name)
    unknown = set(arguments) - fields | ({"last_message"} & set(arguments))
    if unknown:
        wanted = ", ".join(sorted(fields - {"last_message"})) or "none"
        raise InputError(f"intrinsic {name} does not take {', '.join(sorted(unknown))}; its arguments: {wanted}")
    try:
        return chat.instructed(instruction, arguments)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"intrinsic {name}: its instruction needs argument {error}") from error


def _fields(instruction: str, name: str) -> set[str]:
    try:
        return {field for _, field, _, _ in Formatter().parse(instruction) if field is not None}
    except ValueError as error:
        raise ContractError(f"intrinsic {name}: its instruction is not a format string: {error}") from error


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)


def _params(contract: Contract) -> SamplingParams:
    given = {_PARAMETERS.get(key, key): value for key, value in (contract.parameters or {}).items()}
    try:
        return SamplingParams(**given, constraint=contract.constraint())
    except (ValidationError, TypeError) as error:
        raise ContractError(f"io.yaml parameters {given}: {error}".replace("\n", " ")) from error
