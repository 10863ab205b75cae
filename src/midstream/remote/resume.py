"""A stream that goes on where another replica takes over.

The request is sent again from its beginning. What the caller already has must come again, token by token, and is left
out; only then does the rest follow. Where the answer is another one, that is said, never mended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from midstream.errors import BackendError
from midstream.remote.repeat import Lost, waits
from midstream.remote.reply import ChoiceReply, LogprobsReply, Reply, joined
from midstream.types import SamplingParams

Replies = AsyncGenerator[Reply, None]


async def resumed(attempt: Callable[[], Replies], params: SamplingParams, repeats: int, url: str) -> Replies:
    """The replies of one stream, over as many tries as it takes. Raises the last try's error.

    Once tokens have been given, only an answer that comes out the same each time is asked for again: a greedy one, or
    one with a seed.
    """
    given: dict[int, list[ChoiceReply]] = {}
    for wait in (*waits(repeats), None):
        ahead = {index: _Ahead(joined(pieces), url) for index, pieces in given.items()}
        try:
            async with aclosing(attempt()) as replies:
                async for reply in replies:
                    fresh = [new for new in (_new(piece, ahead) for piece in reply.choices) if new is not None]
                    for piece in fresh:
                        given.setdefault(piece.index, []).append(piece)
                    yield reply.model_copy(update={"choices": fresh})
            return
        except Lost as lost:
            if wait is None or (given and not _same_again(params)):
                raise lost.error from lost.__cause__
            await asyncio.sleep(wait)


def _same_again(params: SamplingParams) -> bool:
    return params.temperature == 0 or params.seed is not None


def _new(piece: ChoiceReply, ahead: dict[int, _Ahead]) -> ChoiceReply | None:
    """The part of a piece that the caller does not have; None where there is none."""
    waiting = ahead.get(piece.index)
    if waiting is None:
        return piece
    rest = waiting.rest(piece)
    if rest is not None:
        del ahead[piece.index]
    return rest


class _Ahead:
    """What the caller has of one answer, ahead of what a later try has given so far."""

    def __init__(self, given: ChoiceReply, url: str) -> None:
        self._given = given
        self._url = url
        self._pieces: list[ChoiceReply] = []

    def rest(self, piece: ChoiceReply) -> ChoiceReply | None:
        """What is new once the later try has come as far; None before. Raises BackendError for another answer."""
        self._pieces.append(piece)
        whole = joined(self._pieces)
        had, has = self._given.token_ids or [], whole.token_ids or []
        behind = len(has) < len(had) or len(whole.text) < len(self._given.text)
        if behind and whole.finish_reason is None:
            return None
        if has[: len(had)] != had or not whole.text.startswith(self._given.text):
            raise BackendError(
                f"the stream of {self._url} broke off, and the answer was another one when it was asked for again: "
                "send the request again"
            )
        return whole.model_copy(
            update={
                "text": whole.text[len(self._given.text) :],
                "token_ids": has[len(had) :] if whole.token_ids is not None else None,
                "logprobs": _without(whole.logprobs, len(had)),
            }
        )


def _without(found: LogprobsReply | None, count: int) -> LogprobsReply | None:
    """Logprobs without those of the first `count` tokens."""
    if found is None:
        return None
    top = found.top_logprobs
    return found.model_copy(
        update={
            "tokens": found.tokens[count:],
            "token_logprobs": found.token_logprobs[count:],
            "top_logprobs": None if top is None else top[count:],
        }
    )
