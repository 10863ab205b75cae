"""The engine's thread: calls between steps, and steps that wait a little for calls that are being prepared."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midstream.engine.loop import EngineLoop

ROOT = Path(__file__).parents[2]


class Core:
    """Notes what was called before each step; has work as long as something was called since the last one."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.steps: list[list[str]] = []
        self.stepped = threading.Semaphore(0)

    @property
    def has_work(self) -> bool:
        return bool(self.called)

    def call(self, name: str) -> None:
        self.called.append(name)

    def step(self, _: Any) -> bool:
        self.steps.append(self.called)
        self.called = []
        self.stepped.release()
        return True

    def fail_all(self, _: Exception) -> None:
        pass


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def loop(core: Core, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineLoop]:
    monkeypatch.setattr("midstream.engine.loop._TOGETHER_S", 60.0)
    loop = EngineLoop(core, None)  # type: ignore[arg-type]
    yield loop
    loop.close()


def test_a_step_waits_for_a_call_that_is_being_prepared(core: Core, loop: EngineLoop) -> None:
    with loop.expecting():
        loop.call(lambda: core.call("first"))
        loop.call(lambda: core.call("second"))
    assert core.stepped.acquire(timeout=30)
    assert core.steps == [["first", "second"]]


def test_a_call_that_fails_while_it_is_prepared_is_not_waited_for(core: Core, loop: EngineLoop) -> None:
    with contextlib.suppress(ValueError), loop.expecting():
        loop.call(lambda: core.call("first"))
        raise ValueError
    assert core.stepped.acquire(timeout=30)
    assert core.steps == [["first"]]


def test_a_step_does_not_wait_for_ever(core: Core, loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midstream.engine.loop._TOGETHER_S", 0.01)
    with loop.expecting():
        loop.call(lambda: core.call("first"))
        assert core.stepped.acquire(timeout=30)
    assert core.steps == [["first"]]


def test_what_runs_already_does_not_wait(core: Core, loop: EngineLoop) -> None:
    """A step with nothing new goes on while a request is being read."""
    loop.call(lambda: core.call("first")).result(timeout=30)
    assert core.stepped.acquire(timeout=30)
    core.called.append("left over")
    with loop.expecting():
        with loop._wake:
            loop._wake.notify()
        assert core.stepped.acquire(timeout=30)
    assert core.steps[-1] == ["left over"]


def test_closing_does_not_wait_for_what_is_being_prepared(core: Core, loop: EngineLoop) -> None:
    with loop.expecting():
        loop.call(lambda: core.call("first"))
        loop.close()
    assert core.steps == []


LEFT_OPEN = """
import asyncio, threading
from midstream.types import Request, SamplingParams
from tests.helpers import tiny_llama
from tests.tiny import tiny_engine

engine = tiny_engine(tiny_llama())
params = SamplingParams(max_tokens=400, ignore_eos=True)
running = asyncio.new_event_loop()
threading.Thread(target=running.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(engine.complete(Request(prompt=(5, 6, 7), params=params)), running)
while not engine._core.forwards:
    pass
"""


def test_python_may_end_while_an_engine_is_at_work() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, "")
