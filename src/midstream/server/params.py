"""From the fields of a completion request to sampling parameters."""

from __future__ import annotations

import json

from pydantic import ValidationError

from midstream.errors import ConstraintError, InputError
from midstream.intrinsics.constraint import constraint_of_schema
from midstream.server.schemas import Sampling, StructuredOutputs
from midstream.types import AdapterInfo, Choice, Constraint, Regex, SamplingParams


def params_of(
    body: Sampling, adapter: AdapterInfo | None, *, max_tokens: int, logprobs: bool, top_logprobs: int
) -> SamplingParams:
    """Sampling parameters. Raises InputError that names the field, ConstraintError for an invalid format.

    An adapter is a function, so it is greedy unless told otherwise; the base model has OpenAI's temperature of 1.
    """
    default = 1.0 if adapter is None else 0.0
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=default if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            seed=None if body.seed is None else body.seed % 2**63,
            stop=stop,
            n=body.n or 1,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            ignore_eos=body.ignore_eos,
            constraint=_constraint(body),
        )
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors())
        raise InputError(wrong) from error


def max_tokens_of(asked: int | None, prompt_tokens: int, *, default: int, context: int) -> int:
    """Tokens of the answer: as asked, else `default` as far as the context has room."""
    return asked if asked is not None else max(1, min(default, context - prompt_tokens))


def _constraint(body: Sampling) -> Constraint | None:
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    if body.response_format is None or body.response_format.type == "text":
        return None
    named = body.response_format.json_schema
    return constraint_of_schema({"type": "object"} if named is None else named.schema_)


def _structured(wanted: StructuredOutputs) -> Constraint:
    if wanted.choice is not None:
        if not wanted.choice:
            raise ConstraintError("structured_outputs.choice is empty")
        return Choice(options=tuple(wanted.choice))
    if wanted.regex is not None:
        return Regex(pattern=wanted.regex)
    schema = {"type": "object"} if wanted.json_ is None else wanted.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ConstraintError(f"structured_outputs.json is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConstraintError("structured_outputs.json is not a JSON schema (an object)")
    return constraint_of_schema(schema)
