"""`midstream flow guarded`: the question is checked before the answer, and the answer after it."""

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


def guarded(
    prompt: Prompt = None,
    chat: ChatFile = None,
    requirement: Requirements = None,
    flag: Annotated[bool, typer.Option(help="Tell an answer that fails a requirement, and say so.")] = False,
    eager: Annotated[bool, typer.Option(help="Begin the answer beside the guard instead of after it.")] = False,
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
    """Answer between two checks: of the question for attacks, and of the answer by requirements."""
    from midstream.flows.guarded import GuardSettings
    from midstream.flows.guarded import guarded as flow

    settings = settings_of(
        GuardSettings,
        requirements=tuple(requirement or ()),
        unmet="flag" if flag else "fallback",
        eager=eager,
        params=settings_of(SamplingParams, max_tokens=max_tokens, temperature=temperature),
    )
    conversation = conversation_of(prompt, chat)
    result = perform(
        lambda backend, run: flow(backend, conversation, settings, run=run),
        Asked(url, model, adapters, dtype, seed, deadline, budget, as_json),
    )
    if not as_json:
        typer.echo(f"{result.outcome}", err=True)
    close(result, as_json=as_json)
