"""OpenAI's own client, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.helpers import tiny_llama
from tests.server.running import Running, running
from tests.tiny import tiny_engine

CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "good morning to you"}]
EIGHT: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 8, "temperature": 0}
# A random model seldom ends by itself; these answers are to have all their tokens.
WHOLE: dict[str, Any] = {**EIGHT, "extra_body": {"ignore_eos": True}}
# The client's own stream helper takes an answer that is cut off for an error, so these end.
WORD: dict[str, Any] = {**EIGHT, "extra_body": {"structured_outputs": {"regex": "(é|a)[a-z]{2}"}}}


class Verdict(BaseModel):
    """What a structured answer is read into."""

    label: Literal["yes", "no"]
    score: Annotated[int, Field(ge=0, le=9)]


def text_of(completion: ChatCompletion) -> str:
    text = completion.choices[0].message.content
    assert text is not None
    return text


# ---------------------------------------------------------------------- chat


def test_a_chat(client: OpenAI) -> None:
    found = client.chat.completions.create(**WHOLE)
    assert found.model == "tiny"
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.refusal is None
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8


def test_cached_tokens(client: OpenAI) -> None:
    chat: dict[str, Any] = {**WHOLE, "messages": [{"role": "user", "content": "something new to read"}]}
    first, second = (client.chat.completions.create(**chat).usage for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1
    assert (first.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens - 1


def test_what_the_client_returns_can_be_sent_back(client: OpenAI) -> None:
    answer = client.chat.completions.create(**WHOLE).choices[0].message
    messages: list[Any] = [*CHAT, answer, answer.model_dump(), {"role": "user", "content": "and then?"}]
    assert client.chat.completions.create(**{**WHOLE, "messages": messages}).choices


def test_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**WHOLE)
    stream = client.chat.completions.create(**WHOLE, stream=True, stream_options={"include_usage": True})
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text_of(whole)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens - 1


def test_the_stream_helper_puts_the_same_completion_together(client: OpenAI) -> None:
    asked: dict[str, Any] = {**WORD, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    kinds = set()
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    assert text_of(final) == text_of(whole)
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    ours, theirs = final.choices[0].logprobs, whole.choices[0].logprobs
    assert ours is not None
    assert theirs is not None
    assert [one.token for one in ours.content or []] == [one.token for one in theirs.content or []]


@pytest.mark.parametrize("seed", range(4))
def test_the_stream_helper_with_several_answers(client: OpenAI, seed: int) -> None:
    """It takes choices by their place, so each must begin in order, whichever has its first character first."""
    asked: dict[str, Any] = {**WORD, "n": 4, "temperature": 10.0, "seed": seed}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert [choice.index for choice in final.choices] == [0, 1, 2, 3]
    assert [choice.message.content for choice in final.choices] == [c.message.content for c in whole.choices]


def test_leaving_a_stream_early(client: OpenAI, live: Running) -> None:
    with client.chat.completions.create(**{**WHOLE, "max_completion_tokens": 1900}, stream=True) as stream:
        next(iter(stream))
    for _ in range(100):
        if not asyncio.run(live.service.engine.stats()).running:
            return
        client.models.list()
    raise AssertionError("a stream that was left still runs")


# ---------------------------------------------------------------------- how tokens are chosen


def test_several_answers_with_a_seed(client: OpenAI) -> None:
    asked: dict[str, Any] = {**WHOLE, "n": 3, "temperature": 1.0, "seed": 5}
    one, other = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in other.choices]


def test_stop(client: OpenAI) -> None:
    text = text_of(client.chat.completions.create(**WHOLE))
    found = client.chat.completions.create(**WHOLE, stop=[text[3:5]])
    assert found.choices[0].finish_reason == "stop"
    assert text_of(found) == text[: text.index(text[3:5])]


def test_logprobs(client: OpenAI) -> None:
    found = client.chat.completions.create(**WHOLE, logprobs=True, top_logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    for entry in logprobs.content:
        assert entry.token == entry.top_logprobs[0].token, "greedy"
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 3


# ---------------------------------------------------------------------- structured answers


def test_parse_into_a_model(client: OpenAI) -> None:
    found = client.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Verdict, max_completion_tokens=60, temperature=0
    )
    verdict = found.choices[0].message.parsed
    assert isinstance(verdict, Verdict)
    assert json.loads(found.choices[0].message.content or "") == verdict.model_dump()


def test_a_json_schema(client: OpenAI) -> None:
    properties = {"a": {"enum": ["x", "y"]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    found = client.chat.completions.create(
        **{**EIGHT, "max_completion_tokens": 40},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )
    assert json.loads(text_of(found)) in ({"a": "x"}, {"a": "y"})


def test_a_streamed_model(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=CHAT, response_format=Verdict, max_completion_tokens=60, temperature=0
    ) as stream:
        done = [event for event in stream if event.type == "content.done"]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Verdict)
    assert done[0].parsed == final.choices[0].message.parsed


def test_an_answer_that_is_cut_off_is_no_model(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Verdict, max_completion_tokens=3)


# ---------------------------------------------------------------------- the older endpoint


def test_text_completions(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "once", "max_tokens": 5, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**asked, logprobs=2)
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == 5
    assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == choice.text
    several = client.completions.create(**{**asked, "prompt": ["once", "twice"]}, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == choice.text


# ---------------------------------------------------------------------- adapters, documents


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {"tiny", "jailbreak", "twin"} <= models.keys()
    assert client.models.retrieve("jailbreak").id == "jailbreak"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_adapter_by_model_and_by_template_argument(client: OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ['"yes"', '"no"']}}
    named = client.chat.completions.create(**{**EIGHT, "model": "jailbreak"}, extra_body=extra)
    switched = client.chat.completions.create(
        **EIGHT, extra_body={**extra, "chat_template_kwargs": {"adapter_name": "jailbreak"}}
    )
    assert named.model == switched.model == "jailbreak"
    assert text_of(named) == text_of(switched)
    assert text_of(named) in ('"yes"', '"no"')


def test_a_plain_lora(client: OpenAI) -> None:
    base = client.chat.completions.create(**WHOLE)
    found = client.chat.completions.create(**{**WHOLE, "model": "twin"})
    assert found.model == "twin"
    assert text_of(found) != text_of(base)


def test_documents(client: OpenAI) -> None:
    documents = [{"doc_id": "1", "title": "Lights", "text": "The lamp can be seen from 26 miles away."}]
    plain = client.chat.completions.create(**WHOLE)
    found = client.chat.completions.create(**{**EIGHT, "extra_body": {"documents": documents, "ignore_eos": True}})
    assert found.usage is not None
    assert plain.usage is not None
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens + 26


# ---------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server with a key, for which one request may be open at a time."""
    engine = tiny_engine(tiny_llama())
    with running(engine, api_keys=["secret"], max_streams_per_key=1) as server:
        yield server


def test_errors_have_the_clients_own_types(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**EIGHT, "model": "nobody"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(**{**EIGHT, "temperature": 99})
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**{**EIGHT, "max_completion_tokens": 10**6})
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="surprise"):
        client.chat.completions.create(**EIGHT, extra_body={"surprise": 1})
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        client.chat.completions.create(**EIGHT, response_format={"type": "json_object"}, extra_body={"guided_json": {}})
    assert missing.value.request_id


def test_a_wrong_key(guarded: Running) -> None:
    with (
        OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_too_many_requests(guarded: Running) -> None:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0) as client:
        with client.chat.completions.create(**{**WHOLE, "max_completion_tokens": 1900}, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                client.models.list()
        assert refused.value.code == "too_many_streams"
        assert refused.value.type == "rate_limit_error"
        assert client.with_options(max_retries=5).models.list().data, "the client waits as long as it is told to"


def test_an_error_within_a_stream() -> None:
    with running(tiny_engine(tiny_llama()), request_timeout_s=0.3) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**{**WHOLE, "max_completion_tokens": 1900}, stream=True)
            with pytest.raises(openai.APIError) as failed:
                list(stream)
        assert failed.value.code == "deadline_exceeded"


# ---------------------------------------------------------------------- asynchronous


async def test_several_at_once(aclient: AsyncOpenAI, client: OpenAI) -> None:
    chats = [{**WHOLE, "messages": [{"role": "user", "content": f"number {n}"}]} for n in range(4)]
    found = await asyncio.gather(*(aclient.chat.completions.create(**chat) for chat in chats))
    for chat, completion in zip(chats, found, strict=True):
        assert text_of(completion) == text_of(client.chat.completions.create(**chat))


async def test_asynchronous_streams(aclient: AsyncOpenAI, client: OpenAI) -> None:
    text = text_of(client.chat.completions.create(**WHOLE))
    stream = await aclient.chat.completions.create(**WHOLE, stream=True)
    assert "".join([piece.choices[0].delta.content or "" async for piece in stream]) == text
    async with aclient.chat.completions.stream(**WORD, stream_options={"include_usage": True}) as events:
        final = await events.get_final_completion()
    assert text_of(final) == text_of(client.chat.completions.create(**WORD))
    assert final.usage is not None


async def test_asynchronous_models_and_errors(aclient: AsyncOpenAI) -> None:
    found = await aclient.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Verdict, max_completion_tokens=60, temperature=0
    )
    assert isinstance(found.choices[0].message.parsed, Verdict)
    assert "tiny" in [model.id async for model in aclient.models.list()]
    with pytest.raises(openai.NotFoundError):
        await aclient.chat.completions.create(**{**EIGHT, "model": "nobody"})
