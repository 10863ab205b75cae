"""A conversation over any backend: its messages, with the very tokens that were computed for them.

A generated answer is kept as its tokens and never tokenized again, so what the base model has computed stays reusable
whatever the chat template does to its text. Transcripts are values: to branch, go on twice from the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from midstream.backend import Backend
from midstream.documents import settled
from midstream.errors import InputError
from midstream.types import Chat, CompletionChoice, Message

_PROBES = ("a", "b")


@dataclass(frozen=True, slots=True)
class Transcript:
    """`tokens` are those of `messages`, each turn closed; `ends[i]` is where those of `messages[i]` end."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    # The template's own rendering of `messages`, where it is known.
    _rendered: tuple[int, ...] | None = field(default=(), repr=False, compare=False)
    _close: tuple[int, ...] | None = field(default=None, repr=False, compare=False)

    @classmethod
    async def of(cls, backend: Backend, chat: Chat) -> Transcript:
        """The transcript of a chat. Its documents go to its last user turn, whatever place the template has for them.

        Raises InputError where the template refuses the messages, or rewrites earlier turns when one is added.
        """
        if chat.appended or chat.tools or chat.template_arguments:
            raise InputError("a transcript is made of messages and documents alone")
        return await cls().add(backend, *settled(chat))

    @property
    def chat(self) -> Chat:
        """The messages as a chat. Raises InputError when there are none."""
        if not self.messages:
            raise InputError("the conversation is empty: there is nothing to judge")
        return Chat(messages=self.messages)

    async def add(self, backend: Backend, *messages: Message) -> Transcript:
        """With turns added: what the template adds for each; what is held stays as it is."""
        transcript = self
        for message in messages:
            transcript = await transcript._with(backend, message)
        return transcript

    async def prompt(self, backend: Backend) -> tuple[int, ...]:
        """The tokens that ask the base model for its answer. Raises InputError when no turn waits for one."""
        if not self.messages or self.messages[-1].role == "assistant":
            raise InputError("there is no user turn to answer: add one")
        history = await self._history(backend)
        prompt = await backend.tokenize(self.chat)
        if prompt[: len(history)] != history:
            raise InputError("the chat template changes the history when it asks for an answer")
        return (*self.tokens, *prompt[len(history) :])

    async def answered(self, backend: Backend, prompt: tuple[int, ...], answer: CompletionChoice) -> Transcript:
        """With the base model's answer to `prompt` added, as its tokens.

        What ended it (an end-of-sequence token, whichever it was, or a stop string) gives way to the template's own
        closing. Where the answer is not tokenized as its text would be, a stop string or another end stays.
        """
        close = await closing(backend) if self._close is None else self._close
        tokens = await _spoken(backend, answer)
        left = close[1:] if tokens and close and tokens[-1] == close[0] else close
        turn = Message(role="assistant", content=answer.text)
        return replace(self._extended(turn, (*prompt, *tokens, *left), None), _close=close)

    async def instructed(self, backend: Backend, chat: Chat) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens with the `appended` turns of `chat`, whose messages are this transcript's: with and without the
        header of an answer."""
        history = await self._history(backend)
        with_header, without = await backend.tokenize(chat), await backend.tokenize(chat, header=False)
        for rendered in (with_header, without):
            if rendered[: len(history)] != history:
                raise InputError("the chat template rewrites earlier turns when an instruction is added")
        return (*self.tokens, *with_header[len(history) :]), (*self.tokens, *without[len(history) :])

    def until(self, role: str) -> Transcript:
        """Up to the last turn of a role. Raises InputError when there is none."""
        last = max((i for i, message in enumerate(self.messages) if message.role == role), default=None)
        if last is None:
            raise InputError(f"the conversation has no {role} turn")
        if last == len(self.messages) - 1:
            return self
        ends = self.ends[: last + 1]
        return Transcript(self.messages[: last + 1], self.tokens[: ends[-1]], ends, None, self._close)

    async def _history(self, backend: Backend) -> tuple[int, ...]:
        return await backend.tokenize(self.chat, header=False) if self._rendered is None else self._rendered

    async def _with(self, backend: Backend, message: Message) -> Transcript:
        before = await self._history(backend)
        after = await self._rendering(backend, message)
        if after[: len(before)] != before:
            raise InputError("the chat template rewrites earlier turns when one is added, so they cannot be kept")
        return self._extended(message, (*self.tokens, *after[len(before) :]), after)

    async def _rendering(self, backend: Backend, message: Message) -> tuple[int, ...]:
        messages = (*self.messages, message)
        try:
            return await backend.tokenize(Chat(messages=messages), header=False)
        except InputError:
            if any(message.role != "system" for message in messages):
                raise
            # Some templates want a user turn beside it: then the two are rendered together.
            return ()

    def _extended(self, message: Message, tokens: tuple[int, ...], rendered: tuple[int, ...] | None) -> Transcript:
        messages, ends = (*self.messages, message), (*self.ends, len(tokens))
        return replace(self, messages=messages, tokens=tokens, ends=ends, _rendered=rendered)


async def _spoken(backend: Backend, answer: CompletionChoice) -> tuple[int, ...]:
    """The answer's tokens without those behind its text, where the tokens of the text show which these are."""
    if answer.finish_reason != "stop":
        return answer.token_ids
    text = await backend.tokenize(answer.text) if answer.text else ()
    return text if answer.token_ids[: len(text)] == text else answer.token_ids


async def closing(backend: Backend) -> tuple[int, ...]:
    """What the template puts after an answer: how two chats end that differ in the answer alone."""
    question = Message(role="user", content="a")
    one, other = [
        await backend.tokenize(Chat(messages=(question, Message(role="assistant", content=text))), header=False)
        for text in _PROBES
    ]
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
