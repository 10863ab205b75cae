"""`midstream flow repair`: an answer is checked against requirements, and asked for again where it fails."""

from __future__ import annotations

from typing import Annotated

import typer

from midstream.cli.common import Adapters, Dtype, Json, Model
from midstream.cli.flow.common import (
    Asked,
    Budget,
    ChatFile,
    Deadline,
    MaxTokens,
    Prompt,
    Requirements,
    Seed,
    Temperature,
    Url,
    close,
    conversation_of,
    perform,
    settings_of,
)
from midstream.models.source import DEFAULT_MODEL
from midstream.types import SamplingParams


def repair(
    prompt: Prompt = None,
    chat: ChatFile = None,
    requirement: Requirements = None,
    attempts: Annotated[int, typer.Option(help="How many answers at most.", min=1)] = 3,
    resample: Annotated[
        bool, typer.Option(help="Draw another answer instead of asking for a better one; needs a --temperature.")
    ] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    url: Url = None,
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    seed: Seed = None,
    deadline: Deadline = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Answer, judge the answer by requirements, and have it repaired until it meets all of them."""
    from midstream.flows.repair import RepairSettings
    from midstream.flows.repair import repair as flow
    from midstream.flows.requirements import Requirement

    settings = settings_of(
        RepairSettings,
        attempts=attempts,
        repair="resample" if resample else "append",
        params=settings_of(SamplingParams, max_tokens=max_tokens, temperature=temperature),
    )
    conversation = conversation_of(prompt, chat)
    requirements = [Requirement(text) for text in requirement or ()]
    result = perform(
        lambda backend, run: flow(backend, conversation, requirements, settings, run=run),
        Asked(url, model, adapters, dtype, seed, deadline, budget, as_json),
        "beside",
    )
    close(result, result.text, as_json=as_json)
