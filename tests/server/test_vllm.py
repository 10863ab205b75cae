"""vLLM as a child: which settings it takes, how it is found and started, and that it ends with the server. No vLLM is
needed: a small server stands for it."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from midstream.cli.serve import read_settings
from midstream.config import ServerConfig
from midstream.errors import BackendError, InputError
from midstream.server.vllm import environment as environment_module
from midstream.server.vllm.command import Launch
from midstream.server.vllm.environment import VllmEnvironment, find_environment
from midstream.server.vllm.process import ChildServer
from midstream.types import AdapterInfo

URL = "http://localhost:8000"

# Says something, starts a process of its own that ignores requests to end, and serves /health.
SERVER = """
import http.server, subprocess, sys
print("WARNING a line of its log", flush=True)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stubborn])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"backend": URL, "weights": "int8"}, "weights"),
        ({"backend": URL, "kv": "int8", "dtype": "float32"}, "dtype, kv"),
        ({"backend": URL, "kv_mib": 64, "max_context_tokens": 64}, "kv_mib, max_context_tokens"),
        ({"backend": URL, "device": "cpu", "max_queued": 9}, "device, max_queued"),
        ({"backend": URL, "vllm_args": ["--x"]}, "vllm_args"),
        ({"backend": "vllm", "weights": "int8", "kv": "int8", "device": "cuda"}, "device, kv, weights"),
        ({"backend": "vllm", "backend_key": "x"}, "backend_key"),
        ({"backend_key": "x"}, "backend_key"),
        ({"vllm_python": "/usr/bin/python"}, "vllm_python"),
        ({"backend": "llama.cpp"}, "llama.cpp"),
        ({"backend": "localhost:8000"}, "localhost:8000"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings(None, given)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"backend": URL, "backend_key": "x", "model": "m", "adapters": ["a"], "library": False},
        {"backend": "vllm", "dtype": "float32", "kv_mib": 64, "max_context_tokens": 64, "vllm_args": ["--x"]},
        {"dtype": "float32", "weights": "int8", "kv": "int8", "max_queued": 3},
    ],
)
def test_the_others_are_taken(given: dict[str, Any]) -> None:
    assert read_settings(None, given).backend == given.get("backend")


# ---------------------------------------------------------------------- how it is started


def info(name: str, rank: int) -> AdapterInfo:
    return AdapterInfo(name, "alora", "", f"/adapters/{name}", (1,), "", rank, 0)


def launch(*adapters: AdapterInfo, cpu: bool = True, python: Path = Path("/venv/bin/python")) -> Launch:
    found = VllmEnvironment(python, "0.32.0", cpu=cpu)
    return Launch(found, Path("/models/tiny"), "tiny", adapters, 4321, "secret")


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_what_vllm_is_told() -> None:
    config = ServerConfig(
        backend="vllm", dtype="float32", kv_mib=3, max_context_tokens=77, vllm_args=("--max-loras=9", "--seed=1")
    )
    command = launch(info("one", 16), info("two", 40)).command(config)
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    told = {
        "--model": "/models/tiny",
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": "4321",
        "--dtype": "float32",
        "--max-model-len": "77",
        "--kv-cache-memory-bytes": str(3 * 1024**2),
        "--max-lora-rank": "64",
        "--max-loras": "2",
        "--max-cpu-loras": "2",
        "--max-logprobs": "20",
    }
    assert {flag: value_of(command, flag) for flag in told} == told
    at = command.index("--lora-modules")
    modules = [json.loads(text) for text in command[at + 1 : at + 3]]
    assert modules == [{"name": name, "path": f"/adapters/{name}"} for name in ("one", "two")]
    assert command[-2:] == ["--max-loras=9", "--seed=1"], "what is given to vLLM as it is goes before"
    assert "secret" not in " ".join(command), "arguments can be seen by every user of the machine"


def test_what_is_left_to_vllm_and_room_for_adapters_that_come_later(tmp_path: Path) -> None:
    command = launch(cpu=False).command(ServerConfig(backend="vllm"))
    for flag in ("--dtype", "--max-model-len", "--kv-cache-memory-bytes", "--block-size", "--enable-lora"):
        assert flag not in command
    later = ServerConfig(backend="vllm", adapter_dir=tmp_path)
    assert launch(cpu=False).variables(later, {})["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    command = launch(info("one", 8)).command(later)
    assert value_of(command, "--max-lora-rank") == "64"
    assert int(value_of(command, "--max-cpu-loras")) > 1


def test_the_variables_of_the_cpu_build(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    config = ServerConfig(backend="vllm")
    made = launch(python=tmp_path / "bin" / "python")
    found = made.variables(config, {"LD_PRELOAD": "mine.so", "VLLM_PLUGINS": "other", "HOME": "/home/me"})
    assert found["VLLM_API_KEY"] == "secret"
    assert found["HOME"] == "/home/me"
    assert found["VLLM_PLUGINS"] == "other,midstream"
    preloads = found["LD_PRELOAD"].split(":")
    assert preloads[0] == "mine.so"
    assert preloads[-1] == str(tmp_path / "lib" / "libiomp5.so")
    assert found["VLLM_CPU_OMP_THREADS_BIND"]
    assert made.variables(config, {"VLLM_CPU_OMP_THREADS_BIND": "0"})["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert "LD_PRELOAD" not in launch(cpu=False).variables(config, {})


# ---------------------------------------------------------------------- where it is


def interpreter(file: Path, **installed: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho '{json.dumps({name.replace('_', '-'): v for name, v in installed.items()})}'\n")
    file.chmod(0o755)
    return file


def test_the_environment_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "find_spec", lambda _: None)
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="--vllm-python"):
        find_environment(None)
    cached = interpreter(tmp_path / "vllm" / "bin" / "python", vllm_cpu="0.32.0", midstream_vllm="1")
    assert find_environment(None) == VllmEnvironment(cached, "0.32.0", cpu=True)
    named = interpreter(tmp_path / "other", vllm="0.33.0", midstream_vllm="1")
    assert find_environment(named) == VllmEnvironment(named, "0.33.0", cpu=False)
    with pytest.raises(InputError, match="pip install vllm"):
        find_environment(interpreter(tmp_path / "empty"))
    with pytest.raises(InputError, match="integrations/vllm"):
        find_environment(interpreter(tmp_path / "plain", vllm="0.33.0"))
    with pytest.raises(InputError, match="cannot be run"):
        find_environment(tmp_path / "nowhere")


# ---------------------------------------------------------------------- its life


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def child(port: int) -> Iterator[ChildServer]:
    child = ChildServer([sys.executable, "-c", SERVER, str(port)], {"PATH": "/usr/bin"})
    yield child
    child.close()


def below(child: ChildServer) -> list[psutil.Process]:
    return psutil.Process(child._process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


def test_it_is_awaited_its_log_passed_on_and_all_of_it_ended(
    child: ChildServer, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="midstream.vllm"):
        child.wait_ready(f"http://127.0.0.1:{port}")
    assert ("midstream.vllm", logging.WARNING, "WARNING a line of its log") in caplog.record_tuples
    processes = below(child)
    assert len(processes) == 2
    assert child.death is None
    child.close()
    assert gone(processes), "those that ignore requests to end too"
    assert child.death is None, "it did not end of its own"


def test_one_that_dies_is_told_once_with_its_last_lines(child: ChildServer, port: int) -> None:
    told = threading.Event()
    child.when_dead(told.set)
    child.wait_ready(f"http://127.0.0.1:{port}")
    processes = below(child)
    processes[0].send_signal(signal.SIGKILL)
    assert told.wait(30)
    assert gone(processes)
    assert "status 137" in str(child.death)
    assert "a line of its log" in str(child.death)
    child.close()
    assert child.death is not None


def test_one_that_does_not_come_up_says_what_came_first() -> None:
    program = "print('ValueError: no room for the model'); print('at a place\\n' * 20); raise SystemExit('see above')"
    child = ChildServer([sys.executable, "-u", "-c", program], {})
    with pytest.raises(BackendError, match=r"status 1.*ValueError: no room for the model.*see above"):
        child.wait_ready("http://127.0.0.1:9")
    child.close()


def test_it_ends_with_a_server_that_is_killed(port: int) -> None:
    program = (
        "import sys, time\n"
        "from midstream.server.vllm.process import ChildServer\n"
        f"child = ChildServer([sys.executable, '-c', {SERVER!r}, '{port}'], {{}})\n"
        f"child.wait_ready('http://127.0.0.1:{port}')\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    processes = psutil.Process(server.pid).children(recursive=True)
    assert len(processes) == 3
    server.kill()
    server.communicate()
    assert gone(processes)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
