"""What an agent is told of its tools, the schema that its actions are held to, and how an action is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.flows.answer import transcript_of
from midstream.flows.tools import AnyTool
from midstream.transcript import Transcript
from midstream.types import Chat, JsonSchema, Message

# What stands under these is data, not schemas.
_DATA = frozenset({"const", "default", "enum", "examples"})
# Beside these a string is bounded already, or its length is not for us to say.
_BOUNDED = frozenset({"maxLength", "enum", "const", "pattern", "format"})


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the model chose: a tool with its arguments, or an answer."""

    tool: str | None = None
    arguments: dict[str, Any] | None = None
    answer: str | None = None


# ---------------------------------------------------------------------- telling


def introduction(tools: Sequence[AnyTool], *, thinks: bool) -> str:
    """What the model is told of its tools, and how to write."""
    how = "Write one line of thought, then one line of JSON" if thinks else "Write one line of JSON"
    answer = '{"answer":"..."}'
    if not tools:
        return f"{how}: {answer}"
    listed = "\n".join(f"- {each.name}({_signature(each.parameters)}): {each.description}" for each in tools)
    return f'{how}: {{"tool":"...","arguments":{{...}}}} to use a tool, or {answer} to answer.\nTools:\n{listed}'


async def introduced(backend: Backend, conversation: Chat | Transcript, text: str) -> Transcript:
    """The conversation with `text` in it, unless an earlier run has told it.

    A chat without a system message gets the text as one; where there is one it stays, and the first user turn begins
    with the text. Of a transcript everything up to the last answer is kept as it is held, and the first user turn
    after it begins with the text. Raises InputError where no user turn waits for an answer.
    """
    messages = conversation.messages
    if not messages or messages[-1].role != "user":
        raise InputError("there is nothing for the agent to do: the conversation must end with a user turn")
    if any(text in message.content for message in messages):
        return await transcript_of(backend, conversation)
    if isinstance(conversation, Transcript):
        if any(message.role == "assistant" for message in messages):
            held = conversation.until("assistant")
            return await held.add(backend, *_headed(messages[len(held.messages) :], text))
        conversation = conversation.chat
    turns = _headed(messages, text)
    if messages[0].role != "system":
        turns = (Message(role="system", content=text), *messages)
    return await Transcript.of(backend, conversation.model_copy(update={"messages": turns}))


def _headed(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages, the first user turn among them beginning with the text."""
    first = next(i for i, message in enumerate(messages) if message.role == "user")
    turn = messages[first].model_copy(update={"content": f"{text}\n\n{messages[first].content}"})
    return (*messages[:first], turn, *messages[first + 1 :])


def _signature(parameters: Mapping[str, Any]) -> str:
    required: Sequence[str] = parameters.get("required", ())
    properties: Mapping[str, Any] = parameters.get("properties", {})
    return ", ".join(f"{name}{'' if name in required else '?'}: {_type(each)}" for name, each in properties.items())


def _type(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema:
        return "|".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if isinstance(kinds := schema.get("anyOf"), Sequence):
        return "|".join(map(_type, kinds))
    kind = schema.get("type", "object" if "$ref" in schema else "any")
    return kind if isinstance(kind, str) else "|".join(map(str, kind))


# ---------------------------------------------------------------------- deciding


def action_schema(tools: Iterable[AnyTool], *, string_chars: int) -> JsonSchema:
    """The schema of an action: one of the tools with its own arguments, or an answer.

    Strings that their schema does not bound have at most `string_chars` characters, and arguments nothing that their
    schema does not name, unless it allows for that: a small model would not come to an end.
    """
    given = {each.name: each.parameters for each in tools}
    answer = _object({"answer": {"type": "string", "maxLength": string_chars}})
    actions = [_object({"tool": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}}) for name in given]
    schema = {
        "anyOf": [*actions, answer],
        "$defs": {
            name: _moved({"additionalProperties": False, **parameters}, name, string_chars)
            for name, parameters in given.items()
        },
    }
    return JsonSchema(schema_text=json.dumps(schema, ensure_ascii=False))


def read_action(text: str, tools: Iterable[AnyTool]) -> Chosen | None:
    """The action that a text is; None where it is none, because it was cut or its backend knows no constraints."""
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    match found:
        case {"answer": str(answer), **rest} if not rest:
            return Chosen(answer=answer)
        case {"tool": str(name), "arguments": dict(arguments), **rest} if not rest:
            return Chosen(name, arguments) if any(each.name == name for each in tools) else None
    return None


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _moved(schema: Any, name: str, string_chars: int) -> Any:
    """A tool's schema as a part of the action's: its own references still lead into it, its strings are bounded."""
    if isinstance(schema, list):
        return [_moved(each, name, string_chars) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {
        key: value if key in _DATA else _moved(value, name, string_chars)
        for key, value in schema.items()
        if key not in ("$schema", "$id")
    }
    if isinstance(reference := moved.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
    if moved.get("type") == "string" and not moved.keys() & _BOUNDED:
        moved["maxLength"] = max(string_chars, moved.get("minLength", 0))
    return moved
