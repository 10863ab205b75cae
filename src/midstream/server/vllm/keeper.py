"""Runs a command, and ends it with all that it has started when standard input closes.

The server starts vLLM through this. However the server ends, killed with no time to do anything included, the other
end of the pipe closes with it, and the signals reach every process of vLLM's. Imports nothing of midstream.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

_GRACE_S = 20.0


def main(command: list[str]) -> int:
    """Run the command to its end. Its exit status, or 128 and the signal that ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(*_: Any) -> None:
        threading.Thread(target=_end, args=(child,), daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    threading.Thread(target=_when_alone, args=(child,), daemon=True).start()
    status = child.wait()
    _signal(child, signal.SIGKILL)  # to whatever it has left behind
    return status if status >= 0 else 128 - status


def _when_alone(child: subprocess.Popen[bytes]) -> None:
    # Not through sys.stdin, whose lock this would hold when the interpreter ends.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, and do not ask again."""
    _signal(child, signal.SIGTERM)
    end = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
