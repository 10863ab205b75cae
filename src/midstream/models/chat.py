"""Chats to token ids and back: the model's template, and documents placed in the turn that retrieved them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midstream.documents import place_documents
from midstream.errors import InputError, ModelError
from midstream.types import Chat

# What the rendering itself takes; everything else goes to the template.
_RENDERING = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer with its chat template. `eos_token_ids` end an answer."""

    tokenizer: Any
    eos_token_ids: frozenset[int]
    _texts: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTokenizer:
        """Read a Hugging Face folder's tokenizer. Raises ModelError when there is none that can be used."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            # transformers raises many types here (missing files, unknown classes, broken JSON).
            raise ModelError(f"cannot load a tokenizer from {folder}: {error}") from error
        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer in {folder} is a slow one; a tokenizer.json is needed")
        return cls(tokenizer, _eos_ids(folder, tokenizer))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text. Nothing is added; the text of a special token becomes that token."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """What a token adds to a text that goes on: its leading space is kept. Part of a character reads as U+FFFD."""
        if token not in self._texts:
            anchor = self.encode("a")
            self._texts[token] = self.decode((*anchor, token))[len(self.decode(anchor)) :]
        return self._texts[token]

    def history(self, chat: Chat) -> tuple[int, ...]:
        """The rendered chat, up to and including its last message."""
        return self._render(chat, with_header=False)

    def prompt(self, chat: Chat) -> tuple[int, ...]:
        """The rendered chat and the header of the assistant's answer."""
        return self._render(chat, with_header=True)

    def of(self, prompt: str | Chat, *, header: bool) -> tuple[int, ...]:
        """Token ids of a text, or of a chat with the assistant's header or without."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        return self._render(prompt, with_header=header)

    def reply_header(self, chat: Chat) -> tuple[int, ...]:
        """What `prompt` adds to `history`."""
        history, prompt = self.history(chat), self.prompt(chat)
        if prompt[: len(history)] != history:
            raise InputError("the chat template changes the history when it asks for an answer")
        return prompt[len(history) :]

    def _render(self, chat: Chat, *, with_header: bool) -> tuple[int, ...]:
        template = self.tokenizer.chat_template
        if not template:
            raise InputError("this model has no chat template: send token ids or a text instead of messages")
        reserved = chat.template_arguments.keys() & _RENDERING
        if reserved:
            raise InputError(
                f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}: that is not the template's"
            )
        options: dict[str, Any] = dict(chat.template_arguments)
        if chat.tools:
            if "tools" not in template:
                raise InputError("this model's chat template takes no tools: send the request without `tools`")
            options["tools"] = list(chat.tools)
        if "documents" in template and chat.documents:
            options["documents"] = [document.model_dump() for document in chat.documents]
            chat = chat.model_copy(update={"documents": ()})
        try:
            text = self.tokenizer.apply_chat_template(
                list(place_documents(chat)), tokenize=False, add_generation_prompt=with_header, **options
            )
        except Exception as error:
            # A template is a program of the model's author and may raise anything.
            raise InputError(f"the chat template refused the messages: {error}") from error
        return self.encode(text)


def _eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text()).get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named]) - {None}
    if not ids:
        raise ModelError(f"the model in {folder} names no end-of-sequence token")
    return frozenset(ids)
