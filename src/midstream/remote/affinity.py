"""Which conversation a request belongs to, as a header that routers keep to one replica.

Base model and adapters are different models to a router, but all their requests of one conversation want the KV of one
replica. What they have in common, and what stays as the conversation grows, is its beginning up to the end of the
first user turn: a system prompt that many conversations share does not bring them together, a later turn does not
move them.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from midstream.errors import DeadlineExceeded, MidstreamError
from midstream.types import Chat, Message

SESSION_HEADER = "x-session-id"
# Of a prompt without turns: it stays where it is once it is longer.
_TOKENS_WITHOUT_TURNS = 256


@dataclass(frozen=True, slots=True)
class Turns:
    """How a chat template opens its turns: the token that opens each, and the tokens by which a user's is known."""

    opening: int
    user: tuple[int, ...]

    def first_user_turn(self, prompt: Sequence[int]) -> int | None:
        """Where the first user turn of a prompt ends: at the next turn, or with the prompt. None without one."""
        start = self._next(prompt, 0)
        while start is not None and tuple(prompt[start : start + len(self.user)]) != self.user:
            start = self._next(prompt, start + 1)
        if start is None:
            return None
        end = self._next(prompt, start + 1)
        return len(prompt) if end is None else end

    def _next(self, prompt: Sequence[int], start: int) -> int | None:
        try:
            return prompt.index(self.opening, start)
        except ValueError:
            return None


def find_turns(one: Sequence[int], other: Sequence[int], answered: Sequence[int]) -> Turns | None:
    """How turns open, by three renderings: of a chat of one user's text, of another text, and of the first with the
    answer's header. None where a user's turn does not open as an answer does: such a template cannot be read so."""
    header = list(answered[len(one) :])
    if list(answered[: len(one)]) != list(one) or not header:
        return None
    before = list(one[: _common(one, other)])
    if header[0] not in before:
        return None
    opened = before[len(before) - 1 - before[::-1].index(header[0]) :]
    # Of the user's header no more than tells it from an answer's: what follows may be another token before other texts.
    told = _common(opened, header)
    return Turns(header[0], tuple(opened[: told + 1])) if told < len(opened) else None


def session_of(
    prompt: Sequence[int], *, scope: str = "", turns: Turns | None = None, activation_index: int | None = None
) -> str:
    """The conversation of a prompt's tokens, as 32 hexadecimal digits that hold none of its text.

    `activation_index`, where it is known and not 0: an adapter's invocation belongs to no conversation.
    """
    end = turns.first_user_turn(prompt) if turns is not None else None
    end = min(len(prompt), _TOKENS_WITHOUT_TURNS) if end is None else end
    if activation_index:
        end = min(end, activation_index)
    digest = blake2b(scope.encode(), digest_size=16)
    digest.update(b"\0" + struct.pack(f"<{end}q", *prompt[:end]))
    return digest.hexdigest()


class _Tokenize(Protocol):
    def __call__(self, prompt: str | Chat, *, header: bool = True) -> Awaitable[tuple[int, ...]]: ...


class Sessions:
    """The conversations of one server's requests. How its template opens turns is asked of it once."""

    def __init__(self, tokenize: _Tokenize) -> None:
        self._tokenize = tokenize
        self._turns: Turns | None = None
        self._asked = False

    async def of(self, prompt: Sequence[int], scope: str, activation_index: int | None) -> str:
        """The conversation of a prompt, as `session_of` says it."""
        if not self._asked:
            self._turns = await self._find_turns()
            self._asked = True
        return session_of(prompt, scope=scope, turns=self._turns, activation_index=activation_index)

    async def _find_turns(self) -> Turns | None:
        one, other = (Chat(messages=(Message(role="user", content=text),)) for text in ("a", "b"))
        try:
            return find_turns(
                await self._tokenize(one, header=False),
                await self._tokenize(other, header=False),
                await self._tokenize(one),
            )
        except DeadlineExceeded:
            raise
        except MidstreamError:
            # A model without a chat template, or a server that renders no chats: its prompts have no turns.
            return None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
