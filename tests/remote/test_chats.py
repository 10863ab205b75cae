"""Chats become the same tokens on a server and in the engine, whatever is in them."""

from __future__ import annotations

import copy
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.errors import InputError
from midstream.models.chat import ChatTokenizer
from midstream.models.load import prepare
from midstream.remote import RemoteBackend
from midstream.types import Chat, Document, Message, Request, SamplingParams
from tests.helpers import tiny_llama
from tests.server.running import Running, running
from tests.tiny import tiny_chat

# Takes documents and tools, knows of further fields of a turn, and of arguments.
RICH = (
    "{% if mood %}({{ mood }}){% endif %}{% for t in tools or [] %}<{{ t | tojson }}>{% endfor %}"
    "{% for d in documents or [] %}[{{ d.doc_id }}|{{ d.title }}|{{ d.text }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.tool_call_id or '' }}{{ m.odd or '' }}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ("hello", "  spaces  ", "", "Zeilen\nund\u2028mehr\x85", "<|im_end|> said", "é 漢字 🙂", '{"json": "\\n"}')


@pytest.fixture(scope="module")
def rich() -> Iterator[Running]:
    chat = tiny_chat()
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = RICH
    model = prepare(tiny_llama(), ChatTokenizer(tokenizer, chat.eos_token_ids), name="rich")
    with running(AsyncEngine(model, EngineConfig(kv_budget_bytes=2 * 1024**2))) as server:
        yield server


@pytest.fixture
async def rich_far(rich: Running) -> AsyncIterator[RemoteBackend]:
    async with RemoteBackend(rich.url) as backend:
        yield backend


def chats(seed: int, *, rich: bool) -> Iterator[Chat]:
    pick = random.Random(seed)

    def documents(most: int) -> tuple[Document, ...]:
        return tuple(
            Document(text=pick.choice(TEXTS), title=pick.choice(("", "A title")), doc_id=pick.choice(("", "9")))
            for _ in range(pick.randint(0, most))
        )

    def message(role: str) -> Message:
        extra: dict[str, Any] = {}
        if rich and role == "assistant" and pick.random() < 0.5:
            arguments = pick.choice(('{"a": 1}', {"a": 1}, "not json"))
            extra = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}], "odd": 3}
        if rich and role == "tool":
            extra = {"tool_call_id": "call-1", "name": "f"}
        return Message(role=role, content=pick.choice(TEXTS), documents=documents(2), extra=extra)

    for _ in range(60):
        roles = pick.choice(
            (["user"], ["system", "user"], ["user", "assistant"], ["user", "assistant", "tool", "user"])
        )
        yield Chat(
            messages=tuple(message(role) for role in roles),
            documents=documents(3),
            appended=tuple(message("user") for _ in range(pick.randint(0, 1))),
            tools=({"type": "function", "function": {"name": "f"}},) if rich and pick.random() < 0.3 else (),
            template_arguments={"mood": "gay", "adapter_name": "jailbreak"} if pick.random() < 0.3 else {},
        )


async def test_tokens_are_those_of_the_engine(server: Running, far: RemoteBackend) -> None:
    for chat in chats(1, rich=False):
        for header in (True, False):
            assert await far.tokenize(chat, header=header) == await server.service.engine.tokenize(chat, header=header)


async def test_so_they_are_where_the_template_takes_documents_and_tools(rich: Running, rich_far: RemoteBackend) -> None:
    for chat in chats(2, rich=True):
        for header in (True, False):
            found = await rich_far.tokenize(chat, header=header)
            assert found == await rich.service.engine.tokenize(chat, header=header)


@pytest.mark.parametrize("text", TEXTS)
async def test_texts_too(server: Running, far: RemoteBackend, text: str) -> None:
    assert await far.tokenize(text) == await server.service.engine.tokenize(text)


async def test_invoking_appends_what_the_engine_appends(server: Running, far: RemoteBackend) -> None:
    engine = server.service.engine
    for chat in list(chats(3, rich=False))[:15]:
        request = Request(prompt=chat, adapter="jailbreak", invoke=True, params=SamplingParams(max_tokens=1))
        assert (await far.complete(request)).prompt_token_ids == (await engine.complete(request)).prompt_token_ids


async def test_what_json_cannot_hold_is_refused(far: RemoteBackend) -> None:
    message = Message(role="user", content="x", extra={"odd": object()})
    with pytest.raises(InputError, match="JSON"):
        await far.tokenize(Chat(messages=(message,)))
    with pytest.raises(InputError):
        await far.tokenize("half a pair: \ud800")
