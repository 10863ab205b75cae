"""Scores from servers that have no endpoint for them: vLLM's log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midstream.errors import BackendError
from midstream.remote.reply import ChoiceReply
from midstream.types import Request


def prompt_logprobs_body(
    request: Request, prompt: Sequence[int], continuations: Sequence[Sequence[int]], model: str
) -> dict[str, Any]:
    """The body that asks for the log-probabilities of prompt and continuation, each read as one prompt."""
    salt = {"cache_salt": request.cache_scope} if request.cache_scope else {}
    prompts = [[*prompt, *each] for each in continuations]
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, **salt}


def scored(choice: ChoiceReply, continuation: Sequence[int], url: str) -> tuple[float, ...]:
    """The log-probability of each token of a continuation, which stands at the end of its choice's prompt."""
    found = choice.prompt_logprobs
    if found is None or len(found) < len(continuation):
        raise BackendError(f"{url} cannot score: it has neither /v1/score_continuations nor vLLM's prompt_logprobs")
    values = [
        (place or {}).get(str(token)) for token, place in zip(continuation, found[-len(continuation) :], strict=True)
    ]
    if not all(isinstance(value, dict) and isinstance(value.get("logprob"), int | float) for value in values):
        raise BackendError(f"{url} sent prompt_logprobs of other tokens than it was given")
    return tuple(float(value["logprob"]) for value in values if value is not None)
