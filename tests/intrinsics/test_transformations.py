"""Transformations of an answer's JSON as granite-common 0.4.1 makes them, and where it does not."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import pytest

from midstream.errors import OutputError
from midstream.intrinsics import Contract, process_reply
from midstream.intrinsics.transform import Answer, transform
from tests.intrinsics.reference import (
    both_refuse,
    config,
    ours,
    processed,
    processed_by_reference,
    reply_of,
)

SEEDS = range(30)
PATHS: list[list[Any]] = [[], ["rows"], ["rows", None, "inner"]]


def changed(rule: dict[str, Any], value: Any, **fields: Any) -> Any:
    """What both make of a value; it is not what it was."""
    found = processed(config(transformations=[rule], **fields), reply_of(json.dumps(value)))
    assert json.dumps(found) != json.dumps(value)
    return found


def placed(value: Any, path: list[Any]) -> Any:
    """The value at that path of something larger."""
    if not path:
        return value
    if path == ["rows"]:
        return {"title": "t", "rows": value, "last": [1]}
    return {"rows": [{"inner": value, "n": "a"}, {"other": "x", "inner": copy.deepcopy(value)}]}


def scalar(random: Random) -> Any:
    return random.choice([1, -2.5, True, False, "x", "ü y", "", 10**20])


def records(random: Random, **fields: Any) -> list[dict[str, Any]]:
    """Some records with `fields` (made anew for each) among others, in any order."""
    found = []
    for _ in range(random.randint(2, 6)):
        items = [(name, make(random)) for name, make in fields.items()]
        items += [("more", scalar(random)), ("deep", {"k": [scalar(random)]})]
        random.shuffle(items)
        found.append(dict(items))
    return found


# ---------------------------------------------------------------------- each as the reference has it


@pytest.mark.parametrize("seed", SEEDS)
def test_nest(seed: int) -> None:
    random = Random(seed)
    paths: list[list[Any]] = [[], ["a"], ["a", None], [None, 1], ["a", None, "b"], ["c", "d"]]
    path = paths[seed % len(paths)]
    value = {
        "a": [{"b": scalar(random)}, {"b": [scalar(random), {}]}],
        "z": [scalar(random), scalar(random)],
        "c": {"d": {"b": 0}},
    }
    changed({"type": "nest", "input_path": path, "field_name": random.choice(["new", "a", ""])}, value)


@pytest.mark.parametrize("value", [True, 3, -0.5, "text", [], [1], {"a": 1}])
def test_nest_at_the_root(value: Any) -> None:
    assert changed({"type": "nest", "input_path": [], "field_name": "f"}, value) == {"f": value}


@pytest.mark.parametrize("seed", SEEDS)
def test_project(seed: int) -> None:
    random, path = Random(seed), PATHS[seed % 3]
    value: Any = records(random, a=scalar, b=scalar)
    if seed % 2 == 0:
        value = value[0]
    kept: Any = random.choice([["b", "a"], ["missing", "a"], {"a": "b", "b": "a"}, {"deep": "d", "none": "n"}, []])
    changed({"type": "project", "input_path": path, "retained_fields": kept}, placed(value, path))


@pytest.mark.parametrize("seed", SEEDS)
def test_explode(seed: int) -> None:
    random, path = Random(seed), PATHS[seed % 3]
    value = records(random, l=lambda r: [scalar(r) for _ in range(r.randint(0, 3))], a=scalar)
    found = changed({"type": "explode", "input_path": path, "target_field": "l"}, placed(value, path))
    if not path:
        assert len(found) == sum(len(record["l"]) for record in value)


@pytest.mark.parametrize("seed", SEEDS)
def test_drop_duplicates_where_there_are_none(seed: int) -> None:
    """The reference and midstream agree; nothing is to be dropped."""
    random, path = Random(seed), PATHS[seed % 3]
    value = [{**record, "key": i} for i, record in enumerate(records(random, a=scalar))]
    rule = {"type": "drop_duplicates", "input_path": path, "target_fields": ["a", "key"]}
    nest = {"type": "nest", "input_path": path, "field_name": "kept"}
    processed(config(transformations=[rule, nest]), reply_of(json.dumps(placed(value, path))))


def spans(random: Random, *, groups: bool, text: bool) -> list[dict[str, Any]]:
    """Spans of a few texts, some of which touch, in any order."""
    found = []
    for group in range(2 if groups else 1):
        at = random.randint(0, 3)
        for _ in range(random.randint(2, 6)):
            end = at + random.randint(1, 9)
            record: dict[str, Any] = {"begin": at, "end": end}
            if groups:
                record |= {"doc": f"d{group}", "kind": "k"}
            if text:
                record["text"] = f"[{at}-{end}]"
            found.append(record)
            at = end + random.choice([0, 0, 2])
    found.append({**found[-1], "begin": at + 5, "end": at + 9})
    if not any(a["end"] == b["begin"] and a.get("doc") == b.get("doc") for a in found for b in found):
        found.append({**found[-1], "begin": at + 9, "end": at + 10})
    random.shuffle(found)
    return found


def merge(path: list[Any], *, groups: bool, text: bool) -> dict[str, Any]:
    return {
        "type": "merge_spans",
        "input_path": path,
        "group_fields": ["doc", "kind"] if groups else [],
        "begin_field": "begin",
        "end_field": "end",
        **({"text_field": "text"} if text else {}),
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("groups", [True, False])
def test_merge_spans(groups: bool, seed: int) -> None:
    path, text = PATHS[seed % 3], seed % 2 == 0
    value = spans(Random(seed), groups=groups, text=text)
    found = changed(merge(path, groups=groups, text=text), placed(value, path))
    if not path:
        assert len(found) < len(value)


def test_merge_spans_of_nothing() -> None:
    assert processed(config(transformations=[merge([], groups=True, text=True)]), reply_of("[]")) == []


# ---------------------------------------------------------------------- what neither can do


RECORDS = '[{"a": 1, "l": [1]}, {"l": "no"}]'


@pytest.mark.parametrize(
    ("rule", "content", "reason"),
    [
        (
            {"type": "project", "retained_fields": ["a"]},
            '"x"',
            "at []: it is not a list of records; the value there is 'x'",
        ),
        ({"type": "project", "retained_fields": ["a"]}, "[1]", "element 0 is not a record but 1"),
        ({"type": "explode", "target_field": "l"}, "{}", "it is not a list of records"),
        ({"type": "explode", "target_field": "l"}, RECORDS, "field 'l' of record 1 is not a list"),
        ({"type": "explode", "target_field": "a"}, RECORDS, "field 'a' of record 0 is not a list"),
        ({"type": "explode", "target_field": "q"}, RECORDS, "record 0 has no field 'q'"),
        ({"type": "drop_duplicates", "target_fields": ["a"]}, RECORDS, "record 1 has no field 'a'"),
        ({"type": "drop_duplicates", "target_fields": ["a"]}, "[[]]", "element 0 is not a record"),
        (merge([], groups=False, text=False), '[{"begin": 0}]', "record 0 has no 'end'"),
        (merge([], groups=False, text=True), '[{"begin": 0, "end": 3}]', "record 0 has no 'text'"),
        (
            merge([], groups=False, text=False),
            '[{"begin": 0, "end": 3, "q": 1}]',
            "neither of the group nor of the span",
        ),
        (
            merge([], groups=False, text=False),
            '[{"begin": 0, "end": 3}, {"begin": 0, "end": 4}]',
            "two spans of the group [] begin at 0",
        ),
        (merge([], groups=False, text=False), '[{"begin": 0, "end": 3}, {"begin": "x", "end": 4}]', "not supported"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_both(rule: dict[str, Any], content: str, reason: str) -> None:
    message = both_refuse(config(transformations=[{"input_path": [], **rule}]), reply_of(content))
    assert message.startswith(f"transformation 0 ({rule['type']}) cannot be carried out at []")
    assert reason in message


# ---------------------------------------------------------------------- otherwise than the reference


@pytest.mark.parametrize("seed", SEEDS)
def test_drop_duplicates_drops(seed: int) -> None:
    """The reference's keys are generators, each equal to itself alone, so it never drops a record."""
    random, path = Random(seed), PATHS[seed % 3]
    value = records(random, a=lambda r: r.choice([0, "0"]), b=lambda r: r.choice([1.5, "x"]))
    value += [{**record, "more": "again"} for record in value if random.random() < 0.5] or [dict(value[0])]
    random.shuffle(value)
    rule = {"type": "drop_duplicates", "input_path": path, "target_fields": ["b", "a"]}
    fields, reply = config(transformations=[rule]), reply_of(json.dumps(placed(value, path)))
    content = processed_by_reference(fields, reply)["choices"][0]["message"]["content"]
    assert json.loads(content) == placed(value, path)
    expected = list({(record["b"], record["a"]): record for record in value}.values())
    assert len(expected) < len(value)
    assert json.dumps(ours(fields, reply)) == json.dumps(placed(expected, path))


def test_duplicates_are_equal_as_json() -> None:
    """Lists and objects compare by what is in them, 1 is 1.0, and neither is true."""
    rule = {"type": "drop_duplicates", "input_path": [], "target_fields": ["a"]}
    values = [[1, {"x": None, "y": 2}], [1, {"y": 2, "x": None}], 1, 1.0, True, False, 0, None, "1", [1], {}, []]
    found = ours(config(transformations=[rule]), reply_of(json.dumps([{"a": v, "i": i} for i, v in enumerate(values)])))
    assert [record["i"] for record in found] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_exploded_records_share_nothing() -> None:
    """The reference's records share what is nested in them, so a later change of each is made once for every one."""
    rules = [
        {"type": "explode", "input_path": [], "target_field": "l"},
        {"type": "nest", "input_path": [None, "deep", "k"], "field_name": "n"},
    ]
    fields, reply = config(transformations=rules), reply_of('[{"l": [1, 2], "deep": {"k": 0}}]')
    theirs = json.loads(processed_by_reference(fields, reply)["choices"][0]["message"]["content"])
    assert theirs[0]["deep"] == {"k": {"n": {"n": 0}}}
    assert ours(fields, reply) == [{"l": n, "deep": {"k": {"n": 0}}} for n in (1, 2)]


@pytest.mark.parametrize("content", ['{"a 1, [": null, "l": [{"x": "2"}]}', "null", '["true", null]'])
def test_any_json_is_read(content: str) -> None:
    """The reference refuses null, and first strings with digits or marks, even where nothing asks for positions."""
    fields = config(transformations=[{"type": "nest", "input_path": [], "field_name": "n"}])
    with pytest.raises(Exception):  # noqa: B017 whatever Python raises there
        processed_by_reference(fields, reply_of(content))
    assert ours(fields, reply_of(content)) == {"n": json.loads(content)}


def test_the_value_that_is_given_stays_as_it_is() -> None:
    rule = {"type": "nest", "input_path": [None, "a"], "field_name": "n"}
    value = [{"a": 1}]
    assert transform(value, Contract.model_validate(config(transformations=[rule])), Answer("")) == [{"a": {"n": 1}}]
    assert value == [{"a": 1}]


def test_a_path_that_is_not_there_changes_nothing() -> None:
    for path in (["b"], ["a", "b"], ["a", 5], [0], ["a", None, None]):
        rule = {"type": "nest", "input_path": path, "field_name": "n"}
        assert processed(config(transformations=[rule]), reply_of('{"a": [1]}')) == {"a": [1]}


def test_long_values_are_cut_in_messages() -> None:
    rule = {"type": "explode", "input_path": [], "target_field": "l"}
    with pytest.raises(OutputError) as caught:
        process_reply(Contract.model_validate(config(transformations=[rule])), reply_of(json.dumps("x" * 5000)))
    assert len(str(caught.value)) < 500
