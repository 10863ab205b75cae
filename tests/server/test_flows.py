"""Flows over HTTP: whole and as events, within limits, refused, left, and the same as anywhere else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from midstream.config import ServerConfig
from midstream.errors import InputError
from midstream.flows import (
    AgentSettings,
    BestOfNSettings,
    GuardSettings,
    MajoritySettings,
    RagSettings,
    RepairSettings,
    Requirement,
    Run,
    WeightedMajoritySettings,
    agent,
    best_of_n,
    calculator,
    guarded,
    majority,
    rag_turn,
    repair,
    search,
    weighted_majority,
)
from midstream.flows.run import FlowResult
from midstream.remote import RemoteBackend
from midstream.retrieval import Bm25Retriever, read_documents
from midstream.server.app import create_app
from midstream.transcript import Transcript
from midstream.types import Chat, Message
from tests.flows.home import check_alike, home_engine, write_home
from tests.server.running import Running, running, settled

QUESTION = "When does the museum open?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SHORT = {"max_tokens": 12}
DRAWN = {"max_tokens": 12, "temperature": 1.0}
# One body of each flow, in which every step that costs tokens is taken.
BODIES: dict[str, dict[str, Any]] = {
    "rag": {"settings": {"guard": None, "answerable": None, "params": SHORT}},
    "best-of-n": {"settings": {"n": 3, "weights": {"certainty": 1.0}, "params": DRAWN}},
    "majority": {"settings": {"n": 3, "params": DRAWN}},
    "weighted-majority": {"settings": {"n": 3, "weights": {"certainty": 1.0}, "params": DRAWN}},
    "repair": {"requirements": ["Be short."], "settings": {"attempts": 2, "params": SHORT}},
    "guarded": {"requirements": ["Be short."], "settings": {"guard": 1.0, "met": 0.0, "params": SHORT}},
    "agent": {
        "tools": ["calculator", "search"],
        "settings": {"max_steps": 2, "think_tokens": 8, "act_tokens": 400, "string_chars": 12},
    },
}
LONG = {"settings": {"n": 8, "params": {"max_tokens": 1800, "temperature": 1.0, "ignore_eos": True}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("flows"))


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Running]:
    with running(home_engine(home), docs=home / "docs") as server:
        yield server


def play(server: Running, flow: str, **more: Any) -> httpx.Response:
    body = {"messages": MESSAGES, "seed": 3, **BODIES[flow], **more}
    return server.client.post(f"/v1/flows/{flow}", json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *told, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in told]


def flows_counted(server: Running) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [s for f in families for s in f.samples if s.name == "midstream:flows_total"]
    return {(s.labels["flow"], s.labels["outcome"]): s.value for s in samples}


# ---------------------------------------------------------------------- what they are


def test_the_flows_are_listed_with_the_schemas_of_their_settings(server: Running) -> None:
    listed = server.client.get("/v1/flows").json()
    assert [each["name"] for each in listed["data"]] == list(BODIES)
    for each in listed["data"]:
        assert each["description"].endswith(".")
        given = BODIES[each["name"]]["settings"]
        assert given.keys() <= each["settings"]["properties"].keys()


async def near(home: Path, flow: str, backend: Any) -> FlowResult:
    """The same flow in Python."""
    chat, given = Chat(messages=(Message(role="user", content=QUESTION),)), BODIES[flow]["settings"]
    retriever, run = Bm25Retriever(read_documents(home / "docs")), Run(seed=3)
    if flow == "rag":
        return await rag_turn(backend, Transcript(), QUESTION, retriever, RagSettings(**given), run=run)
    if flow == "best-of-n":
        return await best_of_n(backend, chat, BestOfNSettings(**given), run=run)
    if flow == "majority":
        return await majority(backend, chat, MajoritySettings(**given), run=run)
    if flow == "weighted-majority":
        return await weighted_majority(backend, chat, WeightedMajoritySettings(**given), run=run)
    if flow == "repair":
        return await repair(backend, chat, [Requirement("Be short.")], RepairSettings(**given), run=run)
    if flow == "guarded":
        return await guarded(backend, chat, GuardSettings(**given, requirements=("Be short.",)), run=run)
    return await agent(backend, chat, [calculator, search(retriever)], AgentSettings(**given), run=run)


@pytest.mark.parametrize("flow", BODIES)
def test_a_flow_gives_the_same_whole_as_events_far_and_near(server: Running, home: Path, flow: str) -> None:
    before = flows_counted(server).get((flow, "ended"), 0)
    whole = play(server, flow)
    assert whole.status_code == 200, whole.text
    result = whole.json()
    assert (result["error"], result["seed"]) == (None, 3)
    assert result["calls"]
    told = events(play(server, flow, stream=True))
    assert told[-1].keys() == {"kind", "step", "result"}
    assert [each["kind"] for each in told].count("end") == 1
    assert {"step", "call"} <= {each["kind"] for each in told}
    check_alike(told[-1]["result"], result)
    assert flows_counted(server)[flow, "ended"] == before + 2

    async def far() -> FlowResult:
        async with RemoteBackend(server.url) as backend:
            return await near(home, flow, backend)

    check_alike(asyncio.run(far()).as_dict(), result)
    engine = home_engine(home)
    check_alike(asyncio.run(near(home, flow, engine)).as_dict(), result)
    asyncio.run(engine.aclose())


def test_text_comes_as_it_is_decoded(server: Running) -> None:
    told = events(play(server, "guarded", requirements=[], stream=True))
    texts = [each["text"] for each in told if each["kind"] == "text"]
    assert len(texts) > 1
    assert "".join(texts) == told[-1]["result"]["answer"]
    kinds = [each["kind"] for each in told]
    assert kinds.index("text") < kinds.index("end") - 2


def test_a_question_goes_on_from_the_turns_before_it(server: Running) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "At nine."}, {"role": "user", "content": "And when not?"}]
    result = play(server, "rag", messages=turns).json()
    assert result["question"] == "And when not?"
    assert result["calls"][0]["step"] == "rewrite"


def test_a_corpus_goes_before_the_servers_documents(server: Running) -> None:
    corpus = [{"text": "They open the zoo at ten.", "doc_id": "zoo"}, {"text": "Nothing of that."}]
    (passage,) = play(server, "rag", corpus=corpus).json()["passages"]
    assert (passage["doc_id"], passage["text"]) == ("zoo", "They open the zoo at ten.")
    assert {p["doc_id"] for p in play(server, "rag").json()["passages"]} == {"hours.txt#1", "tickets.txt#1"}


def test_documents_belong_to_the_last_turn(server: Running) -> None:
    settings = {**BODIES["best-of-n"]["settings"], "weights": {"hallucination": 1.0}}
    without = play(server, "best-of-n", settings=settings)
    assert "no scorer with a weight is left" in without.json()["error"]["message"]
    result = play(server, "best-of-n", settings=settings, documents=[{"text": "It opens at nine."}]).json()
    assert all(0 <= candidate["scores"]["hallucination"] <= 1 for candidate in result["candidates"])


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("flow", "more", "reason"),
    [
        ("rag", {"documents": []}, "documents"),
        ("rag", {"messages": [{"role": "assistant", "content": "x"}]}, "its role is user"),
        ("rag", {"messages": [{"role": "user", "content": "x", "documents": [{"text": "y"}]}]}, "as corpus"),
        ("rag", {"corpus": []}, "corpus"),
        ("rag", {"settings": {"guards": 1}}, "settings.guards"),
        ("rag", {"settings": {"guard": 2}}, "settings.guard"),
        ("best-of-n", {"settings": {"params": {"n": 2}}}, "must be 1"),
        ("best-of-n", {"settings": {"params": {"seed": 2}}}, "come from its run"),
        ("best-of-n", {"settings": {"weights": {"beauty": 1}}}, "no scorer 'beauty'"),
        ("majority", {"settings": {"extract": "("}}, "no regular expression"),
        ("repair", {"requirements": []}, "requirements"),
        ("repair", {"requirements": ["x"] * 65}, "at most 64"),
        ("guarded", {"settings": {"requirements": ["x"]}}, "give them once"),
        ("guarded", {"messages": [{"role": "assistant", "content": "x"}]}, "judges user turns"),
        ("agent", {"tools": ["shell"]}, "tools"),
        ("agent", {"tools": ["calculator", "calculator"]}, "more than once"),
        ("agent", {"tools": ["calculator"], "corpus": [{"text": "x"}]}, "for the tool search"),
        ("agent", {"settings": {"invoke": ["jailbreak"] * 2}}, "more than once"),
        ("agent", {"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user turn"),
        ("agent", {"seed": -1}, "seed"),
        ("agent", {"deadline_s": 0}, "deadline_s"),
        ("agent", {"max_tokens": 0}, "max_tokens"),
        ("agent", {"messages": MESSAGES * 1025}, "messages"),
        ("agent", {"sead": 1}, "sead"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_a_plain_400_that_names_it(
    server: Running, flow: str, more: dict[str, Any], reason: str, stream: bool
) -> None:
    response = play(server, flow, **more, stream=stream)
    assert response.status_code == 400
    assert response.json().keys() == {"error"}
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_adapter_is_a_404_before_anything_is_drawn(server: Running, stream: bool) -> None:
    settings = {**BODIES["best-of-n"]["settings"]}
    engine = server.service.engine
    folder = next(info.path for info in engine.adapter_infos() if info.name == "certainty")
    asyncio.run(engine.unload_adapter("certainty"))
    try:
        response = play(server, "best-of-n", settings=settings, stream=stream)
    finally:
        asyncio.run(engine.load_adapter(folder))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"
    assert response.json().keys() == {"error"}


def test_without_documents_there_is_nothing_to_search(home: Path) -> None:
    with running(home_engine(home)) as bare:
        for flow in ("rag", "agent"):
            for stream in (False, True):
                response = play(bare, flow, stream=stream)
                assert response.status_code == 400
                assert "start the server with --docs" in response.json()["error"]["message"]
        assert play(bare, "rag", corpus=[{"text": "The museum."}]).status_code == 200
        assert flows_counted(bare)["rag", "invalid_request_error"] == 2


def test_documents_that_cannot_be_read_are_named_before_anything_is_served(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no file or folder"):
        ServerConfig(docs=tmp_path / "nowhere")
    engine = home_engine(home)
    with pytest.raises(InputError, match="no text in"):
        create_app(engine, ServerConfig(docs=tmp_path))
    asyncio.run(engine.aclose())


# ---------------------------------------------------------------------- stopped


def test_a_spent_budget_is_429_beside_what_there_is(server: Running) -> None:
    response = play(server, "repair", max_tokens=20, settings={"params": {"max_tokens": 30, "ignore_eos": True}})
    assert response.status_code == 429
    found = response.json()
    assert found["error"]["code"] == found["result"]["error"]["code"] == "budget_exceeded"
    assert [attempt["finish_reason"] for attempt in found["result"]["attempts"]] == ["length"]
    assert found["result"]["attempts"][0]["verdicts"] == []
    well = play(server, "best-of-n", max_tokens=1)
    assert (well.status_code, well.json()["stopped"], len(well.json()["candidates"])) == (200, "budget", 1)


def test_a_deadline_is_504_beside_what_there_is(server: Running) -> None:
    response = play(server, "majority", **LONG, deadline_s=0.3)
    assert response.status_code == 504
    found = response.json()
    assert found["error"]["code"] == "deadline_exceeded"
    assert len(found["result"]["candidates"]) == 8
    assert all(each["finish_reason"] is None for each in found["result"]["candidates"])
    asyncio.run(settled(server.service.engine))
    told = events(play(server, "majority", **LONG, deadline_s=0.3, stream=True))
    assert told[-1]["result"]["error"]["code"] == "deadline_exceeded"
    assert flows_counted(server)["majority", "deadline_exceeded"] == 2
    asyncio.run(settled(server.service.engine))


def test_the_servers_own_time_limit_is_a_flows_too(home: Path) -> None:
    with running(home_engine(home), request_timeout_s=0.3) as hasty:
        assert play(hasty, "majority", **LONG, deadline_s=60).status_code == 504


def test_an_answer_that_fits_no_contract_is_422(server: Running) -> None:
    settings = {**BODIES["agent"]["settings"], "act_tokens": 3}
    response = play(server, "agent", settings=settings)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_output"
    assert [step["action"] for step in response.json()["result"]["steps"]] == ["unusable", "unusable"]


def test_a_conversation_that_is_too_long_is_refused_before_anything_is_done(server: Running) -> None:
    turn = {"role": "user", "content": "far too long " * 400}
    response = play(server, "best-of-n", messages=[turn])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_flow_of_many_answers_does_not_fill_the_queue(home: Path) -> None:
    with running(home_engine(home, max_queued_requests=18, max_running_sequences=4)) as server:
        settings = {"n": 64, "params": {"max_tokens": 4, "temperature": 1.0}}
        response = play(server, "majority", settings=settings)
    assert response.status_code == 200
    assert len(response.json()["candidates"]) == 64


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_flow_and_frees_its_kv(server: Running, stream: bool) -> None:
    engine = server.service.engine
    before = flows_counted(server).get(("majority", "left"), 0)

    async def leave() -> None:
        body = {"messages": MESSAGES, **LONG, "stream": stream}
        async with httpx.AsyncClient(base_url=server.url) as client:
            asking = asyncio.create_task(client.post("/v1/flows/majority", json=body))
            while (await engine.stats()).running < 8:
                assert not asking.done()
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    asyncio.run(settled(engine))
    assert not [node for node in asyncio.run(engine.cache_nodes(limit=10_000)) if node.held]
    started = time.monotonic()
    while flows_counted(server).get(("majority", "left"), 0) != before + 1:
        assert time.monotonic() - started < 20, "the flow goes on without its client"
        time.sleep(0.02)
    assert play(server, "guarded").status_code == 200


def test_a_client_that_leaves_amid_the_events_ends_its_flow(server: Running) -> None:
    engine = server.service.engine

    async def leave() -> None:
        body = {"messages": MESSAGES, **LONG, "stream": True}
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("POST", "/v1/flows/majority", json=body) as response,
        ):
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if '"kind":"text"' in line:
                    return

    asyncio.run(leave())
    asyncio.run(settled(engine))
    assert not [node for node in asyncio.run(engine.cache_nodes(limit=10_000)) if node.held]


def test_a_fault_of_ours_shows_no_trace(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("secret detail")

    monkeypatch.setattr("midstream.server.flow_bodies.guarded", fail)
    for stream in (False, True):
        response = play(server, "guarded", stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
    assert flows_counted(server)["guarded", "internal_error"] == 2


# ---------------------------------------------------------------------- whose they are


def test_flows_need_the_key_and_keep_to_its_scope(home: Path) -> None:
    with running(home_engine(home), api_keys=["one", "two"], isolate_cache=True) as kept:
        refused = kept.client.post("/v1/flows/guarded", json={}, headers={"Authorization": "Bearer three"})
        assert refused.status_code == 401
        assert kept.client.get("/v1/flows", headers={"Authorization": "none"}).status_code == 401
        cached = []
        for key in ("one", "two", "two"):
            body = {"messages": MESSAGES, "seed": 3, **BODIES["guarded"]}
            response = kept.client.post("/v1/flows/guarded", json=body, headers={"Authorization": f"Bearer {key}"})
            cached.append(response.json()["usage"]["cached_tokens"])
        assert cached[0] == cached[1] < cached[2]


def test_its_calls_are_counted_as_requests_are(server: Running) -> None:
    def generated() -> float:
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        (total,) = [s.value for f in families for s in f.samples if s.name == "vllm:generation_tokens_total"]
        return total

    before = generated()
    result = play(server, "guarded").json()
    assert generated() - before == result["usage"]["completion_tokens"]
