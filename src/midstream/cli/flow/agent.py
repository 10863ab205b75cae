"""`midstream flow agent`: a model that uses tools until it answers; its run can be kept and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midstream.cli.common import Adapters, Dtype, Json, Model
from midstream.cli.flow.common import (
    Asked,
    Budget,
    ChatFile,
    Deadline,
    Prompt,
    Seed,
    Url,
    close,
    conversation_of,
    perform,
    settings_of,
    written_to,
)
from midstream.errors import InputError
from midstream.models.source import DEFAULT_MODEL


def agent(
    prompt: Prompt = None,
    chat: ChatFile = None,
    docs: Annotated[
        Path | None, typer.Option("--docs", "-d", help="Folder or JSONL corpus that a search tool looks in.")
    ] = None,
    invoke: Annotated[list[str] | None, typer.Option(help="Adapter that the thoughts may invoke; repeatable.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="The last step can only answer. [default: 6]", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Of thoughts and actions. [default: 0]", min=0)] = None,
    trace: Annotated[Path | None, typer.Option(help="Keep all that the run asked and was given in this file.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Run such a file again, without a model; all else comes from it.")
    ] = None,
    url: Url = None,
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    seed: Seed = None,
    deadline: Deadline = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Answer with the help of tools: a calculator, and a search in --docs."""
    from midstream.cli.flow.play import Play, replayed
    from midstream.flows.agent import AgentSettings
    from midstream.retrieval import Bm25Retriever, read_documents

    given = (prompt, chat, docs, invoke, max_steps, temperature, trace, url, adapters, dtype, seed, deadline, budget)
    if replay is not None:
        if any(each is not None for each in given):
            raise InputError("--replay takes everything from its file: leave the prompt and the other options away")
        result = replayed(replay, as_json=as_json)
    else:
        written_to(trace, "--trace")
        play = Play(
            conversation=conversation_of(prompt, chat),
            settings=settings_of(
                AgentSettings, invoke=tuple(invoke or ()), max_steps=max_steps, temperature=temperature
            ),
            searches=docs is not None,
            max_tokens=budget,
        )
        retriever = None if docs is None else Bm25Retriever(read_documents(docs))
        result = perform(
            lambda backend, run: play.perform(backend, retriever, run, trace),
            Asked(url, model, adapters, dtype, seed, deadline, budget, as_json),
            "beside",
        )
    close(result, result.answer, as_json=as_json)
