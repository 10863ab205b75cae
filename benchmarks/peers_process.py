"""A worker seen from the harness: a process that answers one JSON line with another."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.peers_protocol import Absent, Answer, Call, Setup

ROOT = Path(__file__).parents[1]
_LAST_WORDS = 3  # lines of a dead worker's log that are told


class WorkerError(Exception):
    """A worker failed, died or kept silent."""


class Ran(NamedTuple):
    """Answers to calls, and the worker's own wall seconds for them."""

    answers: tuple[Answer, ...]
    seconds: float


class Worker:
    """A side's process. `log` takes what it writes to its standard error; `timeout_s` is for one answer."""

    def __init__(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, timeout_s: float = 1800.0
    ) -> None:
        self._log = log
        self._timeout_s = timeout_s
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Reading in a thread of its own is what lets an answer be waited for with a limit. It sleeps meanwhile.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def load(self, setup: Setup) -> dict[str, Any]:
        facts: dict[str, Any] = self.ask("load", setup=asdict(setup))
        return facts

    def clear(self) -> None:
        self.ask("clear")

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self.ask("warm", prompts=prompts)

    def run(self, calls: Sequence[Call], *, logprobs: bool = False) -> Ran:
        found = self.ask("run", calls=[asdict(call) for call in calls], logprobs=logprobs)
        return Ran(tuple(map(Answer.read, found["answers"])), found["seconds"])

    def ask(self, op: str, **fields: Any) -> Any:
        """One question. Raises Absent or WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty as error:
            raise WorkerError(f"{op}: no answer within {self._timeout_s:g} s") from error
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{op}: {self._last_words()}")
        reply = json.loads(line)
        if "absent" in reply:
            raise Absent(reply["absent"])
        if "error" in reply:
            raise WorkerError(f"{op}: {reply['error']}")
        return reply["ok"]

    def peak_bytes(self, *, children_only: bool) -> int | None:
        """Peak resident memory of the process and its descendants, summed; None where the system does not tell."""
        pids = _descendants(self._process.pid)
        peaks = [_peak(pid) for pid in (pids[1:] if children_only else pids)]
        return sum(peaks) or None

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            # Its children would outlive it.
            for pid in reversed(_descendants(self._process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=10)
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        code = self._process.wait()
        words = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_WORDS:]
        return f"the worker ended with {code}: {' / '.join(words) or 'without a word'}"


def module(name: str, python: str | Path = sys.executable) -> list[str]:
    """The command of a worker that is a module of this package."""
    return [str(python), "-m", f"benchmarks.{name}"]


def _descendants(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, listed.read_text().split())
            except OSError:
                continue  # that thread has just ended
    return found


def _peak(pid: int) -> int:
    """Peak resident bytes of one process, 0 where it is gone or the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
