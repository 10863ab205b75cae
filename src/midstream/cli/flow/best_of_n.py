"""`midstream flow best-of-n`: several answers are drawn and scored, and the best one is taken."""

from __future__ import annotations

from pathlib import Path
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
    written_to,
)
from midstream.models.source import DEFAULT_MODEL
from midstream.types import SamplingParams


def best_of_n(
    prompt: Prompt = None,
    chat: ChatFile = None,
    answers: Answers = 8,
    weight: Weights = None,
    requirement: Requirement = None,
    good_enough: Annotated[
        float | None, typer.Option("--good-enough", help="Draw no more once an answer has this score.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the best score against tokens spent.")
    ] = None,
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
    """Draw several answers, score each by intrinsics, and take the best."""
    from midstream.cli.flow.plot import check_plot, draw_curve
    from midstream.flows.best_of_n import BestOfNSettings
    from midstream.flows.best_of_n import best_of_n as flow

    if plot is not None:
        written_to(plot, "--plot")
        check_plot(plot)
    settings = settings_of(
        BestOfNSettings,
        n=answers,
        weights=weights_of(weight, requirement),
        requirement=requirement,
        good_enough=good_enough,
        params=settings_of(SamplingParams, max_tokens=max_tokens, temperature=temperature),
    )
    conversation = conversation_of(prompt, chat)
    result = perform(
        lambda backend, run: flow(backend, conversation, settings, run=run),
        Asked(url, model, adapters, dtype, seed, deadline, budget, as_json),
        "hidden",
    )
    if plot is not None:
        draw_curve(plot, result)
    close(result, result.text, as_json=as_json)
