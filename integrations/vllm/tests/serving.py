"""vLLM with the plugin, as a process of its own: an offline engine, or its OpenAI server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from benchmarks.peers_build import Builder
from benchmarks.peers_process import Worker
from benchmarks.vllm_plugin import PLUGIN, plugin_environment


@dataclass(frozen=True, slots=True)
class Vllm:
    """One version's environment. `scratch` takes logs, kept adapters, and what stands for the installed plugin."""

    version: str
    python: Path
    preloads: tuple[Path, ...]
    scratch: Path

    @classmethod
    def made(cls, version: str, scratch: Path) -> Vllm:
        """Makes the environment where it is not there yet. Raises Absent where it cannot be had."""
        builder = Builder()
        return cls(version, builder.vllm_python(version), tuple(builder.vllm_preloads(version)), scratch)

    def environment(self, ranks: int = 1) -> dict[str, str]:
        """The process's environment. The plugin is the checkout's, and is found as an installed one is.

        Each of several tensor-parallel `ranks` has a core.
        """
        threads = min(2, os.cpu_count() or 1)
        return {
            **plugin_environment(self.scratch),
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if ranks == 1 else "|".join(map(str, range(ranks))),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(map(str, self.preloads)),
        }

    @contextlib.contextmanager
    def offline(self, **options: Any) -> Iterator[Worker]:
        """An engine behind vLLM's offline `LLM`."""
        command = [str(self.python), str(PLUGIN / "tests" / "side.py")]
        log = self.scratch / f"offline-{len(list(self.scratch.glob('*.log')))}.log"
        environment = self.environment(options.get("tensor_parallel_size", 1))
        with Worker(command, log=log, env=environment, timeout_s=300) as worker:
            assert worker.ask("load", options=options) == self.version
            yield worker

    @contextlib.contextmanager
    def server(self, *flags: str) -> Iterator[httpx.Client]:
        """vLLM's OpenAI server, once it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        module = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants metadata of a distribution named vllm
        command = [str(self.python), "-m", module, "--host", "127.0.0.1", "--port", str(port), *flags]
        log = self.scratch / "server.log"
        environment = {**os.environ, **self.environment()}
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                    _wait(client, process, log)
                    yield client
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                process.kill()

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        """A short Python program in vLLM's environment."""
        command = [str(self.python), "-c", program]
        environment = {**os.environ, **self.environment()}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def edited(folder: Path, target: Path, scale: float) -> Path:
    """A copy of an adapter whose alpha is multiplied: other answers, same shapes."""
    target.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (target / file).write_bytes((folder / file).read_bytes())
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * scale}))
    return target


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.stderr.write(log.read_text(errors="replace")[-4000:])
            raise AssertionError(f"the server ended with {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError("the server did not answer")
