"""An agent: it thinks, acts by a tool, observes what comes of it, and so on until it answers.

    … user turn │ header │ thought ⏎ {"tool":…} │ end │ user: Observation: … │ header │ thought ⏎ {"answer":…} │ end
                └────────────── one assistant turn ───┘

All is added to one transcript and nothing before it changes, so that each request reads what is new since the last one.
The thought is free text up to the end of its line; the action behind it is held to the tools' schemas.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from midstream.backend import Backend
from midstream.errors import InputError, OutputError
from midstream.flows.agent_prompt import Chosen, action_schema, introduced, introduction, read_action
from midstream.flows.agent_step import AgentStep, invoked_dict
from midstream.flows.answer import streamed
from midstream.flows.invocable import invocables
from midstream.flows.run import FlowResult, Run
from midstream.flows.seeds import derive
from midstream.flows.tools import (
    AnyTool,
    Arguments,
    FlowTool,
    Observation,
    Place,
    Tool,
    ToolHost,
    observe,
    observe_within,
)
from midstream.transcript import Transcript, closing
from midstream.types import Chat, CompletionChoice, Invocable, InvokedCall, Message, Request, SamplingParams

Stopped = Literal["answered", "max_steps", "error"]

_NO_CHOICE = CompletionChoice(0, "", (), "stop")


class AgentSettings(BaseModel):
    """How far an agent may go.

    `max_steps`: the last one can only answer. `max_depth`: how many agents may be at work one below the other, this
    one included; at the lowest, tools that call agents are not offered. `think_tokens` 0: no thoughts. An action has
    at most `act_tokens`; a string in it, where its schema does not say, at most `string_chars` characters. An
    observation is cut at `observation_chars`. `invoke` names the adapters that the thoughts may invoke, at most
    `max_invocations` times in one; their answers count to `think_tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int = Field(default=6, ge=1, le=1000)
    max_depth: int = Field(default=2, ge=1, le=16)
    think_tokens: int = Field(default=48, ge=0)
    act_tokens: int = Field(default=256, ge=1)
    string_chars: int = Field(default=400, ge=1, le=65536)
    observation_chars: int = Field(default=1000, ge=1)
    tool_timeout_s: float = Field(default=30.0, gt=0)
    temperature: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    invoke: tuple[str, ...] = Field(default=(), max_length=64)
    max_invocations: int = Field(default=8, ge=1)

    @field_validator("invoke")
    @classmethod
    def _check_invoke(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("invoke names an adapter more than once")
        return names


@dataclass(frozen=True, kw_only=True)
class AgentRun(FlowResult):
    """What an agent did, and its answer.

    `stopped`: by its own answer, by the answer that its last step had to give, or by the `error`; `answer` is then
    empty. `transcript` is the conversation to go on with: all turns that are whole.
    """

    steps: tuple[AgentStep, ...]
    answer: str
    stopped: Stopped
    transcript: Transcript

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": [step.as_dict() for step in self.steps],
            "answer": self.answer,
            "stopped": self.stopped,
            **super().as_dict(),
        }


async def agent(
    backend: Backend,
    conversation: Chat | Transcript,
    tools: Sequence[AnyTool] = (),
    settings: AgentSettings | None = None,
    *,
    run: Run | None = None,
) -> AgentRun:
    """Answer the last user turn of a conversation with the help of tools.

    What stops the agent is the result's `error`, beside all its steps. A tool that fails, and an action that ran out
    of tokens, do not stop it: the model is told. An action that did so in the last step is an OutputError.
    """
    settings, run = settings or AgentSettings(), run or Run()
    steps: list[AgentStep] = []
    found = _Agent(backend, tools, settings, run, steps, agents_left=settings.max_depth - 1)
    await run.execute(lambda: found.play(conversation))
    return run.end(
        AgentRun(
            steps=tuple(steps),
            answer=found.answer,
            stopped=found.stopped,
            transcript=found.transcript,
            **run.finish(),
        )
    )


def agent_tool(
    name: str, description: str, tools: Sequence[AnyTool] = (), settings: AgentSettings | None = None
) -> FlowTool:
    """A tool that gives a task to an agent with tools of its own, and its answer back.

    It works in the run of the agent that calls it: within its limits, with its events, its steps in that step.
    """
    own = settings or AgentSettings()

    async def within(place: Place, arguments: Arguments) -> str:
        left = min(place.agents_left, own.max_depth) - 1
        inner = _Agent(place.source, tools, own, place.run, place.inner, agents_left=left, path=f"{place.step}/")
        await inner.play(Chat(messages=(Message(role="user", content=arguments["task"]),)))
        return inner.answer

    parameters = {
        "type": "object",
        "properties": {"task": {"type": "string", "minLength": 1}},
        "required": ["task"],
        "additionalProperties": False,
    }
    return FlowTool(name, description, parameters, within, nests=True)


class _Agent:
    """What an agent has done so far. The last of `steps` is the one at work."""

    def __init__(
        self,
        backend: Backend,
        tools: Sequence[AnyTool],
        settings: AgentSettings,
        run: Run,
        steps: list[AgentStep],
        *,
        agents_left: int,
        path: str = "",
    ) -> None:
        self.source = backend
        self.tools = tuple(each for each in tools if agents_left or not (isinstance(each, FlowTool) and each.nests))
        self.settings = settings
        self.run = run
        self.steps = steps
        self.agents_left = agents_left
        self.path = path
        self.answer = ""
        self.stopped: Stopped = "error"
        self.transcript = Transcript()
        self.newline: tuple[int, ...] = ()
        self.end: tuple[int, ...] = ()
        self.invocable: tuple[Invocable, ...] = ()
        self.stop: tuple[str, ...] = ("\n",)

    async def play(self, conversation: Chat | Transcript) -> None:
        _check_names(self.tools)
        text = introduction(self.tools, thinks=self.settings.think_tokens > 0)
        self.transcript = await introduced(self.source, conversation, text)
        await self._prepare_thinking()
        for number in range(1, self.settings.max_steps + 1):
            self.steps.append(AgentStep(number))
            started, before = time.monotonic(), self.run.tokens_spent
            try:
                if await self._step(last=number == self.settings.max_steps):
                    return
            finally:
                tokens = self.run.tokens_spent - before
                self._note(seconds=time.monotonic() - started, tokens=tokens)

    async def _prepare_thinking(self) -> None:
        if not self.settings.think_tokens:
            if self.settings.invoke:
                raise InputError("adapters in `invoke` are invoked by thoughts, and think_tokens is 0")
            return
        self.newline, self.end = await self.source.tokenize("\n"), await closing(self.source)
        backend = self.run.backend(self.source, f"{self.path}invoke") if self.settings.invoke else self.source
        self.invocable = await invocables(backend, self.settings.invoke)
        texts = [info.invocation_text for info in await backend.adapters() if info.name in self.settings.invoke]
        if any("\n" in text for text in texts):
            self.stop = ()  # the line's end is a part of the invocation, so only the turn's end can end the thought

    # ------------------------------------------------------------------ a step

    async def _step(self, *, last: bool) -> bool:
        """One step; whether it has answered."""
        asked = self.transcript
        prompt = await asked.prompt(self.source)
        thought = await self._think(prompt)
        tools = () if last else self.tools
        acted = await self._act((*prompt, *thought.token_ids), tools)
        whole = replace(acted, text=thought.text + acted.text, token_ids=thought.token_ids + acted.token_ids)
        self.transcript = await asked.answered(self.source, prompt, whole)
        chosen = read_action(acted.text, tools)
        if chosen is not None and chosen.answer is not None:
            self._answer(chosen.answer, last=last)
            return True
        if last:
            self._note(action="unusable")
            raise OutputError(f"the agent's last step gave no whole answer within {self.settings.act_tokens} tokens")
        if thought.token_ids:
            asked = await asked.answered(self.source, prompt, thought)
        await self._observe(self._unusable() if chosen is None else await self._use(chosen, asked))
        return False

    async def _think(self, prompt: tuple[int, ...]) -> CompletionChoice:
        """The thought with the end of its line; empty without thoughts."""
        if not self.settings.think_tokens:
            return _NO_CHOICE
        request = Request(
            prompt=prompt,
            params=self._params("think", max_tokens=self.settings.think_tokens, stop=self.stop),
            invocable=self.invocable,
            max_invocations=self.settings.max_invocations,
        )
        step = self._name("think")
        completion = await streamed(self.run.backend(self.source, step), request, self._grow_thought)
        choice = completion.choices[0]
        self._note(thought=choice.text, calls=choice.calls)
        for call in choice.calls:
            self._tell_call(step, call)
        return replace(choice, text=choice.text + "\n", token_ids=self._line(choice))

    def _line(self, choice: CompletionChoice) -> tuple[int, ...]:
        """A thought's tokens without an end of the turn, and with the line's: the action is of the same turn."""
        tokens = choice.token_ids
        if self.end and tokens[-1:] == self.end[:1]:
            return tokens[:-1] + self.newline
        # What stopped it otherwise is the end of the line, which is among its tokens.
        return tokens if choice.finish_reason == "stop" else tokens + self.newline

    async def _act(self, prompt: tuple[int, ...], tools: Sequence[AnyTool]) -> CompletionChoice:
        constraint = action_schema(tools, string_chars=self.settings.string_chars)
        params = self._params("act", max_tokens=self.settings.act_tokens, constraint=constraint)
        backend = self.run.backend(self.source, self._name("act"))
        completion = await streamed(backend, Request(prompt=prompt, params=params), self._grow_text)
        return completion.choices[0]

    def _params(self, kind: str, **more: Any) -> SamplingParams:
        seed = derive(self.run.seed, self._name(kind))
        return SamplingParams(seed=seed, temperature=self.settings.temperature, top_p=self.settings.top_p, **more)

    # ------------------------------------------------------------------ what comes of it

    def _answer(self, answer: str, *, last: bool) -> None:
        self.answer, self.stopped = answer, "max_steps" if last else "answered"
        self._note(action="answer")
        reason = "the last step can only answer" if last else "the model answered"
        self.run.decide(self._name("act"), "answer", reason)

    def _unusable(self) -> Observation:
        self._note(action="unusable")
        return Observation(
            f"Error: no whole action within {self.settings.act_tokens} tokens: write a shorter one", failed=True
        )

    async def _use(self, chosen: Chosen, transcript: Transcript) -> Observation:
        called = next(each for each in self.tools if each.name == chosen.tool)
        arguments = chosen.arguments or {}
        self._note(action="tool", tool=called.name, arguments=arguments)
        self.run.decide(self._name("act"), called.name, "the model called this tool")
        step = self._name(called.name)
        if isinstance(called, Tool):
            self.run.tell("step", step)
            return await self._called(called, arguments)
        place = Place(self.run, self.source, step, transcript, self.agents_left)
        try:
            return await observe_within(called, place, arguments)
        finally:
            self._note(steps=tuple(place.inner))

    async def _called(self, called: Tool, arguments: Arguments) -> Observation:
        def work() -> Any:
            return observe(called, arguments, self.settings.tool_timeout_s)

        if isinstance(self.source, ToolHost):
            return await self.source.observed(called.name, arguments, work)
        observation: Observation = await work()
        return observation

    async def _observe(self, observation: Observation) -> None:
        text = _cut(observation.text, self.settings.observation_chars)
        self._note(observation=text, failed=observation.failed)
        step = self.steps[-1]
        told = {"tool": step.tool, "arguments": step.arguments, "text": text, "failed": observation.failed}
        self.run.tell("observation", self._name(step.tool or "act"), told)
        turn = Message(role="user", content=f"Observation: {text}")
        self.transcript = await self.transcript.add(self.source, turn)

    # ------------------------------------------------------------------ keeping and telling

    def _name(self, what: str) -> str:
        return f"{self.path}{self.steps[-1].number}.{what}"

    def _note(self, **found: Any) -> None:
        self.steps[-1] = replace(self.steps[-1], **found)

    def _grow_thought(self, text: str) -> None:
        self._note(thought=self.steps[-1].thought + text)

    def _grow_text(self, text: str) -> None:
        self._note(text=self.steps[-1].text + text)

    def _tell_call(self, step: str, call: InvokedCall) -> None:
        self.run.tell("call", step, invoked_dict(call))


def _check_names(tools: Sequence[AnyTool]) -> None:
    names = [each.name for each in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"several tools have the same name: {', '.join(twice)}")


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} [cut: {characters} of {len(text)} characters]"
