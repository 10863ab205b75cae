"""From a conversation and a contract to a request. Append only, unless the contract itself rewrites what is there."""

from __future__ import annotations

import asyncio
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
from midstream.transcript import Transcript
from midstream.types import AdapterInfo, Chat, Request, SamplingParams

Conversation = tuple[int, ...] | Chat | Transcript

_PARAMETERS = {"max_completion_tokens": "max_tokens"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A request, what of it may have sentence tags, and how the contract changed what stands before the end."""

    request: Request
    tagged: Tagged | None = None
    prefix_rewritten: str | None = None


class Tokenizing:
    """A backend's tokens of chats. Those of a history are found once, however many calls at a time ask for them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._histories: list[tuple[Chat, asyncio.Future[tuple[int, ...]]]] = []

    async def chat(self, chat: Chat) -> tuple[int, ...]:
        return await self.backend.tokenize(chat)

    async def history(self, history: Chat) -> tuple[int, ...]:
        tokens = next((tokens for known, tokens in self._histories if known == history), None)
        if tokens is None:
            tokens = asyncio.ensure_future(self.backend.tokenize(history))
            self._histories.append((history, tokens))
        return await tokens


async def render(
    tokenizing: Tokenizing,
    adapter: AdapterInfo,
    contract: Contract,
    conversation: Conversation,
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """The request that calls an intrinsic on a conversation, given as token ids, as messages or as both.

    What takes time with the length of the conversation is done in threads, so that an event loop goes on meanwhile.
    """
    params = sampling_params(contract)
    conversation = judged(conversation, adapter)
    if not contract.needs_messages:
        check_arguments(contract, arguments or {}, adapter.name)
        prompt = conversation.tokens if isinstance(conversation, Transcript) else conversation
        return Rendered(Request(prompt=prompt, adapter=adapter.name, invoke=True, params=params))
    if isinstance(conversation, Transcript):
        if contract.rewrites is None:
            return await _instructed(tokenizing, adapter, contract, conversation, arguments or {}, params)
        conversation = conversation.chat
    if not isinstance(conversation, Chat):
        reason = "has an instruction" if contract.rewrites is None else f"rewrites its prompt ({contract.rewrites})"
        raise ContractError(f"intrinsic {adapter.name} {reason}, so it needs messages, not token ids")
    history, tagged, chat = await asyncio.to_thread(_written, conversation, contract, arguments or {}, adapter.name)
    request = await _request(tokenizing, adapter, history, chat, params)
    return Rendered(request, tagged, contract.rewrites if history != conversation else None)


async def _instructed(
    tokenizing: Tokenizing,
    adapter: AdapterInfo,
    contract: Contract,
    held: Transcript,
    arguments: Mapping[str, Any],
    params: SamplingParams,
) -> Rendered:
    """The request for a contract's instruction behind the tokens that are held. It is invoked unless it does so."""
    chat = instruct(held.chat, contract, arguments, adapter.name)
    asked, told = await held.instructed(tokenizing.backend, chat)
    start = await asyncio.to_thread(find_last, asked, adapter.invocation_tokens)
    if start is not None and start + len(adapter.invocation_tokens) > len(held.tokens):
        return Rendered(Request(prompt=asked, adapter=adapter.name, params=params))
    return Rendered(Request(prompt=told, adapter=adapter.name, invoke=True, params=params))


def _written(
    conversation: Chat, contract: Contract, arguments: Mapping[str, Any], name: str
) -> tuple[Chat, Tagged, Chat]:
    """The chat as the contract rewrites it, what of it may have tags, and that chat with the instruction."""
    history, tagged = rewrite_chat(conversation, contract)
    return history, tagged, instruct(history, contract, arguments, name)


async def _request(
    tokenizing: Tokenizing, adapter: AdapterInfo, history: Chat, chat: Chat, params: SamplingParams
) -> Request:
    """The request for a chat, which is `history` and what was appended. It is invoked unless that does so itself."""
    if chat != history:
        tokens = await tokenizing.chat(chat)
        start = await asyncio.to_thread(find_last, tokens, adapter.invocation_tokens)
        if start is not None:
            # Only one in what was appended counts: an earlier one is a quotation, or another call's.
            end = start + len(adapter.invocation_tokens)
            if (await tokenizing.history(history))[:end] != tokens[:end]:
                return Request(prompt=tokens, adapter=adapter.name, params=params)
    return Request(prompt=chat, adapter=adapter.name, invoke=True, params=params)


def judged(conversation: Conversation, adapter: AdapterInfo) -> Conversation:
    """The conversation up to the turn that the adapter judges. Of token ids it cannot be told: all of them."""
    reads = str(adapter.metadata.get("reads", "any"))
    if isinstance(conversation, tuple) or reads == "any":
        return conversation
    ends = [i for i, message in enumerate(conversation.messages) if message.role == reads]
    if not ends:
        raise InputError(f"intrinsic {adapter.name} judges {reads} turns, and the conversation has none")
    if isinstance(conversation, Transcript):
        return conversation.until(reads)
    return conversation.model_copy(update={"messages": conversation.messages[: ends[-1] + 1]})


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
