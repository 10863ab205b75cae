"""The tutorial is run as it stands, on a few of its rows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from midstream.cli.serve import settings_table

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_of_the_tutorial_works_on_a_cut_down_file(tmp_path: Path) -> None:
    for file, count in (("tickets.train.jsonl", 20), ("tickets.test.jsonl", 6)):
        lines = (ROOT / "docs" / "tutorial" / file).read_text(encoding="utf-8").splitlines()
        (tmp_path / file).write_text("\n".join(lines[:count]), encoding="utf-8")
    (tmp_path / "chat.json").write_text((ROOT / "docs" / "tutorial" / "chat.json").read_text())
    commands = [
        shlex.split(line)[1:] for block in re.findall(r"```sh\n(.*?)```", TUTORIAL, re.S) for line in block.splitlines()
    ]
    assert [command[0] for command in commands] == ["train", "eval", "call", "train", "eval"]
    printed = [run([sys.executable, "-m", "midstream.cli.main", *command], tmp_path) for command in commands]
    assert json.loads(printed[0])["invocation"] == "<|im_start|>ticket_queue\n"
    assert "tfidf" in printed[1]
    assert (tmp_path / "ticket_queue.png").is_file()
    assert "### Tickets, new wordings" in (tmp_path / "adapters" / "ticket_queue" / "README.md").read_text()
    assert any(label in printed[2] for label in ("billing", "technical", "account"))
    assert "ticket_queue-lora" in printed[4]
    (example,) = re.findall(r"```python\n(.*?)```", TUTORIAL, re.S)
    assert "'billing'" in run([sys.executable, "-c", example], tmp_path)


def test_the_servers_settings_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- settings -->\n(.*?)\n<!-- /settings -->", text, re.S)
    assert table == settings_table()


def test_the_tutorials_rows_are_as_it_says() -> None:
    files = {name: ROOT / "docs" / "tutorial" / f"tickets.{name}.jsonl" for name in ("train", "test")}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 200, "test": 60}
    texts = {name: {row["messages"][-1]["content"] for row in found} for name, found in rows.items()}
    assert len(texts["train"]) == 200
    assert texts["train"].isdisjoint(texts["test"])
