"""A server that runs as a child of this one: started, awaited, its log passed on, ended with this process."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import httpx

from midstream.errors import BackendError
from midstream.server.vllm import keeper

log = logging.getLogger("midstream.vllm")

_POLL_S = 0.25
_KEPT_LINES = 200
_LAST_LINES = 3
# What went wrong first is far above the end of a log of several processes.
_CAUSES = 2
_CAUSE = re.compile(r"\b\w+(Error|Exception): \S")
_LEVEL = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")


class ChildServer:
    """A command that serves HTTP. Its output goes to the log line by line. It ends when this process does."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(keeper.__file__)), *command],
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt from the keyboard is for the server alone, which then ends this
        )
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ending = False
        self._died = False
        self._on_death: Callable[[], None] | None = None
        self._reader = threading.Thread(target=self._read, name="midstream-child", daemon=True)
        self._reader.start()

    @property
    def death(self) -> BackendError | None:
        """How it ended of its own; None while it runs, and where it was ended from here."""
        if not self._died:
            return None
        return BackendError(
            f"vLLM ended with status {self._process.returncode}, and is not started again by itself. "
            f"Of its last lines: {_telling(self._last) or 'it wrote nothing'}"
        )

    def wait_ready(self, url: str) -> None:
        """Until it answers at `url`/health. Raises BackendError, with its last lines, where it ends before that."""
        started = time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while True:
                if (death := self.death) is not None:
                    raise death
                try:
                    if client.get(f"{url}/health").is_success:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(_POLL_S)
        log.info("vLLM is ready after %.0f s", time.monotonic() - started)

    def when_dead(self, call: Callable[[], None]) -> None:
        """Call something, in another thread, when it has ended of its own."""
        self._on_death = call
        if self.death is not None:
            call()

    def close(self) -> None:
        """End it and wait for that. May be called again."""
        self._ending = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                if line:
                    self._last.append(line)
                    found = _LEVEL.search(line)
                    log.log(logging.getLevelNamesMapping()[found[1]] if found else logging.INFO, "%s", line)
        self._process.wait()
        self._died = not self._ending
        if self._died and self._on_death is not None:
            self._on_death()


def _telling(lines: Iterable[str]) -> str:
    """The first causes among lines, and the last ones."""
    each = list(lines)
    causes = [line for line in each[:-_LAST_LINES] if _CAUSE.search(line)]
    return " | ".join([*list(dict.fromkeys(causes))[:_CAUSES], *each[-_LAST_LINES:]])
