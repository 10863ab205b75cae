"""Mellea's OpenAI backend: chats, and adapters that its chat template argument switches on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from mellea import MelleaSession
from mellea.backends import ModelOption
from mellea.backends.openai import OpenAIBackend
from mellea.core import CBlock, Requirement
from mellea.stdlib import functional
from mellea.stdlib.components import Document, Intrinsic, Message
from mellea.stdlib.components.intrinsic import core, rag
from mellea.stdlib.context import ChatContext
from mellea.stdlib.requirements import ALoraRequirement
from pydantic import BaseModel

from midstream.models.source import DEFAULT_MODEL
from tests.server.running import Running

QUESTION = "When was the Lizard lighthouse completed?"
PASSAGE = "The Lizard lighthouse was completed in 1752. Its lamp can be seen from 26 miles away."
ANSWER = "It was completed in 1752."
BRIEF = {ModelOption.MAX_NEW_TOKENS: 8, ModelOption.TEMPERATURE: 0.0}


class Verdict(BaseModel):
    """Its JSON schema does not say that there is nothing else; Mellea sends it as a strict one."""

    label: Literal["yes", "no"]


class Colour(BaseModel, extra="forbid"):
    hue: Literal["red"]


@pytest.fixture(scope="module")
def backend(live: Running) -> Iterator[OpenAIBackend]:
    backend = OpenAIBackend("tiny", base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def switched(trained: Running, switch: Path) -> Iterator[OpenAIBackend]:
    """A backend that knows the adapters in the folder."""
    backend = OpenAIBackend(
        DEFAULT_MODEL,
        base_url=f"{trained.url}/v1",
        api_key="none",
        load_embedded_adapters=True,
        adapter_source=str(switch),
        max_retries=0,
    )
    yield backend
    backend.close()


def judged(*, question: str = QUESTION, answer: str | None = ANSWER) -> ChatContext:
    context = ChatContext().add(Message("user", question))
    return context if answer is None else context.add(Message("assistant", answer))


def called(trained: Running, name: str, context: list[dict[str, str]], **body: Any) -> Any:
    """What the server itself finds."""
    response = trained.client.post(f"/v1/intrinsics/{name}", json={"messages": context, **body})
    assert response.status_code == 200, response.text
    return response.json()["result"]


TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

# ---------------------------------------------------------------------- the base model


def test_a_chat_of_two_turns(backend: OpenAIBackend) -> None:
    session = MelleaSession(backend, ChatContext())
    assert session.chat("good morning to you", model_options=BRIEF).role == "assistant"
    session.chat("and again", documents=[Document(PASSAGE, doc_id="1")], model_options=BRIEF)
    assert len(session.ctx.as_list()) == 4


def test_an_instruction(backend: OpenAIBackend) -> None:
    session = MelleaSession(backend)
    found = session.instruct("Name a colour.", strategy=None, model_options=BRIEF)
    assert found.generation.model == "tiny"
    assert found.generation.usage is not None
    assert found.generation.usage["completion_tokens"] <= 8


def test_a_streamed_instruction_says_the_same(backend: OpenAIBackend) -> None:
    session = MelleaSession(backend)
    whole = session.instruct("Name a colour.", strategy=None, model_options=BRIEF)
    streamed = session.instruct(
        "Name a colour.", strategy=None, model_options={**BRIEF, ModelOption.STREAM: True, ModelOption.SEED: 1}
    )
    assert str(streamed) == str(whole)
    assert streamed.generation.usage is not None
    assert streamed.generation.usage["completion_tokens"] == whole.generation.usage["completion_tokens"]


def test_thinking_can_be_switched_off_but_not_on(backend: OpenAIBackend) -> None:
    session = MelleaSession(backend)
    plain = session.instruct("Name a colour.", strategy=None, model_options=BRIEF)
    found = session.instruct("Name a colour.", strategy=None, model_options={**BRIEF, ModelOption.THINKING: False})
    assert str(found) == str(plain)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        session.instruct("Name a colour.", strategy=None, model_options={**BRIEF, ModelOption.THINKING: True})


def test_a_structured_answer(backend: OpenAIBackend) -> None:
    found = MelleaSession(backend).instruct(
        "Is it blue?", strategy=None, format=Verdict, model_options={ModelOption.MAX_NEW_TOKENS: 40}
    )
    assert Verdict.model_validate_json(str(found)).label in ("yes", "no")


async def test_texts_without_a_chat(live: Running) -> None:
    backend = OpenAIBackend("tiny", base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    found = await backend.generate_from_raw(
        [CBlock("once"), CBlock("twice")], ChatContext(), format=Colour, model_options={"max_tokens": 40}
    )
    await backend.aclose()
    assert [Colour.model_validate_json(str(one)).hue for one in found] == ["red", "red"]


# ---------------------------------------------------------------------- adapters


def test_the_folder_is_read(switched: OpenAIBackend) -> None:
    assert {"answerability_alora", "requirement-check_alora"} <= set(switched.list_adapters())


@pytest.mark.parametrize(("question", "expected"), [(QUESTION, "answerable"), ("Who won in 1990?", "unanswerable")])
def test_answerability(switched: OpenAIBackend, trained: Running, question: str, expected: str) -> None:
    found = rag.check_answerability(question, [PASSAGE], ChatContext(), switched)
    assert found == expected
    own = called(trained, "answerability", [{"role": "user", "content": question}], documents=[{"text": PASSAGE}])
    assert own == {"answerability": expected}


def test_an_intrinsic_as_an_action(switched: OpenAIBackend) -> None:
    context = ChatContext().add(Message("user", QUESTION, documents=[Document(PASSAGE)]))
    found, _ = functional.act(Intrinsic("answerability"), context, switched, strategy=None)
    assert str(found) == '{"answerability": "answerable"}'
    assert found.generation.usage is not None
    assert found.generation.usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("requirement", ["Answer in one sentence.", "Answer in French, with at least ninety words."])
def test_a_requirement_check(switched: OpenAIBackend, trained: Running, requirement: str) -> None:
    score = core.requirement_check(judged(), switched, requirement)
    own = called(trained, "requirement-check", TALK, arguments={"requirement": requirement})
    assert score == pytest.approx(own["requirement_check"]["score"], abs=1e-4)
    assert 0 < score < 1


def test_certainty(switched: OpenAIBackend, trained: Running) -> None:
    found = core.check_certainty(judged(), switched)
    assert found == pytest.approx(called(trained, "uncertainty", TALK)["certainty"], abs=1e-4)


def test_a_rewritten_question(switched: OpenAIBackend, trained: Running) -> None:
    follow_up = "How far can it be seen?"
    found = rag.rewrite_question(follow_up, judged(), switched)
    own = called(trained, "query_rewrite", [*TALK, {"role": "user", "content": follow_up}])
    assert own == {"rewritten_question": found}


# ---------------------------------------------------------------------- requirements


def test_a_requirement_is_validated_by_the_adapter(switched: OpenAIBackend, trained: Running) -> None:
    session = MelleaSession(switched, ChatContext())
    answer = session.chat("Name a colour.", model_options=BRIEF)
    requirement = "The answer is a single word."
    (found,) = session.validate([ALoraRequirement(requirement)])
    talk = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": answer.content}]
    own = called(trained, "requirement-check", talk, arguments={"requirement": requirement})
    assert found.error is None
    assert bool(found) == (own["requirement_check"]["score"] > 0.5)


def test_a_plain_requirement_goes_to_the_adapter_too(switched: OpenAIBackend) -> None:
    session = MelleaSession(switched, ChatContext())
    found = session.instruct(
        "Name a colour.", requirements=[Requirement("One word.")], model_options=BRIEF, return_sampling_results=True
    )
    assert 1 <= len(found.sample_validations) <= 2
    for validations in found.sample_validations:
        for _, result in validations:
            assert '"score"' in str(result.reason), "the adapter's answer, not a judging model's"
