"""Compiling the kernels: once, whole or not at all, and never in the way of a machine that cannot."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from midstream.models.kernels import TorchKernels
from midstream.models.native import build, kernels
from midstream.models.native.kernels import NativeKernels, pick_kernels
from tests.models.native import needs_compiler
from tests.models.served import check
from tests.models.test_fused_layers import FUSED, fused, made, network

CPU = torch.device("cpu")
# A compiler that answers questions about itself, and when told to compile does what a test wants of it.
SCRIPT = """#!/bin/sh
PATH=/usr/bin:/bin
echo "$@" >> "{calls}"
case " $* " in
    *" -march=native "*) {march} ;;
esac
case " $* " in
    *" -dM "*) echo "#define __VERSION__ {version}"; exit 0 ;;
    *" -E "*) exit 0 ;;
esac
for out; do :; done
{body}
"""
Compiler = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; no kernels of another test are taken, and none of this one's stay."""
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "cache"))
    kernels._native.cache_clear()
    yield tmp_path / "cache" / "native"
    kernels._native.cache_clear()


@pytest.fixture
def compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Puts a compiler of its own in the place of the machine's; returns where it notes how it was called."""

    def put(body: str, *, march: str = ":", version: int = 1) -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        (folder / "g++").write_text(SCRIPT.format(calls=calls, body=body, march=march, version=version))
        (folder / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return calls

    return put


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as the machine's compiler makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert isinstance(build.compiled(), ctypes.PyDLL)
        (found,) = (build.cache_folder() / "native").iterdir()
    return found


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def assert_torch_serves(caplog: pytest.LogCaptureFixture, level: str, said: str) -> None:
    """Once, with the reason in the log; it is not tried again."""
    with caplog.at_level(logging.INFO, logger=build.__name__):
        picked = [pick_kernels(dtype, CPU) for dtype in (torch.float32, torch.bfloat16)]
    assert [type(found) for found in picked] == [TorchKernels] * 2
    (record,) = caplog.records
    assert record.levelname == level
    assert said in record.getMessage()


# ---------------------------------------------------------------------- machines that cannot


def test_without_a_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_torch_serves(caplog, "INFO", "no C++ compiler was found (g++, clang++, c++)")
    assert files(cache) == []


async def test_a_compiler_that_fails_halfway(cache: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    """Its words are in the log, nothing of its work stays, and a model runs without it."""
    compiler('echo half > "$out"; echo "error: no such instruction" >&2; exit 1')
    assert_torch_serves(caplog, "WARNING", "error: no such instruction")
    assert files(cache) == []
    model = network(*FUSED["llama"])
    loaded = made(model)
    assert type(loaded.kernels) is TorchKernels
    assert not loaded.extents
    assert fused(loaded) == [True] * 3
    await check(model, loaded)


def test_a_compiler_that_does_not_end(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_TIMEOUT_S", 1)
    compiler('echo half > "$out"; exec sleep 60')
    before = time.monotonic()
    assert_torch_serves(caplog, "WARNING", "timed out")
    assert time.monotonic() - before < 30
    assert files(cache) == []


def test_a_compiler_that_makes_something_else(
    cache: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler('echo "not a library" > "$out"')
    assert_torch_serves(caplog, "WARNING", "the kernels cannot be compiled")
    assert files(cache) == []


def test_a_compiler_that_knows_no_native_processor(
    cache: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler("exit 1", march="exit 1", version=3)
    assert build._native_flag(str(shutil.which("g++"))) == "-mcpu=native"
    (Path(os.environ["PATH"]) / "g++").write_text("#!/bin/sh\nexit 1\n")
    assert_torch_serves(caplog, "WARNING", "takes none of -march=native, -mcpu=native")


def test_a_cache_that_cannot_be_written(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler("exit 0")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    assert_torch_serves(caplog, "WARNING", "the kernels cannot be compiled")


def test_types_and_devices_that_the_kernels_do_not_serve() -> None:
    assert type(pick_kernels(torch.float16, CPU)) is TorchKernels
    assert type(pick_kernels(torch.float32, torch.device("cuda"))) is TorchKernels


# ---------------------------------------------------------------------- machines that can


@needs_compiler
def test_compiled_once_and_kept(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDSTREAM_CACHE", str(library.parent.parent))
    run, commands = subprocess.run, []

    def record(command: list[str], **options: object) -> object:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", record)
    made_at = library.stat().st_mtime_ns
    again = build.compiled()
    assert again is not None
    assert again._name == str(library)
    # The compiler is asked what it is and what the processor is; it compiles nothing.
    assert commands
    assert all("-E" in command for command in commands)
    assert files(library.parent) == [library]
    assert library.stat().st_mtime_ns == made_at


@needs_compiler
def test_asked_for_once_in_a_process(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def once() -> ctypes.PyDLL:
        asked.append(1)
        return ctypes.PyDLL(str(library))

    monkeypatch.setattr(kernels, "compiled", once)
    first, second = pick_kernels(torch.float32, CPU), pick_kernels(torch.bfloat16, CPU)
    assert isinstance(first, NativeKernels)
    assert first is second
    assert asked == [1]


@needs_compiler
def test_two_that_compile_at_once_both_end_well(library: Path, cache: Path, compiler: Compiler) -> None:
    calls = compiler(f'sleep 0.3; cp "{library}" "$out"')
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: build.compiled(), range(2)))
    assert all(found is not None for found in both)
    assert len(files(cache)) == 1
    assert calls.read_text().count("-shared") == 2
    assert build.compiled() is not None
    assert calls.read_text().count("-shared") == 2


def test_a_change_of_source_flags_or_compiler_is_another_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("exit 1")
    sources = tmp_path / "sources"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", sources)

    def key(flag: str = "-march=native") -> str:
        return build._key(str(shutil.which("g++")), flag)

    keys = [key()]
    assert key() == keys[0]
    for name in ("kernels.cpp", "vector.h", "pointwise.h", "attention.h", "prefill.h", "delta.h"):
        with (sources / name).open("a") as source:
            source.write("\n")
        keys.append(key())
    keys.append(key("-mcpu=native"))
    compiler("exit 1", version=2)
    keys.append(key())
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    keys.append(key())
    assert len(set(keys)) == len(keys) == 10
    (sources / "build.py").write_text("")
    assert key() == keys[-1]
