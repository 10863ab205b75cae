"""The race of activated and plain LoRA: who plays when, how many at once, what is told; how a server is asked."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.peers_build import Builder
from benchmarks.peers_process import WorkerError
from benchmarks.peers_protocol import Absent
from benchmarks.race_sides import KINDS, Field, ServedSide, Sides, embedded, labels, make_launch, served
from benchmarks.turn_play import Done, Played
from benchmarks.turn_script import INTRINSICS, Call, Script
from benchmarks.turn_sides import Answer, Side, plain_copies

from benchmarks import race
from tests.benchmarks.rag_home import make_home
from tests.tiny import tiny_chat

CALLS = len(INTRINSICS) + 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("race"))


def options(home: Path, **given: Any) -> argparse.Namespace:
    found = race.parser().parse_args(["--data", str(home), "--conversations", "2", "--turns", "2"])
    return argparse.Namespace(**{**vars(found), "answer_tokens": 5, "dtype": "float32", **given})


@pytest.fixture(scope="module")
def field(home: Path) -> Field:
    own = {name: home / name for name in INTRINSICS}
    return Field(
        model=home / "model",
        chat=tiny_chat(),
        folders={"alora": own, "lora": plain_copies(own, home)},
        scripts=race.choose(tiny_chat(), own, options(home)),
        dtype="float32",
        kv_mib=8,
        builder=Builder(install=False, root=home / "nothing"),
        scratch=home,
    )


class FakeSide:
    """Answers at once, and computes nothing. `short`: with one token too few."""

    def __init__(self, name: str, diary: list[str], *, short: bool = False) -> None:
        self.name = name
        self._diary = diary
        self._short = short
        self.asked: list[Call] = []
        self.most = 0
        self._now = 0

    async def fresh(self) -> None:
        self._diary.append(self.name)

    async def run(self, call: Call) -> Answer:
        self.asked.append(call)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.001)
        self._now -= 1
        return Answer((7,) * (call.tokens - self._short), 0)

    async def kv_bytes(self) -> int:
        raise AssertionError("several conversations share it, so none may ask")


def many(field: Field, count: int) -> list[Script]:
    return [dataclasses.replace(field.scripts[0], id=str(number)) for number in range(count)]


def test_conversations_of_both_splits_are_played_and_too_few_are_told(home: Path, field: Field) -> None:
    assert [script.id for script in field.scripts] == ["tiny-1", "tiny-2"]
    assert {script.lengths.answer for script in field.scripts} == {5}
    with pytest.raises(SystemExit, match="only 2 conversations have 1 turns"):
        race.choose(tiny_chat(), field.folders["alora"], options(home, conversations=3, turns=1))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_conversations_are_under_way_and_kv_is_forgotten_once(field: Field, concurrency: int) -> None:
    diary: list[str] = []
    side = FakeSide("a", diary)
    ran = asyncio.run(race.race(side, many(field, 5), concurrency))
    assert diary == ["a"]
    assert len(ran.played) == 5
    assert len(side.asked) == 5 * 2 * CALLS
    # Three checks at once is the most that one conversation asks.
    assert 3 * (concurrency - 1) < side.most <= 3 * concurrency


def test_a_conversation_goes_on_with_the_sides_own_answers(field: Field) -> None:
    ran = asyncio.run(race.race(FakeSide("a", []), field.scripts[:1], 1))
    assert ran.played[0].answers == [(7,) * 5] * 2
    script = field.scripts[0]
    last = [done.call for done in ran.played[0].calls if done.call.adapter is None][-1]
    first = script.turns[0]
    held = (*first.given, *first.header, *(7,) * 5, *first.closing)
    assert last.prompt == (*held, *script.turns[1].given, *script.turns[1].header)


def test_sides_take_turns_in_blocks_after_a_warm_up(field: Field) -> None:
    diary: list[str] = []
    sides = [FakeSide("a", diary), FakeSide("b", diary)]
    blocks = race.split(many(field, 5), 2)
    with asyncio.Runner() as runner:
        found, failed = race.rounds_of(runner, sides, blocks, 2, 2)
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert diary == ["a", "b"] + ["b", "a", "a", "b"] * 3
    assert not failed
    assert {name: [len(each) for each in rounds] for name, rounds in found.items()} == {"a": [3, 3], "b": [3, 3]}
    # Two conversations of one turn, then five of two turns, twice.
    assert [len(side.asked) for side in sides] == [(2 + 2 * 5 * 2) * CALLS] * 2


def test_a_side_that_answers_otherwise_than_asked_is_left_out(field: Field) -> None:
    diary: list[str] = []
    sides = [FakeSide("a", diary), FakeSide("b", diary, short=True)]
    with asyncio.Runner() as runner:
        found, failed = race.rounds_of(runner, sides, race.split(many(field, 3), 2), 2, 1)
    assert found.keys() == {"a"}
    assert failed.keys() == {"b"}
    assert "b gave" in failed["b"]
    assert diary.count("b") == 1


def opened(sides: Sequence[Side]) -> race.Open:
    @contextmanager
    def start(_: Field, __: asyncio.Runner) -> Iterator[Sides]:
        yield {side.name.split("-")[1]: side for side in sides}

    return start


def compete(
    field: Field, asked: argparse.Namespace, engines: Mapping[str, race.Open]
) -> list[tuple[dict[str, race.Rounds], dict[str, str]]]:
    """What is kept after each engine."""
    kept: list[tuple[dict[str, race.Rounds], dict[str, str]]] = []
    race.compete(field, asked, lambda rounds, absent: kept.append((dict(rounds), dict(absent))), engines)
    return kept


def refused(_: Field, __: asyncio.Runner) -> AbstractContextManager[Sides]:
    raise Absent("no wheel for this machine")


def test_only_the_chosen_sides_run_and_one_that_cannot_be_had_is_told(home: Path, field: Field) -> None:
    diary: list[str] = []
    engines: Mapping[str, race.Open] = {
        "embedded": opened([FakeSide("embedded-alora", diary), FakeSide("embedded-lora", diary)]),
        "vllm": refused,
    }
    asked = options(home, sides=("embedded-lora", "vllm-alora"))
    after_embedded, (rounds, absent) = compete(field, asked, engines)
    assert after_embedded == (rounds, {})
    assert rounds.keys() == {"embedded-lora"}
    assert absent == {"vllm-alora": "no wheel for this machine"}
    assert set(diary) == {"embedded-lora"}
    found = race.report({"embedded-lora": [[ran(1.0)]]}, absent)
    assert found["absent"] == [{"side": "vllm-alora", "reason": "no wheel for this machine"}]
    assert found["ratio"] == {"embedded": None, "vllm": None}
    # Nothing of vLLM's is asked for where none of its sides is.
    ((_, absent),) = compete(field, options(home, sides=("embedded-lora",)), engines)
    assert not absent


def ran(seconds: float, base: tuple[int, int] = (10, 10), adapter: tuple[int, int] = (10, 10)) -> race.Ran:
    """A block of one call of each; each pair is the prompt's length and how many tokens of it were computed."""
    calls = [
        Done(Call(name, (1,) * length, 1), Answer((7,), computed), seconds)
        for name, (length, computed) in ((None, base), ("jailbreak", adapter))
    ]
    return race.Ran(seconds, [Played(calls)])


def test_the_report_tells_ratios_and_hit_rates_apart() -> None:
    rounds = {
        "vllm-alora": [[ran(1.0, (100, 25), (300, 30)), ran(3.0, (100, 25), (100, 10))], [ran(1.0), ran(1.0)]],
        "vllm-lora": [[ran(4.0), ran(4.0)], [ran(5.0), ran(3.0)]],
    }
    found = race.report(rounds, {})
    json.dumps(found)
    assert found["ratio"]["embedded"] is None
    assert found["ratio"]["vllm"]["median"] == 3.0  # 8 s over 4 s, and 8 s over 2 s
    assert found["ratio"]["vllm"]["blocks"] == [[4.0, 4 / 3], [5.0, 3.0]]
    side = found["sides"]["vllm-alora"]
    assert side["s"] == 3.0
    assert side["raw_s"] == [[1.0, 3.0], [1.0, 1.0]]
    assert side["prompt_tokens"] == {"base": 220, "adapters": 420}
    assert side["hit_rate"] == {
        "base": pytest.approx(150 / 220),
        "adapters": pytest.approx(360 / 420),
        "all": pytest.approx(510 / 640),
    }
    assert side["waits_s"].keys() == {"answer", "jailbreak"}
    assert found["sides"]["vllm-lora"]["hit_rate"]["all"] == 0.0


def test_the_embedded_sides_ask_the_same_and_only_aloras_find_the_base_models_kv(home: Path, field: Field) -> None:
    asked = options(home, sides=("embedded-alora", "embedded-lora"), concurrency=2)
    ((rounds, absent),) = compete(field, asked, {"embedded": embedded})
    assert not absent
    found = {**race.report(rounds, absent), **race.settings(field, asked)}
    json.dumps(found)
    alora, lora = (found["sides"][f"embedded-{kind}"] for kind in KINDS)
    assert alora["prompt_tokens"] == lora["prompt_tokens"]
    assert alora["calls"] == lora["calls"] == 2 * 2 * CALLS
    assert alora["hit_rate"]["adapters"] > lora["hit_rate"]["adapters"] > 0
    assert alora["hit_rate"]["base"] > lora["hit_rate"]["base"] > 0
    assert [each["id"] for each in found["conversations"]] == ["tiny-1", "tiny-2"]


# ---------------------------------------------------------------------- vLLM's side


class Server:
    """A server that answers what it is told to, and keeps what it was asked."""

    def __init__(self, **reply: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._status = reply.pop("status", 200)
        self._reply = reply

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, json.loads(request.content)))
        return httpx.Response(self._status, json=self._reply)


def completion(tokens: list[int], prompt: int, cached: int | None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": prompt, "prompt_tokens_details": details}
    return {"choices": [{"token_ids": tokens}], "usage": usage}


def ask(server: Server, *calls: Call) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://vllm") as client:
            side = ServedSide("vllm-lora", client, {"jailbreak": "jailbreak-lora"}, labels(tiny_chat()))
            await side.fresh()
            return [await side.run(call) for call in calls]

    return asyncio.run(all_of_them())


def test_a_label_is_one_decoded_token_behind_what_its_options_share() -> None:
    yes, no = (tiny_chat().encode(text) for text in ('"yes"', '"no"'))
    server = Server(success=True, **completion([no[1]], 4, 2))
    (answer,) = ask(server, Call("jailbreak", (1, 2, 3), 1, ('"yes"', '"no"')))
    assert yes[0] == no[0]
    (reset, _), (path, body) = server.asked
    assert (reset, path) == ("/reset_prefix_cache", "/v1/completions")
    assert body["model"] == "jailbreak-lora"
    assert body["prompt"] == [1, 2, 3, yes[0]]
    assert body["max_tokens"] == 1
    assert body["allowed_token_ids"] == [yes[1], no[1]]
    # The opening is no token of the prompt.
    assert answer == Answer((no[1],), 1)


def test_a_base_answer_has_exactly_so_many_tokens_and_may_find_nothing() -> None:
    server = Server(success=True, **completion([7, 8], 3, None))
    (answer,) = ask(server, Call(None, (1, 2, 3), 2))
    body = server.asked[-1][1]
    assert body["model"] == "base"
    assert body["max_tokens"] == 2
    assert body["ignore_eos"] is True
    assert "allowed_token_ids" not in body
    assert answer == Answer((7, 8), 3)


def test_a_server_that_refuses_or_does_not_forget_fails_with_its_words() -> None:
    with pytest.raises(WorkerError, match=r"vllm-lora, reset_prefix_cache: 400 .*no such thing"):
        ask(Server(status=400, error="no such thing"))
    with pytest.raises(WorkerError, match="did not forget"):
        ask(Server(success=False))


def test_vllm_that_is_not_installed_is_told_and_nothing_is_started(home: Path, field: Field) -> None:
    asked = options(home, sides=("vllm-alora", "vllm-lora"))
    ((rounds, absent),) = compete(field, asked, {"vllm": served})
    assert not rounds
    assert absent.keys() == {"vllm-alora", "vllm-lora"}
    assert all("is not installed" in reason for reason in absent.values())


def test_one_server_has_the_adapters_of_both_kinds(field: Field, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / ".installed").touch()
    launch, config = make_launch(dataclasses.replace(field, builder=Builder(install=False, root=tmp_path)))
    kinds = {info.name: info.kind for info in launch.adapters}
    assert kinds == {f"{name}-{kind}": kind for name in INTRINSICS for kind in KINDS}
    command = launch.command(config)
    assert command[command.index("--max-loras") + 1] == "12"
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(8 * 2**20)
