"""Requests as they are sent: vLLM's names for all that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midstream.types import Choice, Constraint, Invocable, JsonSchema, Request, SamplingParams

MAX_LOGPROBS = 20


def completion_body(request: Request, prompt: Sequence[int], model: str) -> dict[str, Any]:
    """The body of `POST /v1/completions`. Whatever a server has defaults of its own for is said."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "return_token_ids": True,
        "skip_special_tokens": False,
        **_sampling(request.params),
    }
    if request.cache_scope:
        body["cache_salt"] = request.cache_scope
    if request.invocable:
        body["invocable"] = [_invocable(each) for each in request.invocable]
        body["max_invocations"] = request.max_invocations
    return body


def with_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """A body that asks for the logprobs from which the probabilities of a choice can be found."""
    return {**body, "logprobs": MAX_LOGPROBS, "return_tokens_as_token_ids": True}


def score_body(
    request: Request, prompt: Sequence[int], continuations: Sequence[Sequence[int]], model: str
) -> dict[str, Any]:
    """The body of `POST /v1/score_continuations`."""
    salt = {"cache_salt": request.cache_scope} if request.cache_scope else {}
    return {"model": model, "prompt": list(prompt), "continuations": [list(each) for each in continuations], **salt}


def _sampling(params: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,  # both mean all; not every version of vLLM knows 0
        "min_p": params.min_p,
        "n": params.n,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
    }
    if params.seed is not None:
        body["seed"] = params.seed
    if params.constraint is not None:
        body["structured_outputs"] = _structured(params.constraint)
    if params.logprobs:
        body |= {"logprobs": params.top_logprobs, "return_tokens_as_token_ids": True}
    return body


def _structured(constraint: Constraint) -> dict[str, Any]:
    if isinstance(constraint, Choice):
        return {"choice": list(constraint.options)}
    return {"json": constraint.schema_text} if isinstance(constraint, JsonSchema) else {"regex": constraint.pattern}


def _invocable(invocable: Invocable) -> dict[str, Any]:
    params = {key: value for key, value in _sampling(invocable.params).items() if key != "n"}
    return {"adapter": invocable.adapter, "closing": list(invocable.closing), "params": params}
