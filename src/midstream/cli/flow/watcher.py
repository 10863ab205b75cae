"""What is seen of a run on a terminal: the answer on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from midstream.flows.events import Event

_SHOWN = 72  # characters of a text within a line

Texts = Literal["answer", "beside", "hidden"]


class Watcher:
    """Shows a run's events: lines on standard error, and `texts` as they come.

    "answer": they are the answer, for standard output. "beside": they lead to one, so standard error has them.
    "hidden": several come at once and nobody could read them. Nothing is shown where it is `quiet`.
    """

    def __init__(self, texts: Texts = "answer", *, quiet: bool) -> None:
        self._texts = "hidden" if quiet else texts
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._step: str | None = None  # whose line of text is still open

    def __call__(self, event: Event) -> None:
        if event.kind == "text":
            self._text(event.step, event.data["text"])
            return
        line = None if self._quiet else line_of(event)
        if line is not None:
            self.end_line()
            self._console.print(line, style="dim", markup=False, soft_wrap=True)

    def end_line(self) -> None:
        """End a line of text that is still open."""
        if self._step is not None:
            typer.echo(err=self._texts == "beside")
            self._step = None

    def _text(self, step: str, text: str) -> None:
        if self._texts == "hidden":
            return
        if step != self._step:
            self.end_line()
            if self._texts == "beside":
                typer.echo(f"{step}: ", nl=False, err=True)
        self._step = step
        typer.echo(text, nl=False, err=self._texts == "beside")
        sys.stdout.flush()


def line_of(event: Event) -> str | None:
    """An event in one line; None for those that others tell of anyway."""
    describe = _LINES.get(event.kind)
    told = None if describe is None else describe(event.data)
    return None if told is None else f"{event.step}: {told}"


def short(text: str) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _decision(data: Mapping[str, Any]) -> str:
    return f"{data['outcome']} ({data['reason']})"


def _candidate(data: Mapping[str, Any]) -> str:
    return f"{_judged(data)}: {short(data['text'])}"


def _judged(data: Mapping[str, Any]) -> str:
    if data["error"] is not None:
        return f"failed ({data['error']['message']})"
    if "verdicts" in data:
        return f"{sum(verdict['met'] for verdict in data['verdicts'])} of {len(data['verdicts'])} requirements met"
    scores = ", ".join(f"{name} {score:.2f}" for name, score in data["scores"].items())
    return "drawn" if data["score"] is None else f"{data['score']:.2f} ({scores})"


def _observation(data: Mapping[str, Any]) -> str:
    return short(data["text"])


def _call(data: Mapping[str, Any]) -> str | None:
    """Calls that an answer's own text made. The others are seen by what is decided from them."""
    return f"{data['adapter']} answered {short(data['text'])}" if "finish_reason" in data else None


_LINES: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "decision": _decision,
    "candidate": _candidate,
    "observation": _observation,
    "call": _call,
}
