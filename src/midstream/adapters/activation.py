"""Where an activated LoRA switches on. The only place that knows the rule.

The activation index is the first token of the last occurrence of the invocation tokens, which is PEFT's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from midstream.errors import InvocationError


def find_last(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Start of the last occurrence of `invocation` in `tokens`, or None.

    Knuth, Morris and Pratt's search from the end, so that a partial match is retried in linear time.
    """
    if not invocation:
        return None
    pattern = list(reversed(invocation))
    fallback = _fallback(pattern)
    matched = 0
    for index in range(len(tokens) - 1, -1, -1):
        while matched and tokens[index] != pattern[matched]:
            matched = fallback[matched - 1]
        if tokens[index] == pattern[matched]:
            matched += 1
        if matched == len(pattern):
            return index
    return None


def activation_index(
    tokens: Sequence[int],
    invocation: Sequence[int],
    *,
    describe: Callable[[Sequence[int]], str] | None = None,
    adapter: str = "",
) -> int:
    """First position that the adapter owns. Raises InvocationError, which shows the tokens, when there is none."""
    found = find_last(tokens, invocation)
    if found is not None:
        return found
    wanted = _shown(invocation, describe)
    message = f"adapter {adapter or '?'} is invoked by {wanted}, which the prompt of {len(tokens)} tokens lacks"
    near, width = _nearest(tokens, invocation)
    if width:
        there = _shown(tokens[near : near + len(invocation) + 1], describe)
        message += f"; nearest, at token {near}, it has {there} (the text before or after may have merged into a token)"
    else:
        message += f"; it ends with {_shown(tokens[-max(4, len(invocation)) :], describe)}"
    raise InvocationError(message + "; append the invocation tokens, or set invoke")


def _fallback(pattern: Sequence[int]) -> list[int]:
    """For each prefix of the pattern, the length of its longest border."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table


def _nearest(tokens: Sequence[int], invocation: Sequence[int]) -> tuple[int, int]:
    """The last position with the longest beginning of the invocation, and how long that is."""
    best, width = 0, 0
    for start in range(len(tokens) - 1, -1, -1):
        length = 0
        while (
            length < len(invocation) and start + length < len(tokens) and tokens[start + length] == invocation[length]
        ):
            length += 1
        if length > width:
            best, width = start, length
    return best, width


def _shown(tokens: Sequence[int], describe: Callable[[Sequence[int]], str] | None) -> str:
    ids = list(tokens)
    return f"{ids}" if describe is None else f"{ids} ({describe(ids)!r})"
