"""Tools: what an agent may call, each with a JSON schema of its arguments."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import jsonschema
from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import ArgsKwargs, to_json

from midstream.backend import Backend
from midstream.errors import InputError, MidstreamError, OutputError
from midstream.flows.agent_step import AgentStep
from midstream.flows.run import Run
from midstream.transcript import Transcript

Arguments = Mapping[str, Any]
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Observation:
    """What an agent sees of a tool's call. `failed`: there is no result, and the text says why."""

    text: str
    failed: bool = False


@dataclass(frozen=True)
class _Offered:
    name: str
    description: str
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"tool {self.name!r}: a name is a letter and then letters, digits, _ or -, at most 64")
        if self.parameters.get("type") != "object":
            raise InputError(f"tool {self.name}: the schema of its parameters is not one of an object")
        try:
            jsonschema.validators.validator_for(self.parameters).check_schema(dict(self.parameters))
        except jsonschema.SchemaError as error:
            raise InputError(f"tool {self.name}: its parameters are no JSON schema: {error.message}") from error

    def problem(self, arguments: Arguments) -> str | None:
        """Why arguments do not fit the schema, None where they do."""
        validator = jsonschema.validators.validator_for(self.parameters)(self.parameters)
        found = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
        if found is None:
            return None
        at = ".".join(map(str, found.absolute_path))
        return f"{at}: {found.message}" if at else found.message


@dataclass(frozen=True)
class Tool(_Offered):
    """A function that an agent may call. `run` takes the arguments by name, sync (in a thread) or async.

    What it gives back becomes JSON, a text stays as it is. Raises InputError for a bad name or schema.
    """

    run: Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Where in a run a tool is called.

    `transcript` is the conversation so far, with the step's thought as its last turn if there is one; `source` is the
    flow's own backend. `agents_left` more agents may be called one below the other. `inner` takes the steps of one.
    """

    run: Run
    source: Backend
    step: str
    transcript: Transcript
    agents_left: int
    inner: list[AgentStep] = field(default_factory=list)

    @property
    def backend(self) -> Backend:
        """The backend as this step of the run sees it."""
        return self.run.backend(self.source, self.step)


@dataclass(frozen=True)
class FlowTool(_Offered):
    """A tool that works inside the agent's run, on its conversation and its backend. `nests`: it calls an agent.

    Its calls are the run's, held to the run's limits, and what stops those stops the agent.
    """

    within: Callable[[Place, Arguments], Awaitable[Any]]
    nests: bool = False


AnyTool = Tool | FlowTool


@runtime_checkable
class ToolHost(Protocol):
    """A backend that has a say in tools' calls: one that records what they give, or gives what was recorded."""

    async def observed(
        self, name: str, arguments: Arguments, work: Callable[[], Awaitable[Observation]]
    ) -> Observation:
        """The observation of a call, which `work` makes."""
        ...


def tool(function: Callable[..., Any]) -> Tool:
    """A tool from a typed function: its name, the first paragraph of its docstring, and its parameters.

    Raises InputError for parameters that cannot be told by name or have no JSON schema.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]  # a function is its arguments
        schema = adapter.json_schema()
    except (PydanticUserError, PydanticSchemaGenerationError) as error:
        raise InputError(f"tool {name}: no JSON schema for its parameters: {error}".split("\n", 1)[0]) from error

    def call(**arguments: Any) -> Any:
        return adapter.validate_python(ArgsKwargs((), arguments))

    async def acall(**arguments: Any) -> Any:
        return await call(**arguments)

    description = " ".join((inspect.getdoc(function) or "").split("\n\n", 1)[0].split())
    return Tool(name, description, schema, acall if inspect.iscoroutinefunction(function) else call)


async def observe(called: Tool, arguments: Arguments, timeout_s: float) -> Observation:
    """Call a tool. Whatever goes wrong with it is said in the observation.

    A sync function that is still running after `timeout_s`, or when the agent is cancelled, cannot be stopped: its
    thread is left alone and what it gives is not taken any more.
    """
    problem = called.problem(arguments)
    if problem is not None:
        return Observation(f"Error: {problem}", failed=True)
    timeout = asyncio.timeout(timeout_s)
    try:
        async with timeout:
            return Observation(as_text(await _result(called.run, arguments)))
    except Exception as error:
        # A tool is the caller's own and may raise anything.
        late = isinstance(error, TimeoutError) and timeout.expired()
        return Observation(f"Error: no result within {timeout_s:g} s" if late else _told(error), failed=True)


async def observe_within(called: FlowTool, place: Place, arguments: Arguments) -> Observation:
    """Call a tool that works inside the run. Raises what stops the run: all MidstreamErrors but OutputError."""
    problem = called.problem(arguments)
    if problem is not None:
        return Observation(f"Error: {problem}", failed=True)
    try:
        return Observation(as_text(await called.within(place, arguments)))
    except OutputError as error:
        return Observation(_told(error), failed=True)
    except MidstreamError:
        raise
    except Exception as error:
        return Observation(_told(error), failed=True)


def as_text(value: Any) -> str:
    """A tool's result as a model reads it: a text as it is, else compact JSON."""
    text = value if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()
    # Lone surrogates are no characters, and no tokenizer takes them.
    return text.encode("utf-8", "replace").decode()


def _told(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    return as_text(f"Error: {type(error).__name__}: {reason}" if reason else f"Error: {type(error).__name__}")


async def _result(run: Callable[..., Any], arguments: Arguments) -> Any:
    value = await (run(**arguments) if inspect.iscoroutinefunction(run) else _in_thread(lambda: run(**arguments)))
    return await value if inspect.isawaitable(value) else value


async def _in_thread(work: Callable[[], T]) -> T:
    """Work in a thread of its own: one that never ends keeps neither the process nor a pool's other work waiting."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

    def settle(outcome: tuple[T | None, BaseException | None]) -> None:
        if not ended.done():
            ended.set_result(outcome)

    def body() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = work(), None
        except BaseException as error:
            outcome = None, error
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=contextvars.copy_context().run, args=(body,), name="midstream-tool", daemon=True).start()
    value, error = await ended
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"the tool ended its thread: {type(error).__name__}")
    return value  # type: ignore[return-value]
