"""Transformations of records, the objects in a list. Each raises ValueError or TypeError that says what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from midstream.intrinsics.spec import MergeSpans

Record = dict[str, Any]


def project(value: Any, names: Mapping[str, str]) -> Any:
    """A record, or each of a list, with the fields in `names` under their new names; one that is missing is null."""
    if isinstance(value, dict):
        return {new: value.get(old) for old, new in names.items()}
    return [project(record, names) for record in _records(value)]


def explode(value: Any, field: str) -> list[Record]:
    """One record for each element of the lists in `field`, which becomes that element."""
    found: list[Record] = []
    for index, record in enumerate(_records(value)):
        elements = _of(record, field, index)
        if not isinstance(elements, list):
            raise TypeError(f"field {field!r} of record {index} is not a list")
        # Copies, so that what a later transformation changes in one record is not changed in its siblings.
        found += [copy.deepcopy({**record, field: element}) for element in elements]
    return found


def drop_duplicates(value: Any, fields: Sequence[str]) -> list[Record]:
    """One record for each combination of values: the last one, where the first one stood."""
    kept: dict[Any, Record] = {}
    for index, record in enumerate(_records(value)):
        kept[tuple(_comparable(_of(record, field, index)) for field in fields)] = record
    return list(kept.values())


def merge_spans(value: Any, rule: MergeSpans) -> list[Record]:
    """Records in the order of group and begin; where one ends at the next one's begin, they become one."""
    merged: list[Record] = []
    last_group: tuple[Any, ...] | None = None
    for group, span in _sorted_spans(value, rule):
        if group == last_group and merged[-1][rule.end_field] == span[rule.begin_field]:
            merged[-1][rule.end_field] = span[rule.end_field]
            if rule.text_field is not None:
                merged[-1][rule.text_field] += span[rule.text_field]
        else:
            merged.append(dict(span))
            last_group = group
    return merged


def _sorted_spans(value: Any, rule: MergeSpans) -> list[tuple[tuple[Any, ...], Record]]:
    """(group, record) in order. No two of a group may begin at one place."""
    by_key: dict[tuple[Any, ...], Record] = {}
    for index, record in enumerate(_records(value)):
        _check_span(record, rule, index)
        group = tuple(record.get(field) for field in rule.group_fields)
        begin = record[rule.begin_field]
        if by_key.setdefault((*group, begin), record) is not record:
            raise ValueError(f"two spans of the group {list(group)} begin at {begin}")
    return [(key[:-1], by_key[key]) for key in sorted(by_key)]


def _check_span(record: Record, rule: MergeSpans, index: int) -> None:
    needed = [field for field in (rule.begin_field, rule.end_field, rule.text_field) if field is not None]
    for field in needed:
        if record.get(field) is None:
            raise ValueError(f"record {index} has no {field!r}")
    strange = sorted(record.keys() - {*rule.group_fields, *needed})
    if strange:
        raise ValueError(f"record {index} has fields that are neither of the group nor of the span: {strange}")


def _records(value: Any) -> list[Record]:
    if not isinstance(value, list):
        raise TypeError("it is not a list of records")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise TypeError(f"element {index} is not a record but {record!r}")
    return value


def _of(record: Record, field: str, index: int) -> Any:
    if field not in record:
        raise ValueError(f"record {index} has no field {field!r}")
    return record[field]


def _comparable(value: Any) -> Any:
    """A hashable stand-in that is equal where two JSON values are: true is not 1."""
    if isinstance(value, dict):
        return ("object", frozenset((key, _comparable(each)) for key, each in value.items()))
    if isinstance(value, list):
        return ("array", tuple(map(_comparable, value)))
    return ("boolean", value) if isinstance(value, bool) else value
