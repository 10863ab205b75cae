"""The command line on a tiny model folder, in process; exit status and standard error as a program sees them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import run_main
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import save_tiny_tokenizer, tiny_chat

LABELS = 'model: null\nresponse_format: \'{"type": "string", "enum": ["yes", "no"]}\'\ntransformations: null\n'
CHAT = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    "documents": [{"doc_id": "d", "title": "T", "text": "passage"}],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    model = tiny_llama()
    model.save_pretrained(root / "tiny")
    save_tiny_tokenizer(root / "tiny")
    for i, name in enumerate(("guard", "check")):
        invocation = tiny_chat().encode(f"<|im_start|>{name}\n")
        folder = make_adapter_folder(model, root / "adapters" / name, targets=SEVEN, invocation=invocation, seed=i)
        (folder / "io.yaml").write_text(LABELS)
    (root / "chat.json").write_text(json.dumps(CHAT))
    return root


class Cli:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._monkeypatch, self._capsys = home, monkeypatch, capsys

    def __call__(self, *words: str, status: int = 0, stdin: str = "") -> tuple[str, str]:
        self._monkeypatch.setattr(sys, "argv", ["midstream", *words])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return run_main(self._capsys, status)

    @property
    def model(self) -> tuple[str, ...]:
        return ("--model", str(self.home / "tiny"), "--adapters", str(self.home / "adapters"))


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(home, monkeypatch, capsys)


def test_call_prints_the_contract_in_the_order_asked(cli: Cli) -> None:
    out, _ = cli("call", "check", "guard", "--chat", str(cli.home / "chat.json"), *cli.model, "--json")
    results = json.loads(out)
    assert [result["intrinsic"] for result in results] == ["check", "guard"]
    for result in results:
        assert list(result) == ["intrinsic", "result", "probabilities", "usage", "activation_index", "seconds"]
        assert result["result"] in ("yes", "no")
        assert list(result["usage"]) == [
            "prompt_tokens",
            "cached_tokens",
            "computed_tokens",
            "completion_tokens",
            "forwards",
        ]
    usage = [result["usage"] for result in results]
    assert sum(u["computed_tokens"] for u in usage) < usage[0]["prompt_tokens"] + 20, "the prefix is computed once"
    out, _ = cli("call", "check", "--chat", "-", *cli.model, stdin=json.dumps(CHAT))
    assert "check" in out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "x"}], "extra": 1}', "extra"),
    ],
)
def test_a_bad_chat_file_is_one_line_and_status_2(cli: Cli, content: str, reason: str) -> None:
    out, err = cli("call", "check", "--chat", "-", *cli.model, "--json", status=2, stdin=content)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("midstream: ")
    assert reason in err


def test_one_intrinsic_that_fails_leaves_the_others_their_results(cli: Cli) -> None:
    chat = ("--chat", str(cli.home / "chat.json"))
    out, err = cli("call", "nobody", "check", *chat, *cli.model, "--json", status=2)
    failed, good = json.loads(out)
    assert failed == {
        "intrinsic": "nobody",
        "error": {"code": "adapter_not_found", "message": failed["error"]["message"]},
    }
    assert good["result"] in ("yes", "no")
    assert err.count("\n") == 1


def test_unknown_names_are_bad_input(cli: Cli) -> None:
    _, err = cli("call", "nobody", "--chat", str(cli.home / "chat.json"), *cli.model, status=2)
    assert "loaded: check, guard" in err
    _, err = cli("complete", "x", "--model", str(cli.home / "adapters"), status=2)
    assert "config.json" in err
    _, err = cli("models", "fetch", "nothing", status=2)
    assert "smollm2-135m-instruct" in err
    _, err = cli("complete", *cli.model, status=2)
    assert "one of the two" in err


def test_complete_streams_text_or_prints_json(cli: Cli) -> None:
    out, _ = cli("complete", "abc", *cli.model, "--max-tokens", "6", "--json")
    whole = json.loads(out)
    assert whole["usage"]["prompt_tokens"] == 3
    out, _ = cli("complete", "--chat", str(cli.home / "chat.json"), *cli.model, "--choice", "yes", "--choice", "no")
    assert out.strip() in ("yes", "no")
    out, _ = cli("complete", "abc", *cli.model, "--regex", "[0-9]{3}")
    assert out.strip().isdigit()
    _, err = cli("complete", "abc", *cli.model, "--max-tokens", "0", status=2)
    assert "max_tokens" in err


def test_adapters_are_listed_shown_and_checked(cli: Cli, tmp_path: Path) -> None:
    out, _ = cli("adapters", "list", *cli.model, "--json")
    assert [row["name"] for row in json.loads(out)] == ["check", "guard"]
    out, _ = cli("adapters", "show", "guard", *cli.model, "--json")
    assert json.loads(out)["invocation_tokens"] == list(tiny_chat().encode("<|im_start|>guard\n"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true, "r": 4, "lora_alpha": 4}')
    out, err = cli("adapters", "check", str(tmp_path), "--model", str(cli.home / "tiny"), "--json", status=2)
    (entry,) = json.loads(out)
    assert not entry["ok"]
    assert any("use_dora" in violation for violation in entry["violations"])
    assert any("missing" in violation for violation in entry["violations"])
    assert "1 of 1" in err


def test_models_are_listed(cli: Cli) -> None:
    out, _ = cli("models", "list", "--json")
    assert json.loads(out)[0]["name"] == "smollm2-135m-instruct"
    out, _ = cli("models", "list")
    assert "Apache-2.0" in out


def test_chat_talks_calls_branches_and_survives_mistakes(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a passage")
    script = f"/docs {tmp_path / 'd.txt'}\nhello\n/guard\n/nobody\n/branch\nagain\n/all\n/quit\n"
    out, err = cli("chat", *cli.model, "--max-tokens", "4", stdin=script)
    assert "1 passages go with your next turn" in out
    assert out.count("guard: ") == 2
    assert "no adapter 'nobody'" in err
    assert "tokens reused" in err


def test_train_writes_a_folder_that_can_be_called(cli: Cli, tmp_path: Path) -> None:
    rows = [{"text": f"word {i % 7} {'bad' if i % 2 else 'good'}", "label": i % 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = ("train", "--task", "jailbreak", "--data", str(tmp_path / "rows.jsonl"), "--model", str(cli.home / "tiny"))
    options = ("--rank", "2", "--epochs", "1", "--kv-disk", "0", "--run-folder", str(tmp_path / "run"), "--json")
    out, _ = cli(*train, "--out", str(tmp_path / "mine"), *options)
    assert json.loads(out)["rows"] == 24
    assert repr(json.loads(out)["invocation"]).replace("|", "\\|") in (tmp_path / "mine" / "README.md").read_text()
    measure = ("eval", str(tmp_path / "mine"), "--data", str(tmp_path / "rows.jsonl"), *train[-2:])
    out, _ = cli(*measure, "--json", "--png", str(tmp_path / "curves.png"), "--card", "Here")
    report = json.loads(out)
    assert report["n"] == 24
    assert {"base", "base_constrained", "alora", "tfidf"} == set(report["arms"])
    assert (tmp_path / "curves.png").is_file()
    assert "### Here" in (tmp_path / "mine" / "README.md").read_text()
    out, _ = cli(*measure, "--max-rows", "6")
    assert "jailbreak, 6 rows" in out
    where = ("--model", str(cli.home / "tiny"), "--adapters", str(tmp_path / "mine"))
    out, _ = cli("call", "mine", "--chat", str(cli.home / "chat.json"), *where, "--json")
    assert json.loads(out)[0]["result"] in ("yes", "no")
    (tmp_path / "rows.jsonl").write_text("{}")
    _, err = cli(*train, "--out", str(tmp_path / "x"), *options, status=2)
    assert "line 1" in err
    _, err = cli("eval", "nobody", *measure[2:], status=2)
    assert "no adapter 'nobody'" in err


def test_sample_asks_the_base_model_and_goes_on_where_it_stopped(cli: Cli, tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "source": "s", "question": "is it?", "choices": ["no", "yes"], "gold": 1} for i in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("sample", "--data", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "rows.jsonl"))
    options = ("--answers", "3", "--model", str(cli.home / "tiny"))
    cli(*command, *options, "--max-rows", "2")
    first = (tmp_path / "rows.jsonl").read_text()
    assert first.count("\n") == 2
    cli(*command, *options)
    whole = (tmp_path / "rows.jsonl").read_text()
    assert whole.startswith(first)
    assert sorted(json.loads(line)["id"] for line in whole.splitlines()) == [f"q{i}" for i in range(5)]


def test_sample_draws_a_row_an_answer_and_redraws_a_question_that_was_torn(cli: Cli, tmp_path: Path) -> None:
    rows = [{"id": f"q#{i}", "source": "s", "question": f"who {i}?", "answers": ["A"]} for i in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "rows.jsonl"
    files = ("--data", str(tmp_path / "questions.jsonl"), "--out", str(out))
    command = ("sample", *files, "--answers", "3", "--each", "2")
    # In bfloat16 a sample can depend on what else was in the batch.
    options = ("--model", str(cli.home / "tiny"), "--dtype", "float32")
    cli(*command, *options)
    whole = out.read_text()
    assert len({json.loads(line)["id"] for line in whole.splitlines()}) == 6
    out.write_text("".join(whole.splitlines(keepends=True)[:3]))
    cli(*command, *options)
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    assert "--each 4" in cli(*command[:-1], "4", status=2)[1]


def test_the_installed_command_has_help_and_status_2_for_unknown_words() -> None:
    command = [sys.executable, "-m", "midstream.cli.main"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for verb in ("demo", "chat", "complete", "call", "train", "eval", "sample", "adapters", "models"):
        assert verb in shown.stdout
    wrong = subprocess.run([*command, "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "nonsense" in wrong.stderr
