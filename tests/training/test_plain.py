"""Tasks of the user's own: what targets there are tells what is asked and answered, and odd ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from midstream.errors import DataError, InputError
from midstream.training.data import encode
from midstream.training.plain import described_task, plain_task
from midstream.training.run import DataConfig, load_examples
from midstream.training.tasks import read_rows
from tests.tiny import tiny_chat

TURNS = [{"role": "user", "content": "who?"}]


def write(file: Path, targets: list[Any], **more: Any) -> Path:
    rows = [{"messages": TURNS, "target": target, **more} for target in targets]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


@pytest.mark.parametrize(
    ("targets", "kind", "schema"),
    [
        (["b", "a", "b", "a"], "label", {"type": "string", "enum": ["a", "b"]}),
        ([False, True, False], "label", {"type": "boolean", "enum": [True, False]}),
        ([2, 1, 2, 1], "label", {"type": "integer", "enum": [1, 2]}),
        (["Kündigung", "Störung"] * 2, "label", {"type": "string", "enum": ["Kündigung", "Störung"]}),
        ([{"city": "x"}, {"city": "y"}], "text", {"type": "object"}),
        (["one", "two", "three"], "text", None),
        ([{"a": 1, "b": 2}, {"a": 1, "b": 3}], "text", None),
    ],
)
def test_the_targets_tell_the_kind_of_task(targets: list[Any], kind: str, schema: Any, tmp_path: Path) -> None:
    if len(targets) == 3 and kind == "label":
        targets = [*targets, True]
    file = write(tmp_path / "rows.jsonl", targets)
    task = plain_task("mine", [file])
    assert task.kind == kind
    assert schema is None if task.schema is None else {k: task.schema[k] for k in schema} == schema
    rows, _ = read_rows([file], task)
    for example, target in zip(encode(rows, task, tiny_chat(), "<t>"), targets, strict=True):
        text = tiny_chat().decode(example.target)
        if task.schema is None:
            assert text.endswith("<|im_end|>")
        else:
            assert json.loads(text) == target
    again = described_task("mine", task.schema, None)
    assert (again.kind, again.labels, again.key, again.schema) == (task.kind, task.labels, task.key, task.schema)


def test_a_target_of_another_type_is_named_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ["a", "b", 1, "a", "b", None])
    with pytest.raises(DataError, match=r"line 6: target is null"):
        plain_task("mine", [file])
    write(file, ["a", "b", 1, "a", "b", True])
    with pytest.raises(DataError, match=r"line 3: target 1 is not of type string.*line 6: target True"):
        plain_task("mine", [file])


def test_a_label_that_the_adapter_does_not_have_is_refused_by_line(tmp_path: Path) -> None:
    task = plain_task("mine", [write(tmp_path / "rows.jsonl", ["a", "b"] * 2)])
    with pytest.raises(DataError, match=r"line 2: target 'c' is none of 'a', 'b'"):
        read_rows([write(tmp_path / "other.jsonl", ["a", "c"])], task)


def test_the_positive_label_is_the_users_to_name(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ["ham", "spam"] * 3)
    assert plain_task("mine", [file], positive="spam").labels == ("spam", "ham")
    with pytest.raises(InputError, match="none of the targets 'ham', 'spam'"):
        plain_task("mine", [file], positive="eggs")
    with pytest.raises(InputError, match="texts"):
        plain_task("mine", [write(file, ["x", "y"])], positive="x")


def test_rows_are_made_negative_only_where_it_is_known_what_that_means(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ["no", "yes"] * 3, documents=[{"title": "t", "text": "d"}])
    with pytest.raises(InputError, match="--positive"):
        load_examples(DataConfig((file,), "mine", wrong_documents=1.0), tiny_chat())
    with pytest.raises(InputError, match="--positive"):
        load_examples(DataConfig((file,), "mine", histories=(file,)), tiny_chat())
    with pytest.raises(InputError, match="known task"):
        load_examples(DataConfig((file,), "jailbreak", instruction="x"), tiny_chat())
    ready = load_examples(DataConfig((file,), "mine", histories=(file,), positive="yes"), tiny_chat())
    assert sum(row.target == "no" for row in ready.rows) == 6


def test_the_base_model_is_asked_what_the_instruction_asks(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ["no", "yes"] * 2, arguments={"tone": "dry"})
    task = plain_task("mine", [file], instruction="Is it {tone}?")
    assert task.question == 'Is it {tone}? Reply with "no" or "yes" and nothing else.'
