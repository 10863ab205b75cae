"""`midstream flow majority`: several answers are drawn, and the one that most agree on is taken."""

from __future__ import annotations

from typing import Annotated

import typer

from midstream.cli.common import Adapters, Dtype, Json, Model
from midstream.cli.flow.common import (
    Answers,
    Asked,
    Budget,
    ChatFile,
    Deadline,
    MaxTokens,
    Prompt,
    Requirement,
    Seed,
    Temperature,
    Url,
    Weights,
    close,
    conversation_of,
    perform,
    settings_of,
    weights_of,
)
from midstream.models.source import DEFAULT_MODEL
from midstream.types import SamplingParams


def majority(
    prompt: Prompt = None,
    chat: ChatFile = None,
    answers: Answers = 8,
    extract: Annotated[
        str | None, typer.Option(help="Regular expression; answers agree in the first group of its last match.")
    ] = None,
    weight: Weights = None,
    requirement: Requirement = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.8,
    url: Url = None,
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    seed: Seed = None,
    deadline: Deadline = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Draw several answers and take the one that most agree on. With --weight or --requirement, answers count as
    much as their scores."""
    from midstream.flows.majority import MajoritySettings, WeightedMajoritySettings, weighted_majority
    from midstream.flows.majority import majority as flow

    weights = weights_of(weight, requirement)
    params = settings_of(SamplingParams, max_tokens=max_tokens, temperature=temperature)
    conversation = conversation_of(prompt, chat)
    asked = Asked(url, model, adapters, dtype, seed, deadline, budget, as_json)
    if weights is None:
        plain = settings_of(MajoritySettings, n=answers, extract=extract, params=params)
        result = perform(lambda backend, run: flow(backend, conversation, plain, run=run), asked, "hidden")
    else:
        scored = settings_of(
            WeightedMajoritySettings,
            n=answers,
            extract=extract,
            params=params,
            weights=weights,
            requirement=requirement,
        )
        result = perform(
            lambda backend, run: weighted_majority(backend, conversation, scored, run=run), asked, "hidden"
        )
    close(result, result.text, as_json=as_json)
