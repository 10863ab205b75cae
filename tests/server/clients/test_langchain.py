"""LangChain's ChatOpenAI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import pytest
from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.server.running import Running

# LangChain dumps the parsed events of OpenAI's client, whose types pydantic then finds too narrow.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning:pydantic.main")

Model = Callable[..., ChatOpenAI]
WHOLE = {"ignore_eos": True}


class Verdict(BaseModel):
    """Whether it is so."""

    label: Literal["yes", "no"]


@pytest.fixture(scope="module")
def model(live: Running) -> Iterator[Model]:
    with httpx.Client() as http:

        def make(**more: Any) -> ChatOpenAI:
            settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": WHOLE, **more}
            return ChatOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, http_client=http, **settings)

        yield make


# ---------------------------------------------------------------------- plain


def test_an_invocation(model: Model) -> None:
    first, again = (model().invoke("good morning to you") for _ in range(2))
    assert isinstance(first, AIMessage)
    assert again.content == first.content
    assert first.response_metadata["finish_reason"] == "length"
    assert first.response_metadata["model_name"] == "tiny"
    usage = again.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 8
    assert usage["input_token_details"]["cache_read"] == usage["input_tokens"] - 1


def test_a_conversation_with_its_own_answers(model: Model) -> None:
    chat = model()
    messages: list[Any] = [SystemMessage("be brief"), HumanMessage([{"type": "text", "text": "hello"}])]
    answer = chat.invoke(messages)
    found = chat.invoke([*messages, answer, HumanMessage("and again", name="me")])
    assert found.usage_metadata is not None
    assert found.usage_metadata["input_token_details"]["cache_read"] > 0


def test_a_stream_with_usage(model: Model) -> None:
    chat = model(stream_usage=True)
    whole = chat.invoke("good morning to you")
    pieces = list(chat.stream("good morning to you"))
    together = sum(pieces[1:], pieces[0])
    assert isinstance(together, AIMessageChunk)
    assert len(pieces) > 2
    assert together.content == whole.content
    assert whole.usage_metadata is not None
    assert together.usage_metadata is not None
    assert together.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert together.response_metadata["finish_reason"] == "length"


def test_a_batch_and_a_chain(model: Model) -> None:
    chat = model()
    texts = ["one", "two", "three"]
    assert [found.content for found in chat.batch(texts)] == [chat.invoke(text).content for text in texts]
    chain = ChatPromptTemplate([("system", "be brief"), ("user", "{question}")]) | chat
    assert chain.invoke({"question": "one"}).content


def test_how_tokens_are_chosen(model: Model) -> None:
    chat = model(temperature=1.0, seed=7, n=2, logprobs=True, top_logprobs=2, frequency_penalty=0, presence_penalty=0)
    one, other = (chat.generate([[HumanMessage("hello")]]).generations[0] for _ in range(2))
    assert len(one) == 2
    assert [found.text for found in one] == [found.text for found in other]
    assert len(one[0].message.response_metadata["logprobs"]["content"]) == 8  # type: ignore[attr-defined]
    text = str(model().invoke("good morning to you").content)
    assert model(stop=[text[2:4]]).invoke("good morning to you").content == text[: text.index(text[2:4])]


# ---------------------------------------------------------------------- structured answers


@pytest.mark.parametrize("schema", [Verdict, Verdict.model_json_schema()], ids=["model", "schema"])
def test_a_structured_answer(model: Model, schema: Any) -> None:
    chat = model(max_tokens=40, extra_body=None)
    found = chat.with_structured_output(schema, method="json_schema", strict=True).invoke("Is it so?")
    assert Verdict.model_validate(found).label in ("yes", "no")


def test_a_structured_answer_with_the_raw_one_and_streamed(model: Model) -> None:
    chat = model(max_tokens=40, extra_body=None)
    raw = chat.with_structured_output(Verdict, include_raw=True).invoke("Is it so?")
    assert isinstance(raw, dict)
    assert raw["parsing_error"] is None
    *_, last = chat.with_structured_output(Verdict).stream("Is it so?")
    assert last == raw["parsed"]


def test_tools_are_refused_where_the_model_has_none(model: Model) -> None:
    chat = model().with_structured_output(Verdict, method="function_calling")
    with pytest.raises(Exception, match="tool_choice"):
        chat.invoke("Is it so?")


# ---------------------------------------------------------------------- adapters, documents


def test_an_adapter_by_model_and_by_template_argument(model: Model) -> None:
    named = model(model="jailbreak", max_tokens=40, extra_body=None).invoke("good morning to you")
    switched = model(max_tokens=40, extra_body={"chat_template_kwargs": {"adapter_name": "jailbreak"}})
    found = switched.invoke("good morning to you")
    assert named.content == found.content
    assert named.content in ('"yes"', '"no"')
    assert found.response_metadata["model_name"] == "jailbreak"


def test_documents(model: Model) -> None:
    documents = [{"doc_id": "1", "text": "The lamp can be seen from 26 miles away."}]
    plain = model().invoke("good morning to you").usage_metadata
    found = model(extra_body={"documents": documents}).invoke("good morning to you").usage_metadata
    assert plain is not None
    assert found is not None
    assert found["input_tokens"] > plain["input_tokens"] + 26


def test_errors(model: Model) -> None:
    with pytest.raises(ModelNotFoundError, match="nobody"):
        model(model="nobody").invoke("hello")
    with pytest.raises(ContextOverflowError):
        model().invoke("hello " * 2000)


# ---------------------------------------------------------------------- asynchronous


async def test_asynchronous_calls(model: Model) -> None:
    async with httpx.AsyncClient() as http:
        chat = model(http_async_client=http, stream_usage=True)
        whole = await chat.ainvoke("good morning to you")
        pieces = [piece async for piece in chat.astream("good morning to you")]
        assert "".join(str(piece.content) for piece in pieces) == whole.content
        assert any(piece.usage_metadata for piece in pieces)
        found = await chat.abatch(["one", "two"])
        assert [one.content for one in found] == [(await chat.ainvoke(text)).content for text in ("one", "two")]
        verdict = await model(http_async_client=http, max_tokens=40).with_structured_output(Verdict).ainvoke("Is it?")
        assert isinstance(verdict, Verdict)
