"""Compiling the kernels with the machine's own C++ compiler, once for each processor, compiler and source."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from midstream.models.source import cache_folder

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
# How compilers are told to use all of this processor: the first that they take.
_NATIVE = ("-march=native", "-mcpu=native")
_TIMEOUT_S = 120


def compiled() -> ctypes.PyDLL | None:
    """The kernels' library, compiled into the user's cache folder when it is not there yet.

    None, with the reason in the log, where there is no compiler or it fails: all works without them, slower. They are
    called with Python's lock held, for they take microseconds.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        log.info("no C++ compiler was found (%s): all runs on torch's own kernels", ", ".join(_COMPILERS))
        return None
    try:
        native = _native_flag(compiler)
        target = cache_folder() / "native" / f"{_key(compiler, native)}.so"
        if not target.is_file():
            _compile(compiler, native, target)
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


def _key(compiler: str, native: str) -> str:
    """A digest of the source, and of all that the compiler predefines: its version and the processor's features."""
    macros = _run([compiler, native, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    digest = hashlib.sha256(" ".join((*_FLAGS, native, macros)).encode())
    for source in sorted((*_HERE.glob("*.h"), *_HERE.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: str, native: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        _run([compiler, *_FLAGS, native, str(_HERE / "kernels.cpp"), "-o", name])
        ctypes.PyDLL(name)  # what is no library is not kept
        os.replace(name, target)  # so that nobody sees a half-written one
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=check)
