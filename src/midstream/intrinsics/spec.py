"""The contract of an intrinsic: io.yaml in its adapter's folder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

import jsonschema
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from midstream.errors import ContractError
from midstream.intrinsics.constraint import constraint_of_schema, options_of
from midstream.types import AdapterInfo, Constraint

Source = Literal["last_message", "documents"]

_REQUIRED = ("model", "response_format", "transformations")
_PLACES: dict[Source, str] = {"last_message": "the last message", "documents": "the documents"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class _Transformation(_Part):
    """One change of the answer's JSON, at all places that `input_path` matches; None in it matches any key or index."""

    input_path: tuple[StrictStr | StrictInt | None, ...]


class Likelihood(_Transformation):
    """A label becomes the expectation over its categories' values, by the logprobs of its first token."""

    type: Literal["likelihood"]
    categories_to_values: dict[StrictStr | StrictBool | StrictInt | StrictFloat, StrictInt | StrictFloat]


class Nest(_Transformation):
    """A value becomes an object with that one field."""

    type: Literal["nest"]
    field_name: str


class Project(_Transformation):
    """A record, or each record of a list, keeps these fields; a mapping gives them new names."""

    type: Literal["project"]
    retained_fields: list[str] | dict[str, str]

    @property
    def names(self) -> dict[str, str]:
        """New names by old ones."""
        kept = self.retained_fields
        return kept if isinstance(kept, dict) else {name: name for name in kept}


class Explode(_Transformation):
    """A record of a list becomes one record for each element of its field."""

    type: Literal["explode"]
    target_field: str


class DropDuplicates(_Transformation):
    """Of a list's records with the same values in these fields one remains."""

    type: Literal["drop_duplicates"]
    target_fields: list[str]


class MergeSpans(_Transformation):
    """Spans that touch become one, within records that agree on the group fields."""

    type: Literal["merge_spans"]
    group_fields: list[str]
    begin_field: str
    end_field: str
    text_field: str | None = None


class DecodeSentences(_Transformation):
    """Beside a sentence's number come fields that tell where it is and what it says."""

    type: Literal["decode_sentences"]
    source: Source
    output_names: dict[Literal["begin", "end", "text", "document_id"], str | None]

    @model_validator(mode="after")
    def _has_documents(self) -> DecodeSentences:
        if self.source != "documents" and "document_id" in self.output_names:
            raise ValueError("output_names has document_id, which only sentences of documents have")
        return self


Transformation = Annotated[
    Likelihood | Nest | Project | Explode | DropDuplicates | MergeSpans | DecodeSentences,
    Field(discriminator="type"),
]


class Contract(_Part):
    """What an intrinsic is given and gives. A folder without io.yaml has the empty contract: plain text."""

    model: str | None = None
    response_format: str | None = None
    transformations: tuple[Transformation, ...] | None = None
    instruction: str | None = None
    parameters: dict[str, Any] | None = None
    sentence_boundaries: dict[Source, str] | None = None
    docs_as_message: Literal["string", "json", "roles"] | None = None
    logprobs_workaround: bool = False
    name: str | None = None

    # ------------------------------------------------------------------ checks

    @field_validator("response_format", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value

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

    @field_validator("instruction")
    @classmethod
    def _is_format(cls, value: str | None) -> str | None:
        if value is not None and any(not name or name.isdigit() for name in _fields(value)):
            raise ValueError("its arguments have names, so {} and {0} cannot be filled")
        return value

    @field_validator("parameters")
    @classmethod
    def _has_mapping(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("extra_body", {}), dict):
            raise ValueError("extra_body is not a mapping")
        return value

    @field_validator("docs_as_message", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return value or None

    @field_validator("logprobs_workaround", mode="before")
    @classmethod
    def _is_on(cls, value: Any) -> bool:
        return bool(value)

    @model_validator(mode="after")
    def _sentences_can_be_found(self) -> Contract:
        for rule in self.transformations or ():
            if not isinstance(rule, DecodeSentences):
                continue
            if rule.source not in (self.sentence_boundaries or {}):
                raise ValueError(f"decode_sentences: sentence_boundaries does not tag {_PLACES[rule.source]}")
            if self.docs_as_message == "string":
                raise ValueError("decode_sentences cannot tell documents apart with docs_as_message string")
        return self

    # ------------------------------------------------------------------ what it asks for

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema of the raw answer; None for plain text."""
        return None if self.response_format is None else json.loads(self.response_format)

    def options(self) -> tuple[str | int, ...]:
        """The answers of a response that is one of some strings, integers or truth values; else none."""
        return options_of(self.json_schema or {})

    def constraint(self) -> Constraint | None:
        """How decoding is held to the response format."""
        schema = self.json_schema
        return None if schema is None else constraint_of_schema(schema)

    @property
    def arguments(self) -> frozenset[str]:
        """What a caller must give: the names in the instruction, but for `last_message`."""
        return frozenset(_fields(self.instruction or "")) - {"last_message"}

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        return ((self.parameters or {}).get("extra_body") or {}).get("chat_template_kwargs") or {}

    @property
    def needs_logprobs(self) -> bool:
        """Whether a transformation reads probabilities."""
        return any(isinstance(rule, Likelihood) for rule in self.transformations or ())

    @property
    def decodes_sentences(self) -> bool:
        """Whether a transformation reads the tagged sentences of the request."""
        return any(isinstance(rule, DecodeSentences) for rule in self.transformations or ())

    @property
    def rewrites(self) -> str | None:
        """What it changes before the end of a conversation, where the KV of the prefix is lost by it; else None."""
        places = [_PLACES[source] for source in ("last_message", "documents") if source in self._tagged]
        reasons = [f"sentence tags in {' and '.join(places)}"] if places else []
        if self.docs_as_message:
            reasons.append("documents as messages at the start")
        if self.template_arguments:
            reasons.append("arguments of its own for the chat template")
        return "; ".join(reasons) or None

    @property
    def needs_messages(self) -> bool:
        """Whether a conversation must be given as messages: token ids cannot be rewritten or instructed."""
        return self.instruction is not None or self.rewrites is not None

    @property
    def _tagged(self) -> Mapping[Source, str]:
        return self.sentence_boundaries or {}


def load_contract(adapter: AdapterInfo) -> Contract:
    """The contract that an adapter was loaded with. Raises ContractError that names the file and all that is wrong."""
    if adapter.contract is None:
        return Contract()
    return parse_contract(adapter.contract, str(Path(adapter.path) / "io.yaml"))


@functools.lru_cache(maxsize=256)
def parse_contract(text: str, path: str) -> Contract:
    """A contract from the text of an io.yaml; `path` is for the messages of ContractError."""
    try:
        contract = Contract.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ContractError(f"{path} cannot be read: {error}".replace("\n", " ")) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ContractError(f"{path}: {wrong}") from error
    missing = [key for key in _REQUIRED if key not in contract.model_fields_set]
    if missing:
        raise ContractError(f"{path} lacks {', '.join(missing)} (each may be null)")
    return contract


def _fields(text: str) -> Iterator[str]:
    """The names of the arguments that a format string takes. Raises ValueError where it is none."""
    for _, field, spec, _ in Formatter().parse(text):
        if field is not None:
            yield re.split(r"[.\[]", field, maxsplit=1)[0]
            yield from _fields(spec or "")
