"""The same contract carried out by granite-common and by midstream; both sides as JSON text, order of keys included."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any

from granite_common.base.types import ChatCompletion
from granite_common.intrinsics import IntrinsicsResultProcessor, IntrinsicsRewriter

from midstream.errors import MidstreamError
from midstream.intrinsics import Contract, process_reply, rewrite_body

Config = dict[str, Any]


def config(**fields: Any) -> Config:
    """A contract as io.yaml has it, read."""
    return {"model": "base", "response_format": None, "transformations": None, **fields}


def rewritten(
    fields: Config, body: Mapping[str, Any], arguments: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """A body rewritten by both, after a check that they agree."""
    theirs = IntrinsicsRewriter(config_dict=copy.deepcopy(fields), **options).transform(
        copy.deepcopy(body), **(arguments or {})
    )
    before = copy.deepcopy(body)
    ours = rewrite_body(Contract.model_validate(fields), body, arguments, **options)
    assert json.dumps(ours) == json.dumps(theirs.model_dump())
    assert body == before, "the body that was given stays as it is"
    return ours


def processed(fields: Config, reply: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> Any:
    """The first content of a reply processed by both, after a check that they agree."""
    ours = process_reply(Contract.model_validate(fields), reply, request)
    assert json.dumps(ours) == json.dumps(processed_by_reference(fields, reply, request))
    return json.loads(ours["choices"][0]["message"]["content"])


def processed_by_reference(fields: Config, reply: Any, request: Any = None) -> Any:
    body = None if request is None else ChatCompletion.model_validate(copy.deepcopy(request))
    processor = IntrinsicsResultProcessor(config_dict=copy.deepcopy(fields))
    return processor.transform(copy.deepcopy(reply), body).model_dump()


def both_refuse(fields: Config, reply: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> str:
    """Whether both sides raise; the message of ours."""
    try:
        processed_by_reference(fields, reply, request)
    except Exception:
        # The reference raises what Python raises: KeyError, TypeError, ValueError, AttributeError.
        try:
            process_reply(Contract.model_validate(fields), reply, request)
        except MidstreamError as error:
            return str(error)
        raise AssertionError("only the reference refuses this") from None
    raise AssertionError("the reference carries this out")


def ours(fields: Config, reply: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> Any:
    """The first content as midstream alone processes it."""
    found = process_reply(Contract.model_validate(fields), reply, request)
    return json.loads(found["choices"][0]["message"]["content"])


def reply_of(content: str, tokens: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A chat completion with one answer."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    if tokens is not None:
        choice["logprobs"] = {"content": list(tokens)}
    return {"id": "r1", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 3}}


def token(text: str, logprob: float = -0.1, **others: float) -> dict[str, Any]:
    """A token with the likeliest ones at its place, itself among them."""
    top = [{"token": text, "logprob": logprob}, *({"token": t, "logprob": value} for t, value in others.items())]
    return {"token": text, "logprob": logprob, "top_logprobs": top}


def random_tokens(text: str, starts: Sequence[int], names: Sequence[str], random: Random) -> list[dict[str, Any]]:
    """A text cut into tokens, at `starts` and elsewhere; the alternatives are beginnings of `names` and others."""
    cuts = {0, len(text), *starts, *(random.randrange(len(text)) for _ in range(len(text) // 3))}
    ends = sorted(cuts)
    found = []
    for begin, end in pairwise(ends):
        top = {text[begin:end]: -random.random()} if random.random() < 0.7 else {}
        for name in random.sample(list(names), len(names)):
            top.setdefault(name[: random.randint(1, len(name))], -3 * random.random())
        top.setdefault("zz", -1.5)
        pairs = [{"token": t, "logprob": value} for t, value in top.items()]
        found.append({"token": text[begin:end], "logprob": -random.random(), "top_logprobs": pairs[:10]})
    return found
