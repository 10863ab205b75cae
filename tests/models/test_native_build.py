"""Compiling the kernels: once, whole or not at all, never in the way of an answer or of a machine that cannot."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.native import build, kernels
from midstream.models.native.kernels import NativeKernels, start_kernels
from midstream.types import Request, SamplingParams
from tests.models.native import needs_compiler
from tests.models.served import check
from tests.models.test_fused_layers import FUSED, fused, made, network
from tests.reference import logits
from tests.tiny import save_tiny_tokenizer

CPU = torch.device("cpu")
FLOAT32 = ("float", (32,))
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
# What is compiled is there when a test has made the file `go`.
WAITING = 'while [ ! -e "{go}" ]; do sleep 0.01; done; cp "{library}" "$out"'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; no kernels of another test are taken, and none of this one's stay."""
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_started", {})
    return tmp_path / "cache" / "native"


@pytest.fixture
def compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """Puts a compiler of its own in the place of the machine's; returns where it notes how it was called."""

    def put(body: str, *, march: str = ":", version: int = 1) -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        (folder / "g++").write_text(SCRIPT.format(calls=calls, body=body, march=march, version=version))
        (folder / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return calls

    yield put
    (tmp_path / "go").touch()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as the machine's compiler makes them, for float32 and heads of 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert isinstance(build.compiled(*FLOAT32), ctypes.PyDLL)
        (found,) = files(build.cache_folder() / "native")
    return found


def files(folder: Path) -> list[Path]:
    """All but the locks."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"] if folder.is_dir() else []


def picked() -> Kernels:
    return start_kernels(torch.float32, CPU, [32]).result()


def compilations(calls: Path) -> int:
    return sum(" -o " in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_torch_serves(caplog: pytest.LogCaptureFixture, level: str, said: str) -> None:
    """Once, with the reason in the log; it is not tried again."""
    with caplog.at_level(logging.INFO, logger=build.__name__):
        found = [picked(), picked()]
    assert [type(each) for each in found] == [TorchKernels] * 2
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
    for dtype, device in ((torch.float16, CPU), (torch.float32, torch.device("cuda"))):
        assert type(start_kernels(dtype, device, [32]).result()) is TorchKernels


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
    again = build.compiled(*FLOAT32)
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

    def once(number: str, heads: tuple[int, ...]) -> ctypes.PyDLL:
        asked.append((number, heads))
        return ctypes.PyDLL(str(library))

    monkeypatch.setattr(kernels, "compiled", once)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: picked(), range(8)))
    assert isinstance(found[0], NativeKernels)
    assert set(map(id, found)) == {id(found[0])}
    assert asked == [FLOAT32]
    # Heads of no size that is served are as good as none; another type and other heads are another library.
    assert start_kernels(torch.float32, CPU, [32, 48]).result() is found[0]
    start_kernels(torch.bfloat16, CPU, [32]).result()
    start_kernels(torch.float32, CPU, [64, 32]).result()
    assert asked[1:] == [("bf16", (32,)), ("float", (32, 64))]


@needs_compiler
def test_two_processes_at_once_compile_once(library: Path, cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    calls = compiler(WAITING.format(go=tmp_path / "go", library=library))
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build.compiled, *FLOAT32) for _ in range(2)]
        wait_for(lambda: compilations(calls) > 0)
        (tmp_path / "go").touch()
        assert all(found.result() is not None for found in both)
    assert len(files(cache)) == 1
    assert build.compiled(*FLOAT32) is not None
    assert compilations(calls) == 1


@needs_compiler
def test_what_a_killed_one_leaves_is_taken_away(library: Path, cache: Path, compiler: Compiler) -> None:
    calls = compiler('echo half > "$out"; kill -9 $PPID; exit 1')
    assert build.compiled(*FLOAT32) is None
    assert len(files(cache)) == 1
    compiler(f'cp "{library}" "$out"')
    assert isinstance(build.compiled(*FLOAT32), ctypes.PyDLL)
    assert [path.read_bytes() for path in files(cache)] == [library.read_bytes()]
    assert compilations(calls) == 2


@needs_compiler
def test_a_process_that_ends_first_leaves_a_library(
    library: Path, cache: Path, compiler: Compiler, tmp_path: Path
) -> None:
    calls = compiler(WAITING.format(go=tmp_path / "go", library=library))
    program = "from midstream.models.native.kernels import *; start_kernels(torch.float32, torch.device('cpu'), [32]); "
    # Not one long wait: a signal that comes just before it would be seen only after it.
    program += "import time; print('started', flush=True)\nwhile True: time.sleep(0.05)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            assert it.stdout.readline() == "started\n"
            wait_for(lambda: compilations(calls) > 0)
            it.send_signal(signal.SIGINT)
            it.wait(timeout=60)
        finally:
            it.kill()
    assert [path.stat().st_size for path in files(cache)] == [0]
    (tmp_path / "go").touch()
    (lock,) = cache.glob("*.lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
    assert [path.read_bytes() for path in files(cache)] == [library.read_bytes()]


# ---------------------------------------------------------------------- answers do not wait


@needs_compiler
async def test_the_first_answer_does_not_wait_for_the_compiler(
    library: Path, cache: Path, compiler: Compiler, tmp_path: Path
) -> None:
    """And the kernels are taken when they come."""
    calls = compiler(WAITING.format(go=tmp_path / "go", library=library))
    model = network(*FUSED["llama"])
    model.save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    request = Request(prompt=tuple(range(10, 60)), params=SamplingParams(max_tokens=8, ignore_eos=True))
    expected: list[int] = []
    for _ in range(8):
        expected.append(int(logits(model, [*request.prompt, *expected])[-1].argmax()))
    engine = AsyncEngine.load(tmp_path / "tiny", dtype="float32", config=EngineConfig(kv_budget_bytes=4 * 1024**2))
    try:
        loaded = engine._loaded
        first = await engine.complete(request)
        assert list(first.token_ids) == expected
        assert type(loaded.kernels) is TorchKernels
        assert loaded.pending is not None
        (tmp_path / "go").touch()
        await asyncio.to_thread(wait_for, lambda: loaded.pending is None)
        assert isinstance(loaded.kernels, NativeKernels)
        second = await engine.complete(request)
        assert list(second.token_ids) == expected
        assert second.usage.cached_tokens == len(request.prompt) - 1
        assert compilations(calls) == 1
        await engine.check_integrity()
    finally:
        await engine.aclose()


@needs_compiler
async def test_who_asks_for_it_waits(library: Path, cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    compiler(f'sleep 0.2; cp "{library}" "$out"')
    network(*FUSED["llama"]).save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    engine = AsyncEngine.load(tmp_path / "tiny", dtype="float32", wait_for_kernels=True)
    await engine.aclose()
    assert isinstance(engine._loaded.kernels, NativeKernels)
    assert engine._loaded.pending is None


def test_a_change_of_source_flags_or_compiler_is_another_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("exit 1")
    sources = tmp_path / "sources"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", sources)

    def key(flag: str = "-march=native") -> str:
        return build._key([str(shutil.which("g++")), *build._FLAGS, flag])

    keys = [key()]
    assert key() == keys[0]
    included = sorted((*sources.glob("*.h"), *sources.glob("*.cpp")))
    assert {"kernels.cpp", "product.h"} < {path.name for path in included}
    for path in included:
        with path.open("a") as source:
            source.write("\n")
        keys.append(key())
    keys.append(key("-mcpu=native"))
    compiler("exit 1", version=2)
    keys.append(key())
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    keys.append(key())
    assert len(set(keys)) == len(keys) == len(included) + 4
    (sources / "build.py").write_text("")
    assert key() == keys[-1]
