"""The engine's thread: runs steps while there is work, and everybody else's calls between them.

All state of the core is touched by this thread alone, so nothing needs a lock but the inbox.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from midstream.engine.core import EngineCore, StepRunner
from midstream.errors import EngineStopped

T = TypeVar("T")

# How long a step may wait for requests that are being read beside one that has just come: those that come together
# then share their forwards, where the later ones would wait for a whole step.
_TOGETHER_S = 0.004

log = logging.getLogger(__name__)


class EngineLoop:
    """Owns the thread. Start it once, close it once."""

    def __init__(self, core: EngineCore, runner: StepRunner) -> None:
        self._core = core
        self._runner = runner
        self._inbox: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._expected = 0
        self._thread = threading.Thread(target=self._run, name="midstream-engine", daemon=True)
        self._thread.start()
        # Python ends with this thread in the middle of a step otherwise, which libraries in C++ answer with an abort.
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        """Whether the thread takes calls."""
        return self._thread.is_alive() and not self._closing

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread between two steps. Raises EngineStopped after `close`."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise EngineStopped("the engine is closed")
            self._inbox.append((function, future))
            self._wake.notify()
        return future

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While a call is being prepared: what has just come waits a little for it."""
        with self._wake:
            self._expected += 1
        try:
            yield
        finally:
            with self._wake:
                self._expected -= 1
                self._wake.notify()

    def close(self) -> None:
        """End all jobs with EngineStopped and wait for the thread."""
        atexit.unregister(self.close)
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._core.has_work or self._closing):
                    self._wake.wait()
                if self._inbox:
                    self._wake.wait_for(lambda: not self._expected or self._closing, timeout=_TOGETHER_S)
                calls, self._inbox = self._inbox, deque()
                closing = self._closing
            for function, future in calls:
                _answer(function, future)
            if closing:
                self._core.fail_all(EngineStopped("the engine was closed"))
                return
            try:
                self._core.step(self._runner)
            except BaseException as error:
                # A fault outside the forward (a panic of foreign code too): nobody may wait for ever, so all are told.
                log.exception("the engine's loop failed")
                self._stop(EngineStopped(f"the engine's loop failed: {error!r}"))
                return

    def _stop(self, error: EngineStopped) -> None:
        with self._wake:
            self._closing = True
            calls, self._inbox = self._inbox, deque()
        for _, future in calls:
            future.set_exception(error)
        self._core.fail_all(error)


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # the caller's, whatever it is; the loop goes on
        future.set_exception(error)
