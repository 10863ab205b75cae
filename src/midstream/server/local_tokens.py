"""A model's tokenizer in this process, for a backend whose model is elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from midstream.models.chat import ChatTokenizer
from midstream.types import Chat


class LocalTokens:
    """A `TokenSource`: the very renderings that the embedded engine would compute, and no request for any of them."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self._chat = chat

    async def of_text(self, text: str, model: str) -> tuple[int, ...]:
        return await asyncio.to_thread(self._chat.encode, text)

    async def of_chat(self, chat: Chat, model: str, *, header: bool, ours: bool) -> tuple[int, ...]:
        return await asyncio.to_thread(self._chat.of, chat, header=header)

    async def texts(self, ids: Iterable[int], model: str) -> Mapping[int, str]:
        return await asyncio.to_thread(lambda: {token: self._chat.token_text(token) for token in ids})
