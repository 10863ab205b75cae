"""Adapters that an agent's own thoughts invoke."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from midstream.engine.engine import AsyncEngine
from midstream.errors import AdapterNotFound, ContractError
from midstream.flows.agent import AgentRun, AgentSettings, agent
from midstream.flows.events import Event
from midstream.flows.invocable import invocables
from midstream.flows.run import Run
from midstream.types import AdapterInfo, Chat, Choice, Completion, Constraint, Delta, Message, Regex, Request
from tests.flows.backends import END, LIBRARY, Scripted, text_of
from tests.flows.engines import check_idle
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.intrinsics.reference import config
from tests.tiny import tiny_chat, tiny_engine

CHAT = Chat(messages=(Message(role="user", content="Hello."),))
INVOCATIONS = {"sure": "<sure>", "line": "sure?\n", "turn": "<|im_start|>judge\n"}
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("invoked")
    made = []
    for seed, (name, text) in enumerate(INVOCATIONS.items()):
        folder = make_adapter_folder(
            tiny_llama(), root / name, targets=SEVEN, invocation=tiny_chat().encode(text), seed=seed
        )
        shutil.copy(LIBRARY / "certainty" / "io.yaml", folder / "io.yaml")
        (folder / "midstream.json").write_text(json.dumps({"format": 1, "invocation_text": text}))
        made.append(folder)
    return made


@pytest.fixture
async def engine(folders: list[Path]) -> AsyncIterator[AsyncEngine]:
    engine = tiny_engine(tiny_llama())
    for folder in folders:
        await engine.load_adapter(folder)
    yield engine
    await check_idle(engine)
    await engine.aclose()


class Writing:
    """An engine whose base model thinks what a constraint has it think."""

    def __init__(self, engine: AsyncEngine, constraint: Constraint) -> None:
        self.engine = engine
        self.constraint = constraint

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        if request.invocable:
            params = request.params.model_copy(update={"constraint": self.constraint})
            request = request.model_copy(update={"params": params})
        async for delta in self.engine.stream(request):
            yield delta

    async def complete(self, request: Request) -> Completion:
        return await self.engine.complete(request)

    async def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> Any:
        return await self.engine.score(request, continuations)

    async def tokenize(self, prompt: str | Chat, *, header: bool = True) -> tuple[int, ...]:
        return await self.engine.tokenize(prompt, header=header)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        return await self.engine.adapters()


async def thinking(
    engine: AsyncEngine, constraint: Constraint, *names: str, **more: Any
) -> tuple[AgentRun, list[Event]]:
    events: list[Event] = []
    settings = AgentSettings(max_steps=1, think_tokens=60, string_chars=6, invoke=names, **more)
    run = Run(seed=1, on_event=events.append)
    return await agent(Writing(engine, constraint), CHAT, settings=settings, run=run), events


async def test_a_thought_invokes_an_adapter_by_a_plain_text_and_goes_on(engine: AsyncEngine) -> None:
    found, events = await thinking(engine, Regex(pattern=r"It is [a-c]<sure>, so [a-c]\n"), "sure")
    assert found.error is None
    (step,) = found.steps
    (call,) = step.calls
    assert call.adapter == "sure"
    assert call.text in set("0123456789")
    assert call.probabilities is not None
    assert sum(call.probabilities.values()) == pytest.approx(1)
    assert step.thought[7:-1] == f"<sure>{call.text}, so "
    think, act = found.calls
    # The letter before it was sampled, and the constraint forced the invocation: nobody has computed its KV either.
    assert call.usage.computed_tokens == len("a<sure>")
    # So it is with the last letter and the end of the line; all before was read when that letter was sampled.
    assert act.usage.computed_tokens == len("a\n")
    assert act.outcome.prompt_token_ids == (  # type: ignore[union-attr]
        *think.outcome.prompt_token_ids,  # type: ignore[union-attr]
        *think.outcome.token_ids,  # type: ignore[union-attr]
    )
    told = [event for event in events if event.kind == "call" and event.data["adapter"] == "sure"]
    assert [(event.step, event.data["text"]) for event in told] == [("1.think", call.text)]
    assert json.loads(json.dumps(found.as_dict()))["steps"][0]["calls"][0]["text"] == call.text


async def test_an_adapter_may_be_invoked_more_than_once_but_not_without_end(engine: AsyncEngine) -> None:
    found, _ = await thinking(engine, Regex(pattern=r"a<sure>b<sure>c\n"), "sure")
    assert [call.adapter for call in found.steps[0].calls] == ["sure", "sure"]
    found, _ = await thinking(engine, Regex(pattern=r"a<sure>b<sure>c\n"), "sure", max_invocations=1)
    assert len(found.steps[0].calls) == 1
    assert found.steps[0].thought.endswith("b<sure>")
    assert found.error is None, "the thought is cut there, and the action follows"


async def test_an_invocation_may_end_a_line_and_the_thought_goes_on(engine: AsyncEngine) -> None:
    found, _ = await thinking(engine, Regex(pattern=r"a sure\?\n, b"), "line")
    assert found.error is None
    (call,) = found.steps[0].calls
    assert found.steps[0].thought == f"a sure?\n{call.text}, b"


async def test_a_turns_header_inside_the_turn_opens_one_of_the_adapters(engine: AsyncEngine) -> None:
    # Grammars know no special tokens; a choice's options are tokenized with them.
    found, _ = await thinking(engine, Choice(options=("a<|im_start|>judge\nb",)), "turn")
    assert found.error is None
    (call,) = found.steps[0].calls
    assert found.steps[0].thought == f"a<|im_start|>judge\n{call.text}{TURN_END}b"
    # One behind the end of the model's turn is never reached: the output has ended.
    found, _ = await thinking(engine, Choice(options=("a<|im_end|>\n<|im_start|>judge\nb",)), "turn")
    assert found.error is None
    assert (found.steps[0].thought, found.steps[0].calls) == ("a", ())
    text = tiny_chat().decode(found.calls[1].outcome.prompt_token_ids)  # type: ignore[union-attr]
    assert text.endswith("<|im_start|>assistant\na\n"), "the action is of the same turn"


async def test_closings_come_from_the_template(engine: AsyncEngine) -> None:
    sure, turn = await invocables(engine, ["sure", "turn"])
    assert (sure.adapter, sure.closing) == ("sure", ())
    assert tiny_chat().decode(turn.closing) == TURN_END
    assert isinstance(turn.params.constraint, Choice)
    assert turn.params.max_tokens == 3
    assert await invocables(engine, []) == ()
    scripted = Scripted({"certainty": {9: 1.0}})
    (plain,) = await invocables(scripted, ["certainty"])
    assert plain.closing == ()
    scripted.infos["certainty"] = _called(scripted, "assistant!")
    (headed,) = await invocables(scripted, ["certainty"])
    assert text_of(headed.closing) == f"{END}assistant: "


def _called(backend: Scripted, text: str, **contract: Any) -> AdapterInfo:
    info = backend.infos["certainty"]
    shown = {"contract": json.dumps(config(**contract))} if contract else {}
    return AdapterInfo(
        info.name, "alora", "d", "", tuple(map(ord, text)), text, 4, 10, **{"contract": info.contract, **shown}
    )


@pytest.mark.parametrize(
    ("contract", "reason"),
    [
        ({"instruction": "Well?"}, "has an instruction"),
        ({"sentence_boundaries": {"last_message": "c"}}, "rewrites its prompt"),
        ({"transformations": [{"type": "nest", "input_path": [], "field_name": "n"}]}, "transforms the answer"),
        ({"parameters": {"n": 2}}, "n must be 1"),
        ({"parameters": {"n": "many"}}, "io.yaml parameters"),
    ],
)
async def test_a_contract_that_needs_more_is_refused(contract: dict[str, Any], reason: str) -> None:
    backend = Scripted({"certainty": {9: 1.0}})
    backend.infos["certainty"] = _called(backend, "<c>", **contract)
    with pytest.raises(ContractError, match=reason):
        await invocables(backend, ["certainty"])
    with pytest.raises(AdapterNotFound):
        await invocables(backend, ["other"])
