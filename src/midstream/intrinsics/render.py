"""From a conversation and a contract to a request. Append only, unless the contract itself rewrites what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from midstream.adapters.activation import find_last
from midstream.backend import Backend
from midstream.errors import ContractError, InputError
from midstream.intrinsics.rewrite import TOP_LOGPROBS, check_arguments, instruct, rewrite_chat
from midstream.intrinsics.sentences import Tagged
from midstream.intrinsics.spec import Contract
from midstream.types import AdapterInfo, Chat, Request, SamplingParams

_PARAMETERS = {"max_completion_tokens": "max_tokens"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A request, what of it may have sentence tags, and how the contract changed what stands before the end."""

    request: Request
    tagged: Tagged | None = None
    prefix_rewritten: str | None = None


async def render(
    backend: Backend,
    adapter: AdapterInfo,
    contract: Contract,
    conversation: tuple[int, ...] | Chat,
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """The request that calls an intrinsic on a conversation, given as token ids or as messages."""
    params = sampling_params(contract)
    if not contract.needs_messages:
        check_arguments(contract, arguments or {}, adapter.name)
        prompt = judged(conversation, adapter) if isinstance(conversation, Chat) else conversation
        return Rendered(Request(prompt=prompt, adapter=adapter.name, invoke=True, params=params))
    if not isinstance(conversation, Chat):
        reason = "has an instruction" if contract.rewrites is None else f"rewrites its prompt ({contract.rewrites})"
        raise ContractError(f"intrinsic {adapter.name} {reason}, so it needs messages, not token ids")
    conversation = judged(conversation, adapter)
    history, tagged = rewrite_chat(conversation, contract)
    chat = instruct(history, contract, arguments or {}, adapter.name)
    request = await _request(backend, adapter, history, chat, params)
    return Rendered(request, tagged, contract.rewrites if history != conversation else None)


async def _request(
    backend: Backend, adapter: AdapterInfo, history: Chat, chat: Chat, params: SamplingParams
) -> Request:
    """The request for a chat, which is `history` and what was appended. It is invoked unless that does so itself."""
    if chat != history:
        tokens = await backend.tokenize(chat)
        start = find_last(tokens, adapter.invocation_tokens)
        # Only one in what was appended counts: an earlier one is a quotation, or another call's.
        shared = _common(tokens, await backend.tokenize(history))
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


def sampling_params(contract: Contract) -> SamplingParams:
    """How an intrinsic's answer is decoded. Raises ContractError where the contract's parameters are none of ours."""
    named = {**(contract.parameters or {})}
    named |= named.pop("extra_body", {})
    named.pop("chat_template_kwargs", None)  # these go to the template
    given = {_PARAMETERS.get(key, key): value for key, value in named.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    if contract.needs_logprobs:
        given |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    elif contract.logprobs_workaround:
        given["logprobs"] = True  # for the texts of the tokens
    try:
        return SamplingParams(**given, constraint=contract.constraint())
    except (ValidationError, TypeError) as error:
        raise ContractError(f"io.yaml parameters {given}: {error}".replace("\n", " ")) from error


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)
