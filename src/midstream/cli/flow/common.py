"""What the flow verbs share: their options, where a flow runs, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from midstream.backend import Backend, Portal
from midstream.cli.common import open_engine, print_json, read_chat, show_progress
from midstream.cli.flow.watcher import Texts, Watcher
from midstream.errors import Cancelled, InputError
from midstream.types import Chat, Message

if TYPE_CHECKING:
    from midstream.flows.run import FlowResult, Run

R = TypeVar("R", bound="FlowResult")
S = TypeVar("S", bound=BaseModel)

Prompt = Annotated[str | None, typer.Argument(help="What to answer; with --chat, the next turn after it.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--backend", help="A server's URL instead of a model in this process; its key is read from MIDSTREAM_API_KEY."
    ),
]
ChatFile = Annotated[
    Path | None, typer.Option("--chat", "-c", help="Chat file (JSON) to go on from; - is standard input.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.", min=0)]
Answers = Annotated[int, typer.Option("--answers", "-n", help="How many answers are drawn.", min=1, max=128)]
Requirements = Annotated[
    list[str] | None, typer.Option("--requirement", "-r", help="What the answer must meet, in words; repeatable.")
]
Requirement = Annotated[
    str | None,
    typer.Option("--requirement", "-r", help="Score answers by this, in words; it alone counts without --weight."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        "-w",
        metavar="NAME=VALUE",
        help="Weight of a score: hallucination, certainty or requirement_check; repeatable.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes the run the same each time; drawn and shown when not given.", min=0, max=2**63 - 1),
]
Deadline = Annotated[
    float | None, typer.Option("--deadline", help="Seconds after which it ends with what it has.", min=0.001)
]
Budget = Annotated[
    int | None, typer.Option("--budget", help="Tokens that may be computed, prompt and answers; then it ends.", min=1)
]


@dataclass(frozen=True)
class Asked:
    """The options that all verbs have: where a flow runs, its limits, and whether programs read its result."""

    url: str | None
    model: str
    adapters: list[Path] | None
    dtype: str | None
    seed: int | None
    deadline: float | None
    budget: int | None
    as_json: bool


class Place:
    """Where flows run: a backend, and the event loop that its calls belong to."""

    def __init__(self, backend: Backend, portal: Portal) -> None:
        self.backend = backend
        self._portal = portal

    def finish(self, flow: Coroutine[Any, Any, R], run: Run) -> R:
        """Run a flow to its end. Control-C ends it with what it has; a second one does not wait for that."""
        future = self._portal.submit(flow)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._portal.call_soon(run.cancel)
            return future.result()


@contextmanager
def place(asked: Asked) -> Iterator[Place]:
    """A server's backend, or an engine in this process."""
    if asked.url is None:
        progress = show_progress(asked.as_json)
        with open_engine(asked.model, asked.adapters, asked.dtype, progress=progress) as engine:
            yield Place(engine.aio, engine.portal)
        return
    if asked.adapters or asked.dtype:
        raise InputError("--adapters and --dtype are for a model in this process: the server has its own")
    from midstream.remote import RemoteBackend

    portal = Portal()
    backend = RemoteBackend(asked.url, api_key=os.environ.get("MIDSTREAM_API_KEY"))
    try:
        yield Place(backend, portal)
    finally:
        portal.run(backend.aclose())
        portal.close()


def perform(
    flow: Callable[[Backend, Run], Coroutine[Any, Any, R]],
    asked: Asked,
    texts: Texts = "answer",
    *,
    where: AbstractContextManager[Place] | None = None,
) -> R:
    """Run a flow where it was asked for, or at the place that is given, and show it as it runs."""
    from midstream.flows.run import Run

    watcher = Watcher(texts, quiet=asked.as_json)
    run = Run(deadline_s=asked.deadline, max_tokens=asked.budget, seed=asked.seed, on_event=watcher)
    with where or place(asked) as found:
        try:
            return found.finish(flow(found.backend, run), run)
        finally:
            watcher.end_line()


def close(result: FlowResult, text: str | None = None, *, as_json: bool) -> None:
    """Print a result, whole or not, and then end with what stopped it.

    `text` is the answer, where it was not shown as it came. Raises the result's error, and after Control-C
    KeyboardInterrupt.
    """
    if as_json:
        print_json(result.as_dict())
    else:
        if text:
            typer.echo(text)
        usage = result.usage
        typer.echo(
            f"{result.seconds:.1f} s, {usage.computed_tokens} prompt tokens computed, {usage.cached_tokens} reused, "
            f"{usage.completion_tokens} generated, seed {result.seed}",
            err=True,
        )
    sys.stdout.flush()
    if isinstance(result.error, Cancelled):
        raise KeyboardInterrupt
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


def weights_of(given: list[str] | None, requirement: str | None) -> dict[str, float] | None:
    """Weights by scorer; None for the flow's own. A requirement weighs 1 where no weight is given for it."""
    if given is None and requirement is None:
        return None
    weights = dict(_weight(each) for each in given or ())
    if requirement is not None:
        weights.setdefault("requirement_check", 1.0)
    return weights


def written_to(file: Path | None, option: str) -> None:
    """Refuse a file that cannot be written before anything is run for it."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise InputError(f"{option}: {file} cannot be written: give a file in a folder that exists")


def _weight(given: str) -> tuple[str, float]:
    name, sign, value = given.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        reason = f"{value!r} is no number" if sign else "it has no ="
        raise InputError(f"--weight {given}: {reason}; write NAME=VALUE, as in certainty=0.5") from error
