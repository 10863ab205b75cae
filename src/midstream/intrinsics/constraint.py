"""From a JSON schema to the constraint that decodes it: for contracts, and for a server's structured outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from midstream.types import Choice, Constraint, JsonSchema

_TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}
# Beside an enum these change nothing about which values are allowed.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment"}
)


def options_of(schema: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The values of a schema that allows just some strings, integers or truth values; else none."""
    options = schema.get("enum")
    if not isinstance(options, list) or not options or schema.keys() - _ANNOTATIONS - {"type", "enum"}:
        return ()
    for name, kind in _TYPES.items():
        # By exact type, as in JSON: true is no integer.
        if schema.get("type", name) == name and all(type(option) is kind for option in options):
            return tuple(dict.fromkeys(options))
    return ()


def constraint_of_schema(schema: Mapping[str, Any]) -> Constraint:
    """How decoding is held to a schema: a choice where it lists its values, so that each has a probability."""
    if options := options_of(schema):
        # Letters as they are: an escape is other tokens than those an adapter was trained to write.
        return Choice(options=tuple(json.dumps(option, ensure_ascii=False) for option in options))
    return JsonSchema(schema_text=json.dumps(schema, ensure_ascii=False))
