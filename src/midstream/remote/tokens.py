"""A server's tokenizer: texts and chats to token ids, and what a token adds to a text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from midstream.documents import place_documents
from midstream.errors import InputError
from midstream.remote.channel import Channel
from midstream.remote.reply import TextReply, TokensReply, checked
from midstream.types import Chat, Message

_ANCHOR = "a"
_AT_A_TIME = 16
_PROBE = {"messages": [{"role": "user", "content": _ANCHOR}]}
_DOCUMENTS = [{"text": "probe", "doc_id": "1", "title": "probe"}]
_TOOLS = [{"type": "function", "function": {"name": "probe", "description": "probe", "parameters": {"type": "object"}}}]


# What shows another tokenizer or template: a conversation, and text that tokenizers cut in different ways.
_MESSAGES = tuple(Message(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))
_TEXT = "Straße 12345\n\n    naïve'll 東京 <|im_start|>"


class TokenSource(Protocol):
    """Tokens as one model has them. `ours`: a midstream server is asked."""

    async def of_text(self, text: str, model: str) -> tuple[int, ...]:
        """Token ids of a text; nothing is added."""
        ...

    async def of_chat(self, chat: Chat, model: str, *, header: bool, ours: bool) -> tuple[int, ...]:
        """Token ids of a chat, with the assistant's header or without."""
        ...

    async def texts(self, ids: Iterable[int], model: str) -> Mapping[int, str]:
        """What each token adds to a text that goes on."""
        ...


async def difference(here: TokenSource, there: TokenSource, model: str, *, ours: bool) -> str | None:
    """In what the tokens of two sources differ: None where they are the same."""
    if await here.of_text(_TEXT, model) != await there.of_text(_TEXT, model):
        return "tokenizer"
    chat = Chat(messages=_MESSAGES)
    try:
        expected = await here.of_chat(chat, model, header=True, ours=ours)
    except InputError:
        return None  # no chat template that takes this
    return None if expected == await there.of_chat(chat, model, header=True, ours=ours) else "chat template"


class Tokens:
    """Tokens as one server's model has them. Its tokenizer and template are taken to stay what they are."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._texts: dict[int, str] = {}
        self._taken: dict[str, bool] = {}

    async def of_text(self, text: str, model: str) -> tuple[int, ...]:
        """Token ids of a text; nothing is added."""
        return await self._tokenized({"model": model, "prompt": text, "add_special_tokens": False})

    async def of_chat(self, chat: Chat, model: str, *, header: bool, ours: bool) -> tuple[int, ...]:
        """Token ids of a chat. A midstream server renders it as the engine does; for others, what it means is
        written in the fields they know."""
        asked = {"model": model, "add_generation_prompt": header}
        if ours:
            return await self._tokenized({**asked, "chat": chat.model_dump()})
        return await self._tokenized({**asked, "add_special_tokens": False, **await self._plain(chat, model)})

    async def texts(self, ids: Iterable[int], model: str) -> Mapping[int, str]:
        """What each token adds to a text that goes on; asked of the server once for each."""
        unknown = set(ids) - self._texts.keys()
        if unknown:
            anchor = await self.of_text(_ANCHOR, model)
            before = await self._detokenized(anchor, model)
            turns = asyncio.Semaphore(_AT_A_TIME)

            async def one(token: int) -> None:
                async with turns:
                    self._texts[token] = (await self._detokenized((*anchor, token), model))[len(before) :]

            await asyncio.gather(*map(one, sorted(unknown)))
        return self._texts

    async def _plain(self, chat: Chat, model: str) -> dict[str, Any]:
        """Messages with their documents in them, but for a template that has a place for the chat's own."""
        arguments = dict(chat.template_arguments)
        body: dict[str, Any] = {}
        if chat.tools:
            if not await self._takes("tools", model, {"tools": _TOOLS}):
                raise InputError("this model's chat template takes no tools: send the request without `tools`")
            body["tools"] = list(chat.tools)
        if chat.documents and await self._takes(
            "documents", model, {"chat_template_kwargs": {"documents": _DOCUMENTS}}
        ):
            arguments["documents"] = [document.model_dump() for document in chat.documents]
            chat = chat.model_copy(update={"documents": ()})
        if arguments:
            body["chat_template_kwargs"] = arguments
        return {**body, "messages": list(place_documents(chat))}

    async def _takes(self, field: str, model: str, sample: dict[str, Any]) -> bool:
        """Whether the chat template does anything with a field: a server passes it on without a word."""
        if field not in self._taken:
            asked = {"model": model, **_PROBE}
            without, with_it = await self._tokenized(asked), await self._tokenized({**asked, **sample})
            self._taken[field] = without != with_it
        return self._taken[field]

    async def _tokenized(self, body: dict[str, Any]) -> tuple[int, ...]:
        return checked(TokensReply, await self._channel.post("tokenize", body), self._channel.url).tokens

    async def _detokenized(self, tokens: tuple[int, ...], model: str) -> str:
        body = {"model": model, "tokens": list(tokens)}
        return checked(TextReply, await self._channel.post("detokenize", body), self._channel.url).prompt
