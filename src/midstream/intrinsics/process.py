"""From the reply of a chat completion to one whose content is the intrinsic's result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from midstream.errors import OutputError
from midstream.intrinsics.rewrite import tagged_of
from midstream.intrinsics.sentences import Tagged
from midstream.intrinsics.spec import Contract
from midstream.intrinsics.transform import read_answer, short, transform
from midstream.intrinsics.wire import ChatReply, WireChoice, read


def process_reply(
    contract: Contract, reply: Mapping[str, Any], request: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A reply with each choice's content transformed and its logprobs, whose tokens are no longer there, left out.

    `request` is the rewritten body that was answered; sentences are decoded from it. The content is not held against
    the response format. Raises OutputError where a content cannot be transformed, InputError where the reply is none.
    """
    answered = read(ChatReply, reply, "reply")
    tagged = tagged_of(contract, request) if request is not None and contract.decodes_sentences else None
    contents = [_content(contract, choice, tagged) for choice in answered.choices]
    processed = answered.model_dump(exclude_unset=True)
    for choice, content in zip(processed["choices"], contents, strict=True):
        choice["message"]["content"] = content
        if choice.get("logprobs") is not None:
            del choice["logprobs"]
    return processed


def _content(contract: Contract, choice: WireChoice, tagged: Tagged | None) -> str:
    found = None if choice.logprobs is None else choice.logprobs.content
    tokens = None if found is None else [token.value() for token in found]
    answer = read_answer(contract, choice.message.content, tokens, tagged)
    try:
        value = json.loads(answer.text)
    except (ValueError, RecursionError) as error:
        raise OutputError(f"choice {choice.index} is not JSON: {error}; it is {short(answer.text)}") from error
    return json.dumps(transform(value, contract, answer))
