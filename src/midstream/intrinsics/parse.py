"""From an intrinsic's output to its raw answer, checked against the contract."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from midstream.errors import OutputError
from midstream.intrinsics.spec import Contract


def parse(text: str, contract: Contract, name: str) -> Any:
    """The JSON value of an output, before transformations; its plain text where the contract says nothing of JSON.

    Raises OutputError, which shows the output and the schema, when they do not fit.
    """
    schema = contract.json_schema
    if schema is None and not contract.transformations:
        return text
    try:
        value = json.loads(text)
        jsonschema.validate(value, {} if schema is None else schema)
    except (ValueError, RecursionError, jsonschema.ValidationError) as error:
        reason = str(error).splitlines()[0]
        wanted = "JSON" if schema is None else json.dumps(schema)
        raise OutputError(f"intrinsic {name} gave {text!r}, which does not fit {wanted}: {reason}") from error
    return value
