"""The contract of an intrinsic: io.yaml in its adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from midstream.errors import ContractError
from midstream.types import AdapterInfo, Choice, Constraint, JsonSchema

_REQUIRED = ("model", "response_format", "transformations")


class Contract(BaseModel):
    """What an intrinsic is given and gives. A folder without io.yaml has the empty contract: plain text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    response_format: str | None = None
    transformations: list[Any] | None = None
    instruction: str | None = None
    parameters: dict[str, Any] | None = None
    sentence_boundaries: dict[str, str] | None = None
    docs_as_message: str | None = None
    logprobs_workaround: Any = None
    name: str | None = None

    @field_validator("response_format")
    @classmethod
    def _is_schema(cls, value: str | None) -> str | None:
        if value is None:
            return None
        schema = json.loads(value)
        if not isinstance(schema, dict):
            raise ValueError("response_format is not a JSON object")
        try:
            jsonschema.validators.validator_for(schema).check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"response_format is not a JSON schema: {error.message}") from error
        return value

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return None if self.response_format is None else json.loads(self.response_format)

    def options(self) -> tuple[str | int, ...]:
        """The answers of a response that is one of some strings, integers or truth values; else none."""
        schema = self.json_schema or {}
        options = schema.get("enum", ())
        for name, kind in (("string", str), ("integer", int), ("boolean", bool)):
            if options and schema.get("type", name) == name and all(type(option) is kind for option in options):
                return tuple(options)
        return ()

    def constraint(self) -> Constraint | None:
        """How decoding is held to the response format."""
        if options := self.options():
            # Letters as they are: an escape is other tokens than those an adapter was trained to write.
            return Choice(options=tuple(json.dumps(option, ensure_ascii=False) for option in options))
        return None if self.response_format is None else JsonSchema(schema_text=self.response_format)


def load_contract(adapter: AdapterInfo) -> Contract:
    """The contract that an adapter was loaded with. Raises ContractError that names the file and all that is wrong."""
    if adapter.contract is None:
        return Contract()
    path = Path(adapter.path) / "io.yaml"
    try:
        contract = Contract.model_validate(yaml.safe_load(adapter.contract))
    except yaml.YAMLError as error:
        raise ContractError(f"{path} cannot be read: {error}".replace("\n", " ")) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ContractError(f"{path}: {wrong}") from error
    missing = [key for key in _REQUIRED if key not in contract.model_fields_set]
    if missing:
        raise ContractError(f"{path} lacks {', '.join(missing)} (each may be null)")
    unsupported = [
        field
        for field in ("transformations", "sentence_boundaries", "docs_as_message", "logprobs_workaround")
        if getattr(contract, field)
    ]
    if unsupported:
        raise ContractError(f"{path} asks for {', '.join(unsupported)}, which this version does not carry out")
    return contract
