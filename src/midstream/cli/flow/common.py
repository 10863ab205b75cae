"""What the flow verbs share: where a flow runs, what is seen of it, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from midstream.backend import Backend, Portal
from midstream.cli.common import open_engine, print_json, read_chat
from midstream.errors import InputError
from midstream.types import Chat, Message

if TYPE_CHECKING:
    from midstream.flows.events import Event
    from midstream.flows.run import FlowResult, Run

R = TypeVar("R", bound="FlowResult")
S = TypeVar("S", bound=BaseModel)

Url = Annotated[
    str | None,
    typer.Option(
        "--backend", help="A server's URL instead of a model in this process; its key is read from MIDSTREAM_API_KEY."
    ),
]
ChatFile = Annotated[
    Path | None, typer.Option("--chat", "-c", help="Chat file (JSON) to go on from; - is standard input.")
]
Seed = Annotated[int | None, typer.Option(help="Makes the run the same each time; drawn and shown when not given.")]
Deadline = Annotated[float | None, typer.Option("--deadline", help="Seconds after which it ends with what it has.")]
Budget = Annotated[
    int | None, typer.Option("--budget", help="Tokens that may be computed, prompt and answers; then it ends.")
]


class Place:
    """Where flows run: a backend, and the event loop that its calls belong to."""

    def __init__(self, backend: Backend, portal: Portal) -> None:
        self.backend = backend
        self._portal = portal

    def finish(self, flow: Coroutine[Any, Any, R], run: Run) -> R:
        """Run a flow to its end. Control-C ends it with what it has."""
        future = self._portal.submit(flow)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._portal.call_soon(run.cancel)
            return future.result()


@contextmanager
def place(
    url: str | None, model: str, adapters: list[Path] | None, dtype: str | None, *, progress: bool
) -> Iterator[Place]:
    """A server's backend, or an engine in this process."""
    if url is None:
        with open_engine(model, adapters, dtype, progress=progress) as engine:
            yield Place(engine.aio, engine.portal)
        return
    if adapters or dtype:
        raise InputError("--adapters and --dtype are for a model in this process: the server has its own")
    from midstream.remote import RemoteBackend

    portal = Portal()
    backend = RemoteBackend(url, api_key=os.environ.get("MIDSTREAM_API_KEY"))
    try:
        yield Place(backend, portal)
    finally:
        portal.run(backend.aclose())
        portal.close()


class Watcher:
    """Shows a run's events: text on standard output as it comes, everything else on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._open = False

    def __call__(self, event: Event) -> None:
        if self._quiet:
            return
        if event.kind == "text" and event.data.get("index", 0) == 0:
            typer.echo(event.data["text"], nl=False)
            self._open = True
            return
        line = _LINES.get(event.kind, lambda _: None)(event)
        if line is not None:
            self.end_line()
            self._console.print(line, style="dim", markup=False)

    def end_line(self) -> None:
        """End a line of text that is still open."""
        if self._open:
            typer.echo()
            self._open = False


def _decision(event: Event) -> str:
    return f"{event.step}: {event.data['outcome']} ({event.data['reason']})"


def _candidate(event: Event) -> str:
    return f"{event.step}: " + ", ".join(f"{name} {value}" for name, value in event.data.items())


def _observation(event: Event) -> str:
    return f"{event.step}: {event.data}"


_LINES: dict[str, Callable[[Event], str | None]] = {
    "decision": _decision,
    "candidate": _candidate,
    "observation": _observation,
}


def close(result: FlowResult, *, as_json: bool) -> None:
    """Print a result for programs, and end with its error if it has one."""
    if as_json:
        print_json(result.as_dict())
    else:
        usage = result.usage
        typer.echo(
            f"{result.seconds:.1f} s, {usage.computed_tokens} prompt tokens computed, {usage.cached_tokens} reused, "
            f"{usage.completion_tokens} generated, seed {result.seed}",
            err=True,
        )
    sys.stdout.flush()
    result.raise_for_error()


def conversation_of(prompt: str | None, chat: Path | None) -> Chat:
    """The conversation to answer: a chat file, a prompt, or a chat file with the prompt as its next turn."""
    if prompt is None and chat is None:
        raise InputError("give a prompt, or --chat, or both")
    found = None if chat is None else read_chat(chat)
    if prompt is None:
        assert found is not None
        return found
    turn = Message(role="user", content=prompt)
    if found is None:
        return Chat(messages=(turn,))
    if found.documents:
        raise InputError("a chat file with documents asks a question already: leave the prompt away")
    return found.model_copy(update={"messages": (*found.messages, turn)})


def settings_of(kind: type[S], **given: Any) -> S:
    """A flow's settings of the options that were given. Raises InputError that names what is wrong."""
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise InputError(wrong) from error
