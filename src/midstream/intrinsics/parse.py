"""From an intrinsic's output to its result, checked against the contract."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from midstream.errors import OutputError
from midstream.intrinsics.spec import Contract


def parse(text: str, contract: Contract, name: str) -> Any:
    """The JSON value of an output; its plain text where the contract has no format.

    Raises OutputError, which shows the output and the schema, when they do not fit.
    """
    schema = contract.json_schema
    if schema is None:
        return text
    try:
        value = json.loads(text)
        jsonschema.validate(value, schema)
    except (ValueError, jsonschema.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise OutputError(
            f"intrinsic {name} gave {text!r}, which does not fit {json.dumps(schema)}: {reason}"
        ) from error
    return value
