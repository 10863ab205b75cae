"""From the messages of a request to the tokens that a model or an adapter is to see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import Formatter
from typing import Any

from midstream.adapters.activation import find_last
from midstream.errors import InputError
from midstream.intrinsics.spec import load_contract
from midstream.models.chat import ChatTokenizer
from midstream.server.schemas import Passage, Turn
from midstream.types import AdapterInfo, Chat, Message


def chat_of(
    messages: Sequence[Turn],
    documents: Sequence[Passage] | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> Chat:
    """The conversation of a request body."""
    return Chat(
        messages=tuple(_message(turn) for turn in messages),
        documents=tuple(passage.document() for passage in documents or ()),
        tools=tuple(tools or ()),
        template_arguments=template_arguments or {},
    )


def prompt_of(
    tokenizer: ChatTokenizer, chat: Chat, adapter: AdapterInfo | None, *, with_header: bool = True
) -> tuple[int, ...]:
    """The prompt's tokens. Raises InputError where the template refuses the messages.

    For an adapter that the last message, or the header of the answer, does not call already, what calls it is put in
    the place of that header. An invocation further up is a quotation, or an earlier call's, and calls nothing.
    """
    render = tokenizer.prompt if with_header else tokenizer.history
    if adapter is None:
        return render(chat)
    chat = _instruction_apart(chat, adapter)
    prompt = render(chat)
    invocation = adapter.invocation_tokens or tokenizer.encode(adapter.invocation_text)
    if not invocation:
        return prompt  # a plain LoRA without a calling text answers like the base model does
    start = find_last(prompt, invocation)
    if start is not None:
        end = start + len(invocation)
        if _before_the_last(tokenizer, chat)[:end] != prompt[:end]:
            return prompt
    return (*tokenizer.history(chat), *invocation)


def _before_the_last(tokenizer: ChatTokenizer, chat: Chat) -> tuple[int, ...]:
    """The history without its last message."""
    before = chat.model_copy(
        update={"appended": chat.appended[:-1]} if chat.appended else {"messages": chat.messages[:-1]}
    )
    if not before.messages:
        return ()
    try:
        return tokenizer.history(before)
    except InputError:
        return ()  # a template that takes no conversation without its last turn


def _instruction_apart(chat: Chat, adapter: AdapterInfo) -> Chat:
    """Clients that carry out a contract themselves append its instruction as a user turn. It is no turn of the
    conversation, so the documents stay in the turn before it."""
    instruction = load_contract(adapter).instruction
    *earlier, last = chat.messages
    if not earlier or instruction is None or last.role != "user" or not _fills(last.content, instruction):
        return chat
    return chat.model_copy(update={"messages": tuple(earlier), "appended": (last,)})


def _fills(text: str, template: str) -> bool:
    """Whether `text` can be `template` with its fields filled in: its literal parts, in order."""
    parts = [literal for literal, *_ in Formatter().parse(template)]
    if not template.endswith("}"):
        tail = parts.pop()
        if not text.endswith(tail):
            return False
        text = text[: len(text) - len(tail)]
    at = 0
    for index, part in enumerate(parts):
        found = text.find(part, at)
        if found < 0 or (index == 0 and found > 0):
            return False
        at = found + len(part)
    return True


def _message(turn: Turn) -> Message:
    extra = {
        "name": turn.name,
        "tool_calls": None if turn.tool_calls is None else [_parsed(call) for call in turn.tool_calls],
        "tool_call_id": turn.tool_call_id,
        "reasoning_content": turn.reasoning_content,
    }
    return Message(
        role="system" if turn.role == "developer" else turn.role,
        content=_text(turn),
        documents=tuple(passage.document() for passage in turn.documents),
        extra={key: value for key, value in extra.items() if value is not None},
    )


def _text(turn: Turn) -> str:
    if isinstance(turn.content, list):
        return "".join(part.text for part in turn.content)
    return turn.content or ""


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI sends their text, templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
