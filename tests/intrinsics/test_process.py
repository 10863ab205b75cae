"""Whole replies, processed as granite-common 0.4.1 processes them, and where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from midstream.errors import InputError, OutputError
from midstream.intrinsics import Contract, process_reply
from tests.intrinsics.reference import config, ours, processed, reply_of, token

NEST = {"type": "nest", "input_path": [], "field_name": "n"}
SCORE = {"type": "likelihood", "input_path": [], "categories_to_values": {"yes": 1.0, "no": 0.0}}


def test_fields_of_a_reply_come_out_in_order() -> None:
    """Known ones first, logprobs gone, a null kept; what the format does not know of a choice is left out."""
    message = {"role": "assistant", "content": '"yes"', "tool_calls": [], "reasoning_content": None, "refusal": None}
    tokens = [token('"'), token("yes", -0.3, no=-1.2), token('"')]
    reply = {
        "id": "r",
        "created": 3,
        "prompt_logprobs": [None, {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}],
        "model": "m",
        "choices": [
            {
                "finish_reason": "stop",
                "logprobs": {"content": tokens},
                "message": message,
                "index": 0,
                "stop_reason": 2,
            },
            {"index": 1, "message": {"content": '"yes"', "role": "assistant"}, "logprobs": {"content": tokens}},
        ],
        "usage": {"completion_tokens": 1, "prompt_tokens": 2},
    }
    assert 0.6 < processed(config(transformations=[SCORE, NEST]), reply)["n"] < 0.8
    found = process_reply(Contract.model_validate(config(transformations=[SCORE])), reply)
    assert list(found) == ["choices", "prompt_logprobs", "id", "created", "model", "usage"]
    assert list(found["choices"][0]) == ["index", "message", "finish_reason"]
    kept = {**reply, "choices": [{"index": 0, "message": message, "logprobs": None}]}
    processed(config(transformations=[NEST]), kept)
    assert "logprobs" in process_reply(Contract.model_validate(config()), kept)["choices"][0]


@pytest.mark.parametrize("content", ['{"b":1,"a":[1.0,2e3]}', '"ä"', " [1 , 2]\n", "0.10"])
def test_content_is_written_anew(content: str) -> None:
    processed(config(), reply_of(content))


def test_the_reply_that_is_given_stays_as_it_is() -> None:
    reply = reply_of('"yes"', [token('"yes"')])
    before = json.dumps(reply)
    ours(config(transformations=[NEST]), reply)
    assert json.dumps(reply) == before


@pytest.mark.parametrize("on", [True, "gpt-oss", False, None])
def test_logprobs_workaround_reads_the_final_channel(on: Any) -> None:
    pieces = ["<|channel|>", "analysis", "<|message|>", "x", "<|end|>", "<|channel|>", "final", "<|message|>"]
    tokens = [*map(token, pieces), token('"'), token("no", -0.9, yes=-0.6), token('"'), token("<|return|>")]
    fields = config(transformations=[SCORE, NEST], logprobs_workaround=on)
    if on:
        for content in ("analysis x final", '"no"'):
            assert 0.5 < processed(fields, reply_of(content, tokens))["n"] < 0.6
        assert processed(fields, reply_of('"no"', tokens[8:]))["n"]  # no channels: the reply is taken as it is
    else:
        with pytest.raises(OutputError, match="choice 0 is not JSON"):
            ours(fields, reply_of("analysis x final", tokens))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({}, "reply: choices: Field required"),
        ({"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}, "choices.0.message.content"),
        (reply_of("1", [{"logprob": 1.0}]), "choices.0.logprobs.content.0.token"),
    ],
)
def test_what_is_no_reply_is_named(reply: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        process_reply(Contract(), reply)


@pytest.mark.parametrize("content", ["", "yes", '{"a": ', "[" * 100_000])
def test_content_that_is_no_json_is_refused(content: str) -> None:
    with pytest.raises(OutputError, match="is not JSON") as caught:
        process_reply(Contract(), reply_of(content))
    assert len(str(caught.value)) < 500
