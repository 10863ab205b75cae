"""`midstream bench` on a tiny model: outputs, errors before anything is measured, and an early end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from midstream.bench import machine, plot, work
from midstream.errors import MidstreamError
from tests.cli.running import run_main
from tests.helpers import tiny_llama
from tests.tiny import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    tiny_llama().save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


class Bench:
    """The command with the tiny model."""

    def __init__(self, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._tiny, self._monkeypatch, self._capsys = tiny, monkeypatch, capsys

    def __call__(self, *words: str, status: int = 0, model: str | None = None) -> tuple[str, str]:
        given = ["midstream", "bench", "--model", model or str(self._tiny), "--dtype", "float32", *words]
        self._monkeypatch.setattr(sys, "argv", given)
        return run_main(self._capsys, status)


@pytest.fixture
def bench(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    for module in (machine, work):
        monkeypatch.setattr(module, "read_bandwidth", lambda device: 20.0)
    monkeypatch.setattr(machine, "matrix_throughput", lambda dtype, device: 100.0)
    return Bench(tiny, monkeypatch, capsys)


def test_a_table_a_picture_and_all_measurements(bench: Bench, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png"))
    out, err = bench("--contexts", "96,64,4096", "--rounds", "2", "--rank", "4", *files)
    for text in ("tiny, float32", "random weights", "rank 4", "64 tokens", "96 tokens", "share of the bound"):
        assert text in out
    assert "all at 4096 tokens left out" in out
    assert err == "", "no bar where nobody watches"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "b.json").read_text())
    assert [row["context"] for row in found["rows"]] == [64, 96]
    assert found["ended_early"] is None
    for row in found["rows"]:
        raw = row["raw"]
        assert {len(values) for values in raw.values()} == {2}
        ratios = [a / b for a, b in zip(raw["label_lora_s"], raw["label_alora_s"], strict=True)]
        assert row["figures"]["label_ratio"]["median"] == pytest.approx(sum(ratios) / 2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--contexts", "512,many"), "whole numbers"),
        (("--contexts", ""), "whole numbers"),
        (("--contexts", "16"), "at least 32"),
        (("--rounds", "0"), "rounds"),
        (("--rank", "0"), "rank"),
        (("--kv-mib", "0"), "kv-mib"),
        (("--kv", "int4"), "'int4' is not one of 'int8'"),
        (("--json", "nowhere/b.json"), "--json: nowhere/b.json cannot be written"),
        (("--json", "."), "--json: . cannot be written"),
        (("--png", "nowhere/b.png"), "--png: nowhere/b.png cannot be written"),
        (("--png", "b.jpg"), "must end with .png"),
    ],
)
def test_bad_options_are_told_before_a_model_is_loaded(
    bench: Bench, words: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = bench(*words, status=2, model="no-such-model")
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("midstream: ")
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_names_the_extra(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    _, err = bench("--png", str(tmp_path / "b.png"), status=2, model="no-such-model")
    assert "pip install 'midstream[eval]'" in err


def test_trying_an_output_leaves_what_is_there(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        bench("--json", str(tmp_path / name), status=2, model=str(tmp_path))
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--rank", "17"), "rank 17: it is 1 to 16"),
        (("--contexts", "4096,9000"), "no context fits"),
        (("--dtype", "int3"), "unknown dtype"),
        (("--device", "abacus"), "unknown device"),
    ],
)
def test_what_only_the_model_tells_is_told_before_anything_is_measured(
    bench: Bench, words: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    out, err = bench(*words, "--json", str(tmp_path / "b.json"), status=2)
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err
    assert not (tmp_path / "b.json").exists()


def interrupted(*_: object) -> None:
    """As Ctrl-C does it; the signal itself is ignored by what runs in a shell's background."""
    raise KeyboardInterrupt


def test_control_c_keeps_the_rounds_that_were_whole(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work.Work, "decode", interrupted)
    files = ("--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png"))
    out, err = bench("--contexts", "64,96", "--rounds", "2", "--rank", "4", *files, status=130)
    assert "ended early (interrupted)" in out
    assert err == ""
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["ended_early"] == "interrupted"
    (row,) = found["rows"]
    assert len(row["raw"]["label_lora_s"]) == 2
    assert "step_ms" not in row["figures"]
    assert (tmp_path / "b.png").is_file()


def test_a_failure_keeps_them_too(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MidstreamError("the forward failed")

    monkeypatch.setattr(work.Work, "read_streams", fail)
    out, err = bench("--contexts", "64", "--rounds", "1", "--json", str(tmp_path / "b.json"), status=1)
    assert "ended early (failed: the forward failed)" in out
    assert err == "midstream: the forward failed\n"
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["raw"]["label_alora_s"]


def test_an_end_before_the_first_round_writes_no_picture(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work.Work, "calls", interrupted)
    files = ("--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png"))
    out, _ = bench("--contexts", "64", *files, status=130)
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == []
    assert not (tmp_path / "b.png").exists()
    assert "median" not in out
