"""`midstream complete`: one completion of a text or a chat file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from midstream.cli.common import (
    Adapters,
    Dtype,
    Json,
    Model,
    Weights,
    open_engine,
    print_json,
    read_chat,
    show_progress,
)
from midstream.errors import InputError
from midstream.models.source import DEFAULT_MODEL
from midstream.types import Choice, Constraint, JsonSchema, Regex, Request, SamplingParams


def complete(
    prompt: Annotated[str | None, typer.Argument(help="A text to continue; or give --chat.")] = None,
    chat: Annotated[Path | None, typer.Option("--chat", "-c", help="Chat file (JSON) to answer.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter; its invocation must be in the prompt.")] = None,
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    weights: Weights = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Allowed answer; repeatable.")] = None,
    regex: Annotated[str | None, typer.Option(help="Answers match this regular expression.")] = None,
    schema: Annotated[Path | None, typer.Option(help="Answers fit the JSON schema in this file.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a text, or answer a chat, streaming."""
    if (prompt is None) == (chat is None):
        raise InputError("give a prompt or --chat, one of the two")
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            constraint=_constraint(choice, regex, schema),
        )
    except ValidationError as error:
        raise InputError("; ".join(f"{e['loc'][0] if e['loc'] else ''}: {e['msg']}" for e in error.errors())) from error
    conversation = None if chat is None else read_chat(chat)
    with open_engine(
        model, adapters, dtype, weights=weights, progress=show_progress(as_json), library=adapter is not None
    ) as engine:
        tokens = conversation or engine.aio.chat.encode(prompt or "")
        for delta in engine.stream(Request(prompt=tokens, adapter=adapter, params=params)):
            if not as_json:
                typer.echo(delta.text, nl=False)
            if delta.completion is not None and as_json:
                done = delta.completion
                print_json(
                    {
                        "text": done.text,
                        "finish_reason": done.choices[0].finish_reason,
                        "probabilities": done.choices[0].probabilities,
                        "usage": done.usage.as_dict(),
                        "activation_index": done.activation_index,
                        "seconds": done.seconds,
                    }
                )
    if not as_json:
        typer.echo()


def _constraint(choice: list[str] | None, regex: str | None, schema: Path | None) -> Constraint | None:
    given = [x for x in (choice, regex, schema) if x]
    if len(given) > 1:
        raise InputError("give one of --choice, --regex and --schema")
    if choice:
        return Choice(options=tuple(choice))
    if regex:
        return Regex(pattern=regex)
    if schema:
        try:
            return JsonSchema(schema_text=schema.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"schema file {schema} cannot be read: {error}") from error
    return None
