"""From replies to completions: texts of logprobs, probabilities, and where the adapter's part begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream.errors import BackendError
from midstream.remote import logprobs
from midstream.remote.options import Parting, shares
from midstream.remote.reply import ChoiceReply, LogprobsReply, Reply
from midstream.remote.tokens import TokenSource
from midstream.types import Choice, Completion, CompletionChoice, Delta, Request, TokenLogprob


@dataclass(slots=True)
class Asked:
    """A request as it is sent in `body`. `info` is the adapter's where it was looked up; `activation_index` is the
    server's to say where it is None. `parting`: where probabilities are to be found from logprobs. `session`: the
    conversation, for a router."""

    request: Request
    prompt: tuple[int, ...]
    model: str
    body: dict[str, Any]
    activation_index: int | None = None
    parting: Parting | None = None
    session: str = ""
    started: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None

    def mark_first_token(self) -> None:
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started


class AnswerReader:
    """Reads what one server answers."""

    def __init__(self, tokens: TokenSource, url: str) -> None:
        self._tokens = tokens
        self._url = url

    async def completion(self, asked: Asked, reply: Reply) -> Completion:
        """A whole answer. Raises BackendError where the server left something out."""
        if sorted(choice.index for choice in reply.choices) != list(range(asked.request.params.n)):
            raise BackendError(
                f"{self._url} gave {len(reply.choices)} answers where {asked.request.params.n} were asked for"
            )
        activation = next((c.activation_index for c in reply.choices if c.activation_index is not None), None)
        activation = asked.activation_index if activation is None else activation
        seconds = time.perf_counter() - asked.started if reply.seconds is None else reply.seconds
        first = reply.time_to_first_token_s
        return Completion(
            request_id=reply.id,
            choices=tuple([await self._choice(asked, choice) for choice in reply.choices]),
            usage=reply.used(activation, self._url),
            prompt_token_ids=asked.prompt,
            adapter=asked.request.adapter,
            activation_index=activation,
            seconds=seconds,
            # A server that says how long it took says this too, and null where no token was computed.
            time_to_first_token_s=asked.first_token_s if reply.seconds is None else first,
        )

    async def delta(self, asked: Asked, piece: ChoiceReply) -> Delta:
        """A piece of a streamed answer."""
        tokens = piece.tokens(self._url)
        found = await self._logprobs(asked, piece.logprobs, tokens) if asked.request.params.logprobs else ()
        return Delta(piece.index, piece.text, tokens, found)

    async def _choice(self, asked: Asked, choice: ChoiceReply) -> CompletionChoice:
        tokens = choice.tokens(self._url)
        wanted = asked.request.params.logprobs
        return CompletionChoice(
            index=choice.index,
            text=choice.text,
            token_ids=tokens,
            finish_reason=choice.finish(self._url),
            logprobs=await self._logprobs(asked, choice.logprobs, tokens) if wanted else None,
            probabilities=self._probabilities(asked, choice, tokens),
            calls=tuple(call.call() for call in choice.calls),
        )

    def _probabilities(self, asked: Asked, choice: ChoiceReply, tokens: Sequence[int]) -> dict[str, float] | None:
        constraint = asked.request.params.constraint
        if choice.probabilities is not None or not isinstance(constraint, Choice):
            return choice.probabilities
        if len(set(constraint.options)) == 1:
            return {constraint.options[0]: 1.0}
        if asked.parting is None or choice.logprobs is None:
            return None
        return shares(asked.parting, tokens, logprobs.read_logprobs(choice.logprobs, tokens, self._url))

    async def _logprobs(
        self, asked: Asked, found: LogprobsReply | None, tokens: Sequence[int]
    ) -> tuple[TokenLogprob, ...]:
        if found is None and tokens:
            raise BackendError(f"{self._url} sent no logprobs, which were asked for")
        if found is None:
            return ()
        read = logprobs.read_logprobs(found, tokens, self._url)
        texts = logprobs.texts_of(found, self._url)
        if texts is None:
            texts = dict(await self._tokens.texts(logprobs.ids_of(read), asked.model))
        return logprobs.shown(read, texts, asked.request.params.top_logprobs)
