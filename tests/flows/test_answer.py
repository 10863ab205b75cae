"""A turn of the base model inside a flow."""

from __future__ import annotations

import pytest

from midstream.errors import Cancelled, InputError
from midstream.flows.answer import answer, told, transcript_of
from midstream.flows.run import Run
from midstream.transcript import Transcript
from midstream.types import Chat, Message, SamplingParams
from tests.flows.backends import Scripted

CHAT = Chat(messages=(Message(role="user", content="hello"),))


async def test_a_turn_takes_one_answer() -> None:
    backend = Scripted({None: "ab"})
    start = await transcript_of(backend, CHAT)
    assert await transcript_of(backend, start) is start
    with pytest.raises(InputError, match="best_of_n"):
        await answer(backend, start, SamplingParams(n=2))
    pieces: list[str] = []
    answered, completion = await answer(backend, start, SamplingParams(), on_text=pieces.append)
    assert pieces == ["a", "b"]
    assert completion.text == "ab"
    assert (
        answered
        == await told(backend, start, "ab")
        == await Transcript.of(backend, Chat(messages=(*CHAT.messages, Message(role="assistant", content="ab"))))
    )


async def test_what_a_reader_of_the_text_raises_ends_the_request() -> None:
    backend, run = Scripted({None: "ab"}), Run()
    transcript = await transcript_of(backend, CHAT)

    def fails(text: str) -> None:
        raise KeyError(text)

    async def body() -> None:
        with pytest.raises(KeyError):
            await answer(run.backend(backend, "answer"), transcript, SamplingParams(), on_text=fails)
        assert backend.running == 0

    await run.execute(body)
    assert [type(call.outcome) for call in run.calls] == [Cancelled]
