"""Which conversation a request says it belongs to: one for base model and adapters, the same turn after turn."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx
import pytest

from midstream.engine.engine import AsyncEngine
from midstream.remote import RemoteBackend
from midstream.remote.affinity import SESSION_HEADER, Turns, find_turns, session_of
from midstream.types import Chat, Message, Request, SamplingParams
from tests.remote.vllm_shaped import VllmShaped
from tests.server.running import Running
from tests.tiny import tiny_chat

OPEN, CLOSE, SYSTEM, USER, ASSISTANT, JUDGE = 900, 901, 1, 2, 3, 4
TURNS = Turns(OPEN, (OPEN, USER))


def turn(role: int, *text: int) -> list[int]:
    return [OPEN, role, 10, *text, CLOSE]


def rendered(text: int) -> list[int]:
    return turn(USER, text)


def test_turns_are_read_off_three_renderings() -> None:
    assert find_turns(rendered(50), rendered(51), [*rendered(50), OPEN, ASSISTANT, 10]) == TURNS


@pytest.mark.parametrize("system", [[], turn(SYSTEM, 7, 8)])
def test_a_default_system_prompt_is_no_user_turn(system: list[int]) -> None:
    one, other = [*system, *rendered(50)], [*system, *rendered(51)]
    assert find_turns(one, other, [*one, OPEN, ASSISTANT, 10]) == TURNS


@pytest.mark.parametrize(
    ("one", "answered"),
    [
        ([20, 50, 21], [20, 50, 21]),  # no header of an answer
        ([20, 50, 21], [22, 50, 21, 30]),  # the header changes what is before it
        ([20, 50, 21], [20, 50, 21, 30]),  # answers and users' turns have nothing in common
        ([30, 50, 21], [30, 50, 21, 30]),  # nothing tells them apart
    ],
)
def test_a_template_that_cannot_be_read_has_no_turns(one: Sequence[int], answered: Sequence[int]) -> None:
    other = [51 if token == 50 else token for token in one]
    assert find_turns(one, other, answered) is None


@pytest.mark.parametrize("system", [[], turn(SYSTEM, 7, 8)])
def test_a_conversation_keeps_its_session_as_it_grows(system: list[int]) -> None:
    first = [*system, *turn(USER, 11, 12)]
    answered = [*first, *turn(ASSISTANT, 60, 61)]
    sessions = {
        session_of(prompt, turns=TURNS)
        for prompt in (
            first,
            [*first, OPEN, ASSISTANT, 10],
            [*first, OPEN, JUDGE, 10],
            [*first, *turn(USER, 70), OPEN, JUDGE, 10],  # an instruction before the invocation
            answered,
            [*answered, *turn(USER, 13), OPEN, ASSISTANT, 10],
        )
    }
    assert len(sessions) == 1


def test_an_invocation_that_opens_no_turn_belongs_to_no_conversation() -> None:
    first = turn(USER, 11, 12)
    assert session_of([*first, 40, 41], turns=TURNS, activation_index=len(first)) == session_of(first, turns=TURNS)
    assert session_of([*first, 40, 41], turns=TURNS) != session_of(first, turns=TURNS)


def test_conversations_of_one_system_prompt_spread() -> None:
    system = turn(SYSTEM, *range(20, 400))
    sessions = {session_of([*system, *turn(USER, text)], turns=TURNS) for text in range(500, 600)}
    assert len(sessions) == 100
    # As evenly as a good hash: a replica of two that got fewer than 30 of 100 would be a chance of one in 30,000.
    assert 30 <= sum(int(session, 16) % 2 for session in sessions) <= 70


def test_scopes_share_no_session() -> None:
    first = turn(USER, 11)
    assert len({session_of(first, turns=TURNS, scope=scope) for scope in ("", "a", "b")}) == 3


def test_without_turns_a_long_prompt_stays_and_a_short_one_is_taken_whole() -> None:
    long = list(range(300))
    assert session_of(long) == session_of([*long, 1, 2])
    assert session_of(long[:100]) != session_of(long)


def test_turns_of_nobody_leave_the_first_tokens() -> None:
    prompt = [7, *turn(SYSTEM, 8), 9]
    assert TURNS.first_user_turn(prompt) is None
    assert session_of(prompt, turns=TURNS) == session_of(prompt)


# ---------------------------------------------------------------------- as servers see it


class Heard(httpx.AsyncHTTPTransport):
    """The network, and the sessions of all requests that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[tuple[str, str | None]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path in ("/v1/completions", "/v1/score_continuations"):
            model = json.loads(request.content)["model"]
            self.sessions.append((model, request.headers.get(SESSION_HEADER)))
        return await super().handle_async_request(request)


def said(*texts: str) -> Chat:
    roles = ("user", "assistant")
    return Chat(messages=tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(texts)))


BRIEF = SamplingParams(max_tokens=2)


async def test_a_midstream_server_hears_one_session_from_base_model_and_adapters(server: Running) -> None:
    heard = Heard()
    async with RemoteBackend(server.url, transport=heard) as backend:
        await backend.complete(Request(prompt=said("Open?"), params=BRIEF))
        await backend.complete(Request(prompt=said("Open?"), adapter="jailbreak", invoke=True, params=BRIEF))
        await backend.complete(Request(prompt=said("Open?"), adapter="note", invoke=True, params=BRIEF))
        tokens = await backend.tokenize(said("Open?", "At nine."), header=False)
        note = tiny_chat().encode("@n:")
        await backend.complete(Request(prompt=(*tokens, *note), adapter="note", params=BRIEF))
        async for _ in backend.stream(Request(prompt=said("Open?", "At nine.", "And then?"), params=BRIEF)):
            pass
        await backend.score(Request(prompt=said("Open?", "At nine.")), [[1]])
        await backend.complete(Request(prompt=said("Closed?"), params=BRIEF))
    models = [model for model, _ in heard.sessions]
    assert models == ["tiny", "jailbreak", "note", "note", "tiny", "tiny", "tiny"]
    *one, other = [session for _, session in heard.sessions]
    assert len(set(one)) == 1
    assert one[0] is not None
    assert other not in (None, one[0])


async def test_a_server_shaped_like_vllm_hears_it_too(embedded: AsyncEngine) -> None:
    shaped = VllmShaped(embedded)
    sessions = []

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            sessions.append(request.headers.get(SESSION_HEADER))
        return await shaped.transport.handle_async_request(request)

    folders = [info.path for info in embedded.adapter_infos()]
    async with RemoteBackend("http://vllm", adapters=folders, transport=httpx.MockTransport(answer)) as backend:
        await backend.complete(Request(prompt=said("Open?"), params=BRIEF))
        await backend.complete(Request(prompt=said("Open?"), adapter="note", invoke=True, params=BRIEF))
    assert len(sessions) == 2
    assert len(set(sessions)) == 1
    assert None not in sessions
