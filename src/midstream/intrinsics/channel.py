"""The final channel of an output in OpenAI's Harmony format, found by its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from midstream.types import TokenLogprob

_CHANNEL = "<|channel|>"
_MESSAGE = "<|message|>"
_ENDS = frozenset({"<|end|>", "<|return|>", "<|end_of_text|>"})


def final_channel(tokens: Sequence[TokenLogprob]) -> Sequence[TokenLogprob]:
    """The tokens of the last message in the channel `final`, without those around it; empty where there is none.

    A control token counts only as one token: ordinary ones that spell the same text are text.
    """
    texts = [token.text for token in tokens]
    headers = [i for i, text in enumerate(texts) if text == _CHANNEL]
    start = next((body for i in reversed(headers) if (body := _final_message(texts, i)) is not None), None)
    if start is None:
        return ()
    end = next((i for i in range(start, len(texts)) if texts[i] in _ENDS), len(texts))
    return tokens[start:end]


def _final_message(texts: Sequence[str], header: int) -> int | None:
    """Where the message begins that follows `<|channel|>`, `final` and `<|message|>`, with any white space between."""
    name = _after_blanks(texts, header + 1)
    if name is None or texts[name].strip() != "final":
        return None
    message = _after_blanks(texts, name + 1)
    return message + 1 if message is not None and texts[message] == _MESSAGE else None


def _after_blanks(texts: Sequence[str], start: int) -> int | None:
    return next((i for i in range(start, len(texts)) if texts[i].strip()), None)
