"""`midstream chat`: an interactive conversation, with intrinsics called as /NAME."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from midstream.cli.common import Adapters, Dtype, Model, Weights, open_engine, read_chat, show_progress
from midstream.errors import InputError, MidstreamError
from midstream.models.source import DEFAULT_MODEL
from midstream.types import Document

if TYPE_CHECKING:
    from midstream.session import Conversation, Engine

_HELP = (
    "/NAME calls an adapter, /all all of them, /docs FILE adds passages to your next turn, "
    "/branch goes on with a copy of the conversation, /help, /quit"
)


def chat(
    model: Model = DEFAULT_MODEL,
    adapters: Adapters = None,
    dtype: Dtype = None,
    weights: Weights = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    start: Annotated[Path | None, typer.Option("--chat", "-c", help="Chat file to go on from.")] = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Talk with the base model, and call adapters on the conversation as you go."""
    first = None if start is None else read_chat(start)
    with open_engine(model, adapters, dtype, weights=weights, progress=show_progress(False)) as engine:
        typer.echo(f"adapters: {', '.join(info.name for info in engine.adapters()) or 'none'}. {_HELP}", err=True)
        loop = _Loop(engine, system, max_tokens, temperature)
        if first is not None:
            from midstream.session import Conversation

            loop.conversation = Conversation.from_chat(engine, first)
        loop.run()


class _Loop:
    def __init__(self, engine: Engine, system: str | None, max_tokens: int, temperature: float) -> None:
        self._engine = engine
        self._sampling = {"max_tokens": max_tokens, "temperature": temperature}
        self._documents: list[Document] = []
        self.conversation: Conversation = engine.conversation(system)

    def run(self) -> None:
        while True:
            if sys.stdin.isatty():
                typer.echo("> ", nl=False)
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                return
            if not line.strip():
                continue
            try:
                self._take(line.strip())
            except MidstreamError as error:
                # One line that went wrong does not end the conversation.
                typer.echo(f"midstream: {error}", err=True)

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            self._turn(line)
            return
        verb, _, rest = line[1:].partition(" ")
        if verb == "help":
            typer.echo(_HELP)
        elif verb == "docs":
            self._documents += read_documents(Path(rest.strip()))
            typer.echo(f"{len(self._documents)} passages go with your next turn")
        elif verb == "branch":
            self.conversation = self.conversation.branch()
            typer.echo("on a branch of the conversation now")
        else:
            names = [info.name for info in self._engine.adapters()] if verb == "all" else [verb]
            self._call(names)

    def _turn(self, text: str) -> None:
        before = self.conversation.branch()
        try:
            self.conversation.user(text, self._documents)
            reply = self.conversation.reply(on_text=lambda t: typer.echo(t, nl=False), **self._sampling)
        except MidstreamError:
            self.conversation = before
            raise
        self._documents = []
        usage = reply.completion.usage
        typer.echo(f"\n  [{usage.cached_tokens} tokens reused, {usage.computed_tokens} computed]", err=True)

    def _call(self, names: list[str]) -> None:
        for name, result in zip(names, self.conversation.call_many(names), strict=True):
            if isinstance(result, MidstreamError):
                typer.echo(f"  {name}: {result}", err=True)
                continue
            shares = ", ".join(f"{k} {v:.2f}" for k, v in (result.probabilities or {}).items())
            usage = result.usage
            typer.echo(
                f"  {name}: {result.result} ({shares})  "
                f"[{usage.cached_tokens} reused, {usage.computed_tokens} computed, "
                f"{result.seconds * 1e3:.0f} ms]"
            )


def read_documents(path: Path) -> list[Document]:
    """Passages: a JSON list of {text, title, doc_id}, or any text file as one passage."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [Document(text=text, title=path.name)]
        return [Document.model_validate(item) for item in json.loads(text)]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"documents {path} cannot be read: {' '.join(str(error).split())}") from error
