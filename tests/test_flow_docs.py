"""docs/flows.md: its tables are those of the settings, and all that it shows is run as it stands."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from midstream.cli.main import main
from midstream.config import ServerConfig
from midstream.engine.engine import AsyncEngine
from midstream.flows import (
    AgentSettings,
    BestOfNSettings,
    GuardSettings,
    MajoritySettings,
    RagSettings,
    RepairSettings,
    WeightedMajoritySettings,
)
from midstream.flows.events import EventKind
from midstream.server.flow_bodies import BODIES
from midstream.server.folders import load_adapters
from midstream.types import SamplingParams
from tests.server.running import Running, running

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "flows.md").read_text(encoding="utf-8")
SETTINGS: tuple[type[BaseModel], ...] = (
    RagSettings,
    BestOfNSettings,
    MajoritySettings,
    WeightedMajoritySettings,
    RepairSettings,
    GuardSettings,
    AgentSettings,
    SamplingParams,
)
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S) for kind in ("sh", "python")}
COMMANDS = [line for block in BLOCKS["sh"] for line in block.splitlines() if line.startswith("midstream flow")]
CURLS = [block for block in BLOCKS["sh"] if block.startswith("curl")]
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
_SHOWN = 60


# ---------------------------------------------------------------------- tables


def type_text(schema: dict[str, Any]) -> str:
    """A setting's type in words."""
    if "anyOf" in schema:
        return " or ".join(map(type_text, schema["anyOf"]))
    if "oneOf" in schema:
        return "object"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "$ref" in schema or "allOf" in schema:
        return "params"
    if schema["type"] == "array":
        return f"list of {type_text(schema['items'])}s"
    if schema["type"] == "object":
        return f"{type_text(schema['additionalProperties'])} by name"
    bounds = [f"{word} {_number(schema[key])}" for key, word in _BOUNDS if key in schema]
    return " ".join([_NAMES[schema["type"]], *bounds])


def default_text(value: Any) -> str:
    """A setting's default as JSON; of parameters, those that are not the default themselves."""
    if isinstance(value, SamplingParams):
        value = value.model_dump(exclude_defaults=True) | {"max_tokens": value.max_tokens}
    shown = json.dumps(value)
    return f"`{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}`"


def rows(kind: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Name, type and default of each setting."""
    schemas = kind.model_json_schema()["properties"]
    return [
        (f"`{name}`", type_text(schemas[name]), default_text(field.default))
        for name, field in kind.model_fields.items()
    ]


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_table_has_all_settings_with_their_types_and_defaults(kind: type[BaseModel]) -> None:
    (table,) = re.findall(rf"<!-- {kind.__name__} -->\n(.*?)\n<!-- /{kind.__name__} -->", TEXT, re.S)
    head, rule, *lines = table.splitlines()
    assert (head, rule) == ("| setting | type | default | what |", "|---|---|---|---|")
    found = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert [cells[:3] for cells in found] == rows(kind)
    assert all(len(cells) == 4 and cells[3] for cells in found), "what each is for"


def test_every_flow_and_event_is_described() -> None:
    events = TEXT[TEXT.index("## Events") : TEXT.index("## Every result")]
    assert re.findall(r"^\| `(\w+)`", events, re.M) == list(get_args(EventKind))
    fields = TEXT[TEXT.index("| field |") : TEXT.index("The votes are")]
    named = set(re.findall(r"^\| `(\w+)`", fields, re.M))
    assert named == {name for body in BODIES for name in body.model_fields}
    for body in BODIES:
        assert body.flow in TEXT


# ---------------------------------------------------------------------- examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shown")
    (root / "docs").mkdir()
    (root / "docs" / "museum.md").write_text(
        "# Museum\n\nThe city museum was founded in 1892 by Anna Berg, a painter.\n"
    )
    return root


@pytest.fixture(scope="module")
def library() -> Iterator[Running]:
    engine = AsyncEngine.load(dtype="float32")
    asyncio.run(load_adapters(engine, ServerConfig()))
    with running(engine) as server:
        yield server


def test_every_command_works(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {shlex.split(command)[2] for command in COMMANDS} == {
        "rag",
        "best-of-n",
        "majority",
        "repair",
        "guarded",
        "agent",
    }
    monkeypatch.chdir(folder)
    printed = [_run(command, monkeypatch, capsys) for command in COMMANDS]
    assert "Anna Berg" in printed[0]
    assert (folder / "curve.png").is_file()
    assert "7" in printed[2]
    assert json.loads(printed[4])["outcome"] == "refused"
    assert printed[5] == printed[6], "a replay answers the same"


def _run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    return out


@pytest.mark.parametrize("number", range(len(CURLS)))
def test_a_request_works(library: Running, number: int) -> None:
    command = CURLS[number].replace("localhost:8000", library.url.removeprefix("http://"))
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    if '"stream": true' in command:
        *_, end, done, _ = shown.split("\n\n")
        assert done == "data: [DONE]"
        shown = json.dumps(json.loads(end.removeprefix("data: "))["result"])
    result = json.loads(shown)
    assert result["error"] is None
    assert re.search("Anna Berg|nine", result["answer"])


def test_the_programs_run(library: Running) -> None:
    for program in BLOCKS["python"]:
        code = program.replace("http://localhost:8000", library.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
