"""From the fields of a completion request to sampling parameters."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from midstream.errors import ConstraintError, InputError
from midstream.intrinsics.constraint import constraint_of_schema
from midstream.intrinsics.render import sampling_params
from midstream.intrinsics.spec import load_contract
from midstream.server.schemas import Decoding, StructuredOutputs
from midstream.types import AdapterInfo, Choice, Constraint, JsonSchema, Regex, SamplingParams

# Where a schema holds schemas, by position and by name; and what an object says of properties that it does not name.
_IN_SCHEMAS = frozenset({"items", "prefixItems", "anyOf", "oneOf"})
_BY_NAME = frozenset({"properties", "$defs", "definitions"})
_OTHERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_COMBINED = frozenset({"allOf", "anyOf", "oneOf", "if", "$ref"})


def defaults_of(adapter: AdapterInfo | None, *, max_tokens: int) -> SamplingParams:
    """What holds where a chat request says nothing: OpenAI's for the base model, its contract's for an adapter.

    An adapter is a function. By its contract its answers are of the form that it was trained to give, and greedy.
    """
    if adapter is None:
        return SamplingParams(temperature=1.0, max_tokens=max_tokens)
    return sampling_params(load_contract(adapter))


def params_of(
    body: Decoding, defaults: SamplingParams, *, max_tokens: int, logprobs: bool, top_logprobs: int
) -> SamplingParams:
    """Sampling parameters. Raises InputError that names the field, ConstraintError for an invalid format."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "min_p": body.min_p,
        "seed": None if body.seed is None else body.seed % 2**63,
        "stop": (body.stop,) if isinstance(body.stop, str) else body.stop and tuple(body.stop),
        "n": body.n,
    }
    try:
        return SamplingParams(
            **{
                **{name: getattr(defaults, name) for name in given},
                **{name: value for name, value in given.items() if value is not None},
            },
            max_tokens=max_tokens,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            ignore_eos=body.ignore_eos,
            constraint=_constraint(body, defaults.constraint),
        )
    except ValidationError as error:
        raise wrong(error) from error


def wrong(error: ValidationError) -> InputError:
    """All that is wrong with values that the library's own types refuse."""
    each = [f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors()]
    return InputError("; ".join(each))


def max_tokens_of(asked: int | None, prompt_tokens: int, *, default: int, context: int) -> int:
    """Tokens of the answer: as asked, else `default` as far as the context has room."""
    return asked if asked is not None else max(1, min(default, context - prompt_tokens))


def _constraint(body: Decoding, default: Constraint | None) -> Constraint | None:
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    if body.guided_json is not None:
        return _schema("guided_json", body.guided_json)
    if body.response_format is None:
        return default
    if body.response_format.type == "text":
        return None
    named = body.response_format.json_schema
    if named is None:
        return constraint_of_schema({"type": "object"})
    try:
        return constraint_of_schema(_closed(named.schema_) if named.strict else named.schema_)
    except RecursionError as error:
        raise ConstraintError("response_format.json_schema.schema is nested too deeply") from error


def _structured(wanted: StructuredOutputs) -> Constraint:
    if wanted.choice is not None:
        if not wanted.choice:
            raise ConstraintError("structured_outputs.choice is empty")
        return Choice(options=tuple(wanted.choice))
    if wanted.regex is not None:
        return Regex(pattern=wanted.regex)
    if isinstance(wanted.json_, str):
        _schema("structured_outputs.json", wanted.json_)
        return JsonSchema(schema_text=wanted.json_)
    return _schema("structured_outputs.json", {"type": "object"} if wanted.json_ is None else wanted.json_)


def _schema(field: str, schema: dict[str, Any] | str) -> Constraint:
    """The constraint of a schema, or of its text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ConstraintError(f"{field} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConstraintError(f"{field} is not a JSON schema (an object)")
    return constraint_of_schema(schema)


def _closed(schema: Any) -> Any:
    """A schema whose objects have only properties that it names: where it is strict, OpenAI takes no other ones.

    Objects that say themselves what else they have stay as they are, and so do those put together of several schemas.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict) or ("properties" in schema and schema.keys() & _COMBINED):
        return schema
    inner = {key: _closed(value) if key in _IN_SCHEMAS else value for key, value in schema.items()}
    for key in _BY_NAME & inner.keys():
        if isinstance(inner[key], dict):
            inner[key] = {name: _closed(value) for name, value in inner[key].items()}
    return {"additionalProperties": False, **inner} if "properties" in inner and not inner.keys() & _OTHERS else inner
