"""The trace of a flow's run: all that the flow asked of the world outside it, and what it was given.

A `Recorder` stands between a flow and its backend and writes the trace; `replay.ReplayBackend` answers from one. Any
flow can be traced: flows know nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from midstream.backend import Backend
from midstream.errors import MidstreamError, ReplayError
from midstream.flows.run import FlowResult, opened
from midstream.flows.tools import Arguments, Observation
from midstream.retrieval import Passage, Retriever
from midstream.types import AdapterInfo, Chat, Completion, Delta, Request, Score

T = TypeVar("T")

Verb = Literal["complete", "stream", "score", "tokenize", "adapters", "tool", "retrieve"]

FORMAT: Literal[1] = 1

# What each verb gives, to and from JSON. A stream gives its completion; its deltas stand beside it.
GIVEN: dict[Verb, TypeAdapter[Any]] = {
    "complete": TypeAdapter(Completion),
    "stream": TypeAdapter(Completion),
    "score": TypeAdapter(Score),
    "tokenize": TypeAdapter(tuple[int, ...]),
    "adapters": TypeAdapter(tuple[AdapterInfo, ...]),
    "tool": TypeAdapter(Observation),
    "retrieve": TypeAdapter(tuple[Passage, ...]),
}
DELTAS = TypeAdapter(tuple[Delta, ...])


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TracedError(_Part):
    """An error of this package, so that it can be raised again."""

    type: str
    message: str
    fields: dict[str, Any] = {}

    @classmethod
    def of(cls, error: MidstreamError) -> TracedError:
        fields = json.loads(json.dumps(vars(error), default=str))
        return cls(type=type(error).__name__, message=str(error), fields=fields)

    def restored(self) -> MidstreamError:
        """The error. Raises ReplayError where there is no such type."""
        kinds = {kind.__name__: kind for kind in _family(MidstreamError)}
        if self.type not in kinds:
            raise ReplayError(f"the trace has an error of the unknown type {self.type}: {self.message}")
        kind = kinds[self.type]
        # Some types make their message from other arguments, so they are not called.
        error = kind.__new__(kind)
        Exception.__init__(error, self.message)
        vars(error).update(self.fields)
        return error


class Entry(_Part):
    """One thing that was asked, and what came of it: `given`, an `error`, or neither where the flow did not wait.

    `begun` and `ended` count all beginnings and ends of a trace.
    """

    verb: Verb
    begun: int
    ended: int
    asked: Any = None
    given: Any = None
    deltas: tuple[Any, ...] = ()
    error: TracedError | None = None
    interrupted: bool = False


class Trace(_Part):
    """A run that can be kept as a file and replayed. `entries` are in the order in which they ended."""

    format: Literal[1] = FORMAT
    flow: str
    seed: int
    settings: dict[str, Any]
    result: dict[str, Any]
    entries: tuple[Entry, ...]

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        Path(path).write_text(json.dumps(self.model_dump(), ensure_ascii=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace. Raises ReplayError where the file is none, or one of another format."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReplayError(f"{path} cannot be read as a trace: {error}") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ReplayError(f"{path} is no trace of format {FORMAT}: its format is {found!r}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            raise ReplayError(f"{path} is no trace: {wrong}") from error


class Recorder:
    """A backend that notes all that a flow asks of it. One recorder for one run.

    Tools of agents are noted too; a retriever is where the flow is given `recorder.retriever(retriever)` for it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._entries: list[Entry] = []
        self._now = 0

    def trace(self, result: FlowResult, settings: BaseModel | Mapping[str, Any] | None = None) -> Trace:
        """The trace of the run that gave this result."""
        told = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings or {})
        return Trace(
            flow=type(result).__name__,
            seed=result.seed,
            settings=told,
            result=result.as_dict(),
            entries=tuple(self._entries),
        )

    def retriever(self, retriever: Retriever) -> Retriever:
        """The retriever, noted."""
        return _RecordedRetriever(self, retriever)

    # ------------------------------------------------------------------ the Backend's verbs

    async def complete(self, request: Request) -> Completion:
        return await self.note("complete", asked_of(request), self._backend.complete(request))

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        begun, asked, deltas, ended = self._tick(), asked_of(request), list[Delta](), False
        try:
            async with aclosing(opened(self._backend, request)) as stream:
                async for delta in stream:
                    if delta.completion is None:
                        deltas.append(delta)
                    else:
                        self._end("stream", begun, asked, deltas, given=delta.completion)
                        ended = True
                    yield delta
        except MidstreamError as error:
            self._end("stream", begun, asked, deltas, error=error)
            ended = True
            raise
        finally:
            if not ended:
                self._end("stream", begun, asked, deltas)

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Score:
        asked = asked_of(request, continuations)
        return await self.note("score", asked, self._backend.score(request, continuations))

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await self.note(
            "tokenize", asked_to_tokenize(prompt, header), self._backend.tokenize(prompt, header=header)
        )

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return await self.note("adapters", None, self._backend.adapters())

    async def observed(
        self, name: str, arguments: Arguments, work: Callable[[], Awaitable[Observation]]
    ) -> Observation:
        return await self.note("tool", {"name": name, "arguments": dict(arguments)}, work())

    # ------------------------------------------------------------------ noting

    async def note(self, verb: Verb, asked: Any, work: Awaitable[T]) -> T:
        """Wait for work and note what came of it."""
        begun = self._tick()
        try:
            value = await work
        except MidstreamError as error:
            self._end(verb, begun, asked, error=error)
            raise
        except BaseException:
            self._end(verb, begun, asked)
            raise
        self._end(verb, begun, asked, given=value)
        return value

    def _end(
        self,
        verb: Verb,
        begun: int,
        asked: Any,
        deltas: Sequence[Delta] = (),
        *,
        given: Any = None,
        error: MidstreamError | None = None,
    ) -> None:
        entry = Entry(
            verb=verb,
            begun=begun,
            ended=self._tick(),
            asked=asked,
            given=None if given is None else GIVEN[verb].dump_python(given, mode="json"),
            deltas=tuple(DELTAS.dump_python(tuple(deltas), mode="json")),
            error=None if error is None else TracedError.of(error),
            interrupted=given is None and error is None,
        )
        self._entries.append(entry)

    def _tick(self) -> int:
        self._now += 1
        return self._now


class _RecordedRetriever:
    def __init__(self, recorder: Recorder, retriever: Retriever) -> None:
        self._recorder = recorder
        self._retriever = retriever

    async def retrieve(self, query: str, k: int) -> Sequence[Passage]:
        return await self._recorder.note("retrieve", {"query": query, "k": k}, self._found(query, k))

    async def _found(self, query: str, k: int) -> tuple[Passage, ...]:
        return tuple(await self._retriever.retrieve(query, k))


def asked_of(request: Request, continuations: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """A request as a trace has it. Its deadline is left out: it is what was left of a run's time just then."""
    asked: dict[str, Any] = request.model_dump(mode="json", exclude={"deadline_s"})
    return asked if continuations is None else {**asked, "continuations": [list(each) for each in continuations]}


def asked_to_tokenize(prompt: str | Chat, header: bool) -> dict[str, Any]:
    """A text or a chat to be tokenized, as a trace has it."""
    return {"prompt": prompt if isinstance(prompt, str) else prompt.model_dump(mode="json"), "header": header}


def _family(kind: type[MidstreamError]) -> list[type[MidstreamError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in _family(below))]
