"""Replies as they come, checked: OpenAI's fields, vLLM's, and this project's own where the server sends them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from midstream.errors import BackendError
from midstream.types import FinishReason, InvokedCall, Score, Usage

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

_LEAST = -9999.0
_FINISHES: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "abort": "cancelled",
}


class CachedTokens(BaseModel):
    cached_tokens: int = 0
    cached_base_tokens: int | None = None
    cached_adapter_tokens: int | None = None


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None
    computed_tokens: int | None = None
    forwards: int | None = None

    def usage(self, activation_index: int | None) -> Usage:
        """Where the server does not say whose tokens were cached, the activation index does: the base model's KV
        ends there. Forward passes that it does not count are 0."""
        details = self.prompt_tokens_details or CachedTokens()
        base, adapter = details.cached_base_tokens, details.cached_adapter_tokens
        if base is None or adapter is None:
            limit = details.cached_tokens if activation_index is None else activation_index
            base = min(details.cached_tokens, limit)
            adapter = details.cached_tokens - base
        computed = self.computed_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_base_tokens=base,
            cached_adapter_tokens=adapter,
            computed_tokens=self.prompt_tokens - base - adapter if computed is None else computed,
            completion_tokens=self.completion_tokens,
            forwards=self.forwards or 0,
        )


class LogprobsReply(BaseModel):
    """Tokens read `token_id:7`. `token_texts` is this project's own."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    token_texts: dict[str, str] | None = None


class CallReply(BaseModel):
    """An adapter's answer inside the base model's output."""

    adapter: str
    start: int
    end: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    probabilities: dict[str, float] | None = None
    usage: UsageReply
    seconds: float

    def call(self) -> InvokedCall:
        return InvokedCall(
            adapter=self.adapter,
            start=self.start,
            end=self.end,
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            probabilities=self.probabilities,
            usage=self.usage.usage(None),
            seconds=self.seconds,
        )


class ChoiceReply(BaseModel):
    """One answer, or in a stream a piece of one."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: LogprobsReply | None = None
    probabilities: dict[str, float] | None = None
    activation_index: int | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    calls: list[CallReply] = []

    def finish(self, url: str) -> FinishReason:
        """Why the answer ended. Raises BackendError for a reason that is none of an answer's."""
        if self.finish_reason not in _FINISHES:
            raise BackendError(f"{url} ended an answer with {self.finish_reason!r}: send the request again")
        return _FINISHES[self.finish_reason]

    def tokens(self, url: str) -> tuple[int, ...]:
        """The answer's token ids. Raises BackendError where the server does not send them."""
        if self.token_ids is None:
            raise BackendError(
                f"{url} sends no token ids with its answers (return_token_ids): it takes a midstream server, or vLLM "
                "0.10.2 or later"
            )
        return tuple(self.token_ids)


class Reply(BaseModel):
    """A completion, or in a stream a piece of one."""

    id: str = ""
    choices: list[ChoiceReply] = []
    usage: UsageReply | None = None
    seconds: float | None = None
    time_to_first_token_s: float | None = None

    def used(self, activation_index: int | None, url: str) -> Usage:
        if self.usage is None:
            raise BackendError(f"{url} answered without `usage`: is it an OpenAI-compatible server?")
        return self.usage.usage(activation_index)


class ScoreReply(BaseModel):
    """The answer of `/v1/score_continuations`."""

    logprobs: list[list[float]]
    usage: UsageReply
    activation_index: int | None = None
    seconds: float

    def score(self) -> Score:
        return Score(
            logprobs=tuple(tuple(map(logprob_of, row)) for row in self.logprobs),
            usage=self.usage.usage(self.activation_index),
            activation_index=self.activation_index,
            seconds=self.seconds,
        )


class TokensReply(BaseModel):
    tokens: tuple[int, ...]


class TextReply(BaseModel):
    prompt: str


def logprob_of(value: float | None) -> float:
    """A log-probability as it was: JSON has no minus infinity, so servers send a number below any real one."""
    return -math.inf if value is None or value <= _LEAST else value


def checked(kind: type[M], reply: Any, url: str) -> M:
    """A reply as what it should be. Raises BackendError that names what is wrong with it."""
    try:
        return kind.model_validate(reply)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'reply'}: {e['msg']}" for e in error.errors()[:4])
        raise BackendError(f"{url} answered what cannot be understood ({wrong}): is it the right server?") from error


def joined(pieces: Sequence[ChoiceReply]) -> ChoiceReply:
    """One answer of the pieces of its stream."""
    ids = [piece.token_ids for piece in pieces if piece.token_ids is not None]
    return ChoiceReply(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        finish_reason=_last([piece.finish_reason for piece in pieces]),
        token_ids=[token for each in ids for token in each] if ids else None,
        logprobs=_joined_logprobs([piece.logprobs for piece in pieces if piece.logprobs is not None]),
        probabilities=_last([piece.probabilities for piece in pieces]),
        activation_index=_last([piece.activation_index for piece in pieces]),
        calls=[call for piece in pieces for call in piece.calls],
    )


def _last(values: Sequence[T | None]) -> T | None:
    return next((value for value in reversed(values) if value is not None), None)


def _joined_logprobs(each: Sequence[LogprobsReply]) -> LogprobsReply | None:
    if not each:
        return None
    texts = {key: text for found in each for key, text in (found.token_texts or {}).items()}
    return LogprobsReply(
        tokens=[token for found in each for token in found.tokens],
        token_logprobs=[value for found in each for value in found.token_logprobs],
        top_logprobs=[top for found in each for top in found.top_logprobs or [None] * len(found.tokens)],
        token_texts=texts or None,
    )
