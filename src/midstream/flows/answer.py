"""A turn of the base model inside a flow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from midstream.backend import Backend
from midstream.errors import InputError
from midstream.flows.run import opened
from midstream.transcript import Transcript
from midstream.types import Chat, Completion, Delta, Message, Request, SamplingParams


async def transcript_of(backend: Backend, conversation: Chat | Transcript) -> Transcript:
    """The transcript of a conversation in either form."""
    return conversation if isinstance(conversation, Transcript) else await Transcript.of(backend, conversation)


async def answer(
    backend: Backend,
    transcript: Transcript,
    params: SamplingParams,
    *,
    on_text: Callable[[str], None] | None = None,
) -> tuple[Transcript, Completion]:
    """Let the base model answer: the conversation with its answer, and the completion. One answer, streamed."""
    if params.n != 1:
        raise InputError(f"a turn takes one answer, and n is {params.n}: best_of_n draws several")
    prompt = await transcript.prompt(backend)
    completion = await streamed(backend, Request(prompt=prompt, params=params), on_text)
    return await transcript.answered(backend, prompt, completion.choices[0]), completion


async def streamed(backend: Backend, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
    """Run a request as a stream, so that its text is told as it comes, and give back its completion."""

    def heard(delta: Delta) -> None:
        if delta.text and on_text is not None:
            on_text(delta.text)

    return await followed(backend, request, heard)


async def followed(backend: Backend, request: Request, on_delta: Callable[[Delta], None]) -> Completion:
    """Run a request as a stream, each piece of which is told as it comes, and give back its completion."""
    completion: Completion | None = None
    async with aclosing(opened(backend, request)) as deltas:
        async for delta in deltas:
            on_delta(delta)
            completion = delta.completion or completion
    assert completion is not None, "a stream ends with its completion"
    return completion


async def told(backend: Backend, transcript: Transcript, text: str) -> Transcript:
    """The conversation with an answer that no model wrote."""
    return await transcript.add(backend, Message(role="assistant", content=text))
