"""Flows on the command line: over a tiny model, and over a server with the same weights."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from midstream.cli.main import main
from tests.flows.home import check_alike, home_engine, write_home
from tests.server.running import Running, running

QUESTION = "When does the museum open?"
SHORT = ("--max-tokens", "12")
# The words of each verb, and the body that asks a server for the same.
VERBS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "rag": (SHORT, "rag", {"settings": {"params": {"max_tokens": 12}}}),
    "best-of-n": (
        (*SHORT, "-n", "3", "--weight", "certainty=0.5", "--requirement", "Be short."),
        "best-of-n",
        {
            "settings": {
                "n": 3,
                "weights": {"certainty": 0.5, "requirement_check": 1},
                "requirement": "Be short.",
                "params": {"max_tokens": 12, "temperature": 0.8},
            }
        },
    ),
    "majority": (
        (*SHORT, "--answers", "4", "--extract", "(.)"),
        "majority",
        {"settings": {"n": 4, "extract": "(.)", "params": {"max_tokens": 12, "temperature": 0.8}}},
    ),
    "weighted": (
        (*SHORT, "--answers", "3", "--weight", "certainty=1"),
        "weighted-majority",
        {"settings": {"n": 3, "weights": {"certainty": 1}, "params": {"max_tokens": 12, "temperature": 0.8}}},
    ),
    "repair": (
        (*SHORT, "--requirement", "Be short.", "--requirement", "Be kind.", "--attempts", "2"),
        "repair",
        {"requirements": ["Be short.", "Be kind."], "settings": {"attempts": 2, "params": {"max_tokens": 12}}},
    ),
    "guarded": (
        (*SHORT, "--requirement", "Be short.", "--flag", "--eager"),
        "guarded",
        {"requirements": ["Be short."], "settings": {"unmet": "flag", "eager": True, "params": {"max_tokens": 12}}},
    ),
    "agent": (
        ("--max-steps", "1", "--temperature", "0.8"),
        "agent",
        {"tools": ["calculator"], "settings": {"max_steps": 1, "temperature": 0.8}},
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_home(tmp_path_factory.mktemp("flow"))
    (root / "chat.json").write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}))
    return root


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Running]:
    with running(home_engine(home), docs=home / "docs", api_keys=["key"]) as server:
        yield server


class Cli:
    """`midstream flow` in this process; exit status, standard output and error."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._monkeypatch, self._capsys = home, monkeypatch, capsys
        self.model = ("--model", str(home / "tiny"), "--adapters", str(home / "adapters"), "--dtype", "float32")

    def __call__(self, *words: str, status: int = 0, stdin: str = "") -> tuple[str, str]:
        self._monkeypatch.setattr(sys, "argv", ["midstream", "flow", *words])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self._capsys.readouterr()
        assert (stop.value.code or 0) == status, err
        return out, err

    def result(self, *words: str, status: int = 0) -> dict[str, Any]:
        out, _ = self(*words, "--json", status=status)
        return json.loads(out)

    def words(self, verb: str) -> tuple[str, ...]:
        docs = ("--docs", str(self.home / "docs")) if verb == "rag" else ()
        return ("majority" if verb == "weighted" else verb, QUESTION, *VERBS[verb][0], *docs, "--seed", "3")


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(home, monkeypatch, capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_a_flow_gives_the_same_here_at_a_server_and_in_it(
    cli: Cli, server: Running, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    here = cli.result(*cli.words(verb), *cli.model)
    assert here["seed"] == 3
    assert here["calls"]
    monkeypatch.setenv("MIDSTREAM_API_KEY", "key")
    there = cli.result(*cli.words(verb), "--backend", server.url)
    check_alike(there, here)
    _, flow, body = VERBS[verb]
    messages = [{"role": "user", "content": QUESTION}]
    response = server.client.post(f"/v1/flows/{flow}", json={"messages": messages, "seed": 3, **body})
    assert response.status_code == 200
    check_alike(response.json(), here)


def test_without_the_key_the_server_refuses_and_that_is_the_result(cli: Cli, server: Running) -> None:
    out, err = cli(*cli.words("guarded"), "--backend", server.url, "--json", status=1)
    assert json.loads(out)["error"]["code"] == "invalid_api_key"
    assert err.startswith("midstream: ")
    assert err.count("\n") == 1


# ---------------------------------------------------------------------- what is seen


def test_the_answer_is_on_standard_output_and_what_led_to_it_on_standard_error(cli: Cli) -> None:
    for verb in ("rag", "best-of-n", "majority", "repair", "guarded"):
        out, err = cli(*cli.words(verb), *cli.model)
        result = cli.result(*cli.words(verb), *cli.model)
        answer = result["answer"] if verb in ("rag", "guarded") else result["text"]
        assert out == f"{answer}\n" if answer else out == ""
        assert err.splitlines()[-1].endswith("seed 3")
        for decision in result["decisions"]:
            assert f"{decision['step']}: {decision['outcome']} (" in err
    _, err = cli(*cli.words("best-of-n"), *cli.model)
    assert err.count("draw ") == 3
    assert "requirement_check" in err
    _, err = cli(*cli.words("repair"), *cli.model)
    assert "of 2 requirements met" in err
    assert "draw 0: " in err


def test_an_agents_thoughts_and_observations_are_seen(cli: Cli) -> None:
    words = ("agent", QUESTION, "--docs", str(cli.home / "docs"), "--max-steps", "2", "--seed", "3")
    out, err = cli(*words, *cli.model, status=1)
    assert out == ""
    assert "1.think: " in err
    assert "1.act: " in err
    assert err.splitlines()[-1].startswith("midstream: the agent's last step gave no whole answer")


def test_a_chat_file_goes_on(cli: Cli) -> None:
    chat = str(cli.home / "chat.json")
    alone = cli.result("guarded", "--chat", chat, *SHORT, "--seed", "3", *cli.model)
    check_alike(alone, cli.result("guarded", QUESTION, *SHORT, "--seed", "3", *cli.model))
    piped, _ = cli("guarded", "-c", "-", *SHORT, "--seed", "3", *cli.model, "--json", stdin=Path(chat).read_text())
    check_alike(json.loads(piped), alone)
    turns = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    more, _ = cli("guarded", "three", "-c", "-", *SHORT, *cli.model, "--json", stdin=json.dumps(turns))
    assert json.loads(more)["outcome"] in ("answered", "refused")


def test_quality_is_plotted_against_tokens(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'midstream[eval]'")
    plot = tmp_path / "curve.png"
    cli.result(*cli.words("best-of-n"), *cli.model, "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_how_to_get_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("midstream.cli.flow.plot.find_spec", lambda _: None)
    _, err = cli(*cli.words("best-of-n"), *cli.model, "--plot", str(tmp_path / "curve.png"), status=2)
    assert "pip install 'midstream[eval]'" in err


# ---------------------------------------------------------------------- traces


def test_a_traced_agent_is_replayed_without_a_model(cli: Cli, tmp_path: Path) -> None:
    trace = str(tmp_path / "trace.json")
    words = ("agent", QUESTION, "--docs", str(cli.home / "docs"), "--max-steps", "2", "--budget", "4000")
    played = cli.result(*words, *cli.model, "--trace", trace, status=1)
    replayed = cli.result("agent", "--replay", trace, status=1)
    assert {**replayed, "seconds": 0, "steps": []} == {**played, "seconds": 0, "steps": []}
    for again, first in zip(replayed["steps"], played["steps"], strict=True):
        assert {**again, "seconds": 0} == {**first, "seconds": 0}
    _, err = cli("agent", "another question", "--replay", trace, status=2)
    assert "leave the prompt" in err
    (tmp_path / "other.json").write_text("{}")
    _, err = cli("agent", "--replay", str(tmp_path / "other.json"), status=2)
    assert "no trace" in err
    shown = json.loads(Path(trace).read_text())
    (tmp_path / "python.json").write_text(json.dumps({**shown, "settings": {}}))
    _, err = cli("agent", "--replay", str(tmp_path / "python.json"), status=2)
    assert "was not written by" in err


# ---------------------------------------------------------------------- stopped and refused


def test_what_stops_a_flow_is_told_after_what_there_is(cli: Cli) -> None:
    long = ("--max-tokens", "1500", "--seed", "3", *cli.model)
    budget = cli.result(
        "repair", QUESTION, "-r", "Be short.", "--max-tokens", "9", *cli.model, "--budget", "9", status=1
    )
    assert budget["error"]["code"] == "budget_exceeded"
    assert budget["attempts"][0]["text"]
    late = cli.result("majority", QUESTION, *long, "--deadline", "0.2", status=1)
    assert late["error"]["code"] == "deadline_exceeded"
    missing = cli.result("guarded", QUESTION, "--model", str(cli.home / "tiny"), status=2)
    assert missing["error"]["code"] == "adapter_not_found"
    out, err = cli("guarded", QUESTION, "--model", str(cli.home / "tiny"), status=2)
    assert out == ""
    assert "no adapter 'jailbreak'" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("repair", QUESTION), "at least one requirement"),
        (("guarded",), "give a prompt, or --chat, or both"),
        (("best-of-n", QUESTION, "--weight", "certainty"), "write NAME=VALUE"),
        (("best-of-n", QUESTION, "--weight", "certainty=x"), "no number"),
        (("best-of-n", QUESTION, "--weight", "certainty=-1"), "not negative"),
        (("best-of-n", QUESTION, "--weight", "beauty=1"), "no scorer 'beauty'"),
        (("best-of-n", QUESTION, "--plot", "nowhere/x.png"), "--plot"),
        (("best-of-n", QUESTION, "--plot", "x.pdf"), ".png"),
        (("majority", QUESTION, "--extract", "("), "no regular expression"),
        (("repair", QUESTION, "-r", "x", "--resample"), "temperature"),
        (("agent", QUESTION, "--trace", "nowhere/x.json"), "--trace"),
        (("agent", QUESTION, "--docs", "nowhere"), "nowhere"),
        (("guarded", QUESTION, "--backend", "http://127.0.0.1:1", "--adapters", "x"), "the server has its own"),
        (("guarded", QUESTION, "--seed", "-1"), "seed"),
        (("guarded", QUESTION, "--budget", "0"), "budget"),
    ],
)
def test_wrong_words_are_status_2_and_one_line(cli: Cli, words: tuple[str, ...], reason: str) -> None:
    model = () if "--backend" in words else cli.model
    _, err = cli(*words, *model, status=2)
    assert reason in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("midstream: ")


def test_a_server_that_is_not_there_is_status_1(cli: Cli) -> None:
    failed = cli.result(*cli.words("guarded"), "--backend", "http://127.0.0.1:1", status=1)
    assert failed["error"]["code"] == "backend_error"


# ---------------------------------------------------------------------- Control-C


# Where SIGINT is ignored, as in a shell's background jobs, Python leaves it so, and what it starts does too.
_HEED = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from midstream.cli.main import main; main()"
)


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """`midstream flow` as a process of its own."""
    command = [sys.executable, "-c", _HEED, "flow", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MIDSTREAM_API_KEY": "key"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_control_c_prints_what_there_is_and_leaves_nothing_at_the_server(home: Path, server: Running) -> None:
    words = ("majority", QUESTION, "--max-tokens", "900", "-n", "32", "--temperature", "2", "--seed", "3", "--json")
    with started(*words, "--backend", server.url) as process:
        while asyncio.run(server.service.engine.stats()).running < 4:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["error"] == {"code": "cancelled", "message": "the flow was cancelled"}
    assert len(result["candidates"]) == 32
    assert any(each["finish_reason"] is None for each in result["candidates"])
    assert "Traceback" not in err


def test_control_c_ends_a_model_in_this_process(home: Path) -> None:
    model = ("--model", str(home / "tiny"), "--adapters", str(home / "adapters"))
    words = ("majority", QUESTION, "--max-tokens", "1800", "-n", "64", "--temperature", "2", "--seed", "3")
    with started(*words, *model) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("draw "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "seed 3" in err.splitlines()[-1]
    assert "Traceback" not in err


# ---------------------------------------------------------------------- what is imported


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "midstream.cli.main", "flow", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(verb in shown.stdout for verb in ("rag", "best-of-n", "majority", "repair", "guarded", "agent"))
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "bm25s", "midstream.flows", "midstream.remote", "matplotlib"}
