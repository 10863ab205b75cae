"""The kernels' library in the user's cache folder: one for each source, compiler, processor, type and set of heads."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from midstream.models.source import cache_folder

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
# How compilers are told to use all of this processor: the first that they take.
_NATIVE = ("-march=native", "-mcpu=native")
_TIMEOUT_S = 600  # a busy machine gives little to what runs at low priority
_ASKED_TIMEOUT_S = 30


def compiled(number: str, heads: Sequence[int]) -> ctypes.PyDLL | None:
    """The library for a type ("float" or "bf16") and sizes of heads, compiled first when it is not in the cache yet.

    None, with the reason in the log, where there is no compiler or it fails: all works without it, slower. It is
    called with Python's lock held, for most calls take microseconds.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        log.info("no C++ compiler was found (%s): all runs on torch's own kernels", ", ".join(_COMPILERS))
        return None
    try:
        command = [compiler, *_FLAGS, _native_flag(compiler), f"-DNUMBER={number}"]
        if heads:
            command.append(f"-DHEADS={','.join(map(str, heads))}")
        target = cache_folder() / "native" / f"{_key(command)}.so"
        if not target.is_file():
            _compile([*command, str(_HERE / "kernels.cpp")], target)
        return ctypes.PyDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        log.warning("the kernels cannot be compiled, so all runs on torch's own: %s", said)
        return None


def _native_flag(compiler: str) -> str:
    for flag in _NATIVE:
        if _run([compiler, flag, "-E", "-x", "c++", os.devnull], check=False).returncode == 0:
            return flag
    raise OSError(f"{compiler} takes none of {', '.join(_NATIVE)}")


def _key(command: Sequence[str]) -> str:
    """A digest of the flags, the source, and what the compiler predefines: its version, the processor's features."""
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    digest = hashlib.sha256(" ".join((*command[1:], macros)).encode())
    for source in sorted((*_HERE.glob("*.h"), *_HERE.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(command: Sequence[str], target: Path) -> None:
    """By a program of its own, which ends its work when this process ends before it."""
    program = [sys.executable, "-I", str(_HERE / "compiling.py"), str(target), str(_TIMEOUT_S)]
    # Not in this process's group: what ends that one (Control-C) would leave the next start without a library too.
    # It may have to wait for another one's work before its own.
    _run([*program, *command], timeout_s=2 * _TIMEOUT_S, apart=True)


def _run(
    command: Sequence[str], *, check: bool = True, timeout_s: int = _ASKED_TIMEOUT_S, apart: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=check, timeout=timeout_s, start_new_session=apart
    )
