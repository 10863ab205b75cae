"""`midstream flow rag`: a turn of a retrieval chat over a folder of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midstream.cli.common import Adapters, Dtype, Json, Model, read_chat
from midstream.cli.flow.common import (
    Asked,
    Budget,
    ChatFile,
    Deadline,
    MaxTokens,
    Seed,
    Temperature,
    Url,
    close,
    perform,
    settings_of,
)
from midstream.models.source import DEFAULT_MODEL
from midstream.types import SamplingParams


def rag(
    question: Annotated[str, typer.Argument(help="The next question of the conversation.")],
    docs: Annotated[Path, typer.Option("--docs", "-d", help="Folder of Markdown or text files, or a JSONL corpus.")],
    chat: ChatFile = None,
    passages: Annotated[int, typer.Option(help="How many passages go into the turn.", min=0)] = 3,
    requirement: Annotated[str | None, typer.Option(help="What the answer must meet; checked after it.")] = None,
    clarify: Annotated[bool, typer.Option(help="Ask back where the passages do not answer the question.")] = False,
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
    """Answer a question from documents: guarded, rewritten, retrieved for, answered if it can be, and checked."""
    from midstream.flows.rag import RagSettings, rag_turn
    from midstream.retrieval import Bm25Retriever, read_documents
    from midstream.transcript import Transcript

    settings = settings_of(
        RagSettings,
        passages=passages,
        requirement=requirement,
        unanswerable="clarify" if clarify else "say",
        params=settings_of(SamplingParams, max_tokens=max_tokens, temperature=temperature),
    )
    retriever = Bm25Retriever(read_documents(docs))
    conversation = Transcript() if chat is None else read_chat(chat)
    result = perform(
        lambda backend, run: rag_turn(backend, conversation, question, retriever, settings, run=run),
        Asked(url, model, adapters, dtype, seed, deadline, budget, as_json),
    )
    if not as_json:
        for passage in result.passages:
            typer.echo(f"  {passage.score:6.2f}  {passage.document.doc_id} {passage.document.title}", err=True)
    close(result, as_json=as_json)
