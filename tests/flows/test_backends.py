"""The scripted backend keeps the protocol, and the failing one fails where it is told to."""

from __future__ import annotations

import pytest

from midstream.errors import ForwardFailed
from midstream.flows.answer import answer
from midstream.intrinsics import certainty, hallucination, requirement_check
from midstream.transcript import Transcript
from midstream.types import Chat, Message, SamplingParams
from tests.flows.backends import END, Failing, Scripted, text_of

CHAT = Chat(messages=(Message(role="user", content="hello"),))


async def test_a_script_answers_by_adapter_and_reuses_base_kv() -> None:
    backend = Scripted(
        {
            None: ["one", "two"],
            "hallucination": {"grounded": 0.75},
            "certainty": {9: 1.0},
            "requirement_check": lambda prompt, request: {"met": float("Be kind" in prompt)},
        }
    )
    start = await Transcript.of(backend, CHAT)
    first, completion = await answer(backend, start, SamplingParams())
    assert completion.text == "one"
    assert text_of(first.tokens) == f"user: hello{END}assistant: one{END}"
    found = await hallucination(backend, first)
    assert (found.grounded, found.probability) == (True, 0.75)
    assert found.call.usage.computed_tokens == len(END + "<hallucination>")
    assert (await certainty(backend, first)).certainty == 0.95
    assert (await requirement_check(backend, first, "Be kind")).met
    assert not (await requirement_check(backend, first, "Be brief")).met
    assert (await answer(backend, start, SamplingParams(max_tokens=2)))[1].choices[0].finish_reason == "length"
    assert backend.running == 0


async def test_a_failing_backend_fails_at_its_call() -> None:
    scripted = Scripted({None: "one"})
    whole = Failing(scripted, None)
    await answer(whole, await Transcript.of(whole, CHAT), SamplingParams())
    assert whole.calls.count("stream") == 1
    for at in range(len(whole.calls)):
        failing = Failing(scripted, at)
        with pytest.raises(ForwardFailed, match=f"call {at}"):
            await answer(failing, await Transcript.of(failing, CHAT), SamplingParams())
    told: list[str] = []
    late = Failing(scripted, whole.calls.index("stream"), deltas=2)
    with pytest.raises(ForwardFailed):
        await answer(late, await Transcript.of(late, CHAT), SamplingParams(), on_text=told.append)
    assert told == ["o", "n"]
    assert scripted.running == 0
