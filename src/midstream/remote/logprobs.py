"""Log-probabilities as servers send them: tokens by their ids, so that none is lost where two have the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from midstream.errors import BackendError
from midstream.remote.reply import LogprobsReply, logprob_of
from midstream.types import TokenLogprob

_MARK = "token_id:"


def read_logprobs(found: LogprobsReply, tokens: Sequence[int], url: str) -> tuple[TokenLogprob, ...]:
    """One for each of the answer's tokens, without texts; alternatives likeliest first.

    Raises BackendError where they are not those of `tokens`, or do not show ids.
    """
    ids = [_id(shown, url) for shown in found.tokens]
    tops = found.top_logprobs or [None] * len(ids)
    if ids != list(tokens) or len(tops) != len(ids) or len(found.token_logprobs) != len(ids):
        raise BackendError(f"{url} sent logprobs of other tokens than its answer has")
    return tuple(
        TokenLogprob(token, logprob_of(value), top=_top(top or {}, url))
        for token, value, top in zip(ids, found.token_logprobs, tops, strict=True)
    )


def texts_of(found: LogprobsReply, url: str) -> dict[int, str] | None:
    """The texts that the server sent along, by token id; None where it sends none."""
    return None if found.token_texts is None else {_id(key, url): text for key, text in found.token_texts.items()}


def ids_of(logprobs: Sequence[TokenLogprob]) -> set[int]:
    """All tokens that logprobs speak of."""
    return {one.token_id for token in logprobs for one in (token, *token.top)}


def shown(logprobs: Sequence[TokenLogprob], texts: Mapping[int, str], top: int) -> tuple[TokenLogprob, ...]:
    """Logprobs with their texts, and with as many alternatives as were asked for: vLLM adds the chosen token."""

    def named(one: TokenLogprob, *others: TokenLogprob) -> TokenLogprob:
        return TokenLogprob(one.token_id, one.logprob, texts.get(one.token_id, ""), others)

    return tuple(named(one, *map(named, one.top[:top])) for one in logprobs)


def _top(top: Mapping[str, float], url: str) -> tuple[TokenLogprob, ...]:
    each = [TokenLogprob(_id(key, url), logprob_of(value)) for key, value in top.items()]
    return tuple(sorted(each, key=lambda one: -one.logprob))


def _id(shown: str, url: str) -> int:
    number = shown.removeprefix(_MARK)
    if number == shown or not number.isdecimal():
        raise BackendError(f"{url} names the tokens of logprobs by text: it does not know return_tokens_as_token_ids")
    return int(number)
