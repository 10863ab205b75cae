"""From the fields of a completion request to sampling parameters."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from midstream.errors import ConstraintError, InputError
from midstream.intrinsics.constraint import constraint_of_schema
from midstream.intrinsics.render import sampling_params
from midstream.intrinsics.spec import load_contract
from midstream.server.schemas import Sampling, StructuredOutputs
from midstream.types import AdapterInfo, Choice, Constraint, Regex, SamplingParams


def defaults_of(adapter: AdapterInfo | None, *, max_tokens: int) -> SamplingParams:
    """What holds where a chat request says nothing: OpenAI's for the base model, its contract's for an adapter.

    An adapter is a function. By its contract its answers are of the form that it was trained to give, and greedy.
    """
    if adapter is None:
        return SamplingParams(temperature=1.0, max_tokens=max_tokens)
    return sampling_params(load_contract(adapter))


def params_of(
    body: Sampling, defaults: SamplingParams, *, max_tokens: int, logprobs: bool, top_logprobs: int
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
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors())
        raise InputError(wrong) from error


def max_tokens_of(asked: int | None, prompt_tokens: int, *, default: int, context: int) -> int:
    """Tokens of the answer: as asked, else `default` as far as the context has room."""
    return asked if asked is not None else max(1, min(default, context - prompt_tokens))


def _constraint(body: Sampling, default: Constraint | None) -> Constraint | None:
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    if body.response_format is None:
        return default
    if body.response_format.type == "text":
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
