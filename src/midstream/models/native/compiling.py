"""A program that compiles a library into the cache: `compiling.py TARGET SECONDS COMMAND...`, which gets `-o FILE`.

It ends its work even when whoever started it is gone, so that a process of a few seconds still leaves a library to the
next one; it takes at most so many seconds. Of several programs with one target, one compiles and the others wait. What
is no library, or not whole, never gets the target's name. Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_NICENESS = 5  # whoever waits for an answer goes first; on a busy machine, the library comes nevertheless


def main(target: Path, seconds: float, command: list[str]) -> None:
    """Raises OSError, or SubprocessError with the compiler's words in `stderr`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go with the process, however that ends
        if target.is_file():
            return
        for left in target.parent.glob(f"{target.stem}-*"):  # by a program that was killed
            left.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            _run([*command, "-o", name], seconds)
            ctypes.PyDLL(name)
            os.replace(name, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _run(command: list[str], seconds: float) -> None:
    """A compiler is several processes: all of them end in time."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0], stderr=said)


if __name__ == "__main__":
    os.nice(_NICENESS)
    try:
        main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(str(getattr(error, "stderr", None) or error))
