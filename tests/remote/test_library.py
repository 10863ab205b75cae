"""The shipped intrinsics, called through their own functions, give the same near and far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from midstream import intrinsics
from midstream.intrinsics import IntrinsicResult
from midstream.library import library_folder
from midstream.models.source import DEFAULT_MODEL
from midstream.remote import RemoteBackend
from midstream.session import Engine
from midstream.types import Chat, Document, Message
from tests.server.running import Running, running

pytestmark = pytest.mark.skipif(library_folder(DEFAULT_MODEL) is None, reason="library/ of the checkout is needed")

ASKED = Chat(
    messages=(Message(role="user", content="When was the Lizard lighthouse automated?"),),
    documents=(Document(title="Lighthouses", text="The Lizard lighthouse was automated in 1998."),),
)
ANSWERED = ASKED.model_copy(update={"messages": (*ASKED.messages, Message(role="assistant", content="In 1998."))})


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with Engine.load(DEFAULT_MODEL, dtype="float32") as engine:
        engine.load_library()
        with running(engine.aio) as server:
            yield server


async def test_each_shipped_function_gives_the_same(served: Running) -> None:
    near = served.service.engine
    async with RemoteBackend(served.url) as far:
        calls: list[tuple[Any, Chat, dict[str, str]]] = [
            (intrinsics.query_rewrite, ASKED, {}),
            (intrinsics.answerability, ASKED, {}),
            (intrinsics.jailbreak, ASKED, {}),
            (intrinsics.certainty, ANSWERED, {}),
            (intrinsics.hallucination, ANSWERED, {}),
            (intrinsics.requirement_check, ANSWERED, {"requirement": "Answer in one sentence."}),
        ]
        for function, chat, arguments in calls:
            expected, found = await function(near, chat, **arguments), await function(far, chat, **arguments)
            same_call(found.call, expected.call)
            assert found.call.intrinsic == function.__name__
            for field in fields(expected):
                if field.name != "call":
                    value = getattr(expected, field.name)
                    close = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
                    assert getattr(found, field.name) == close


def same_call(found: IntrinsicResult, expected: IntrinsicResult) -> None:
    assert (found.result, found.activation_index) == (expected.result, expected.activation_index)
    assert found.completion.token_ids == expected.completion.token_ids
    assert found.completion.prompt_token_ids == expected.completion.prompt_token_ids
    assert (found.probabilities is None) == (expected.probabilities is None)
    assert found.probabilities == (expected.probabilities and pytest.approx(expected.probabilities, abs=1e-5))
