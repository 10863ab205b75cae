"""The server's own process: settings, signals under load, and the same answers from two of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.helpers import tiny_llama
from tests.server.running import write_adapters
from tests.tiny import save_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with adapters in it, as a user would have it on disk."""
    root = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(root / "tiny")
    save_tiny_tokenizer(root / "tiny")
    write_adapters(root / "adapters")
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(folder: Path, *flags: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`midstream serve` in a process of its own, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "midstream.cli.main", "serve", "--model", str(folder / "tiny"), *flags]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--no-library"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, server.stderr and server.stderr.read()
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, server
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


def body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": 20, **more}


def read(url: str, tokens: int, begun: threading.Barrier, ended: list[list[str]]) -> None:
    """Stream an answer, wait at `begun` after its first line, and add the rest of its lines to `ended`."""
    wanted = body(stream=True, max_tokens=tokens)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=wanted, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        begun.wait(30)
        ended.append([line for line in lines if line])


def test_two_processes_give_the_same_greedy_answers(folder: Path) -> None:
    settings = folder / "server.yaml"
    settings.write_text(f"served-name: mine\nadapters: [{folder / 'adapters' / 'jailbreak'}]\nport: 1\n")
    found = []
    for _ in range(2):
        with process(folder, "--config", str(settings), MIDSTREAM_SERVE_API_KEYS="secret") as (url, _):
            assert httpx.get(f"{url}/v1/models").status_code == 401
            headers = {"Authorization": "Bearer secret"}
            models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
            assert [model["id"] for model in models] == ["mine", "jailbreak"]
            answers = [
                httpx.post(f"{url}/v1/chat/completions", json=body(model=name), headers=headers, timeout=60).json()
                for name in ("mine", "jailbreak")
            ]
            found.append([answer["choices"][0] for answer in answers])
    assert found[0] == found[1]


def test_a_signal_under_load_lets_running_requests_finish_and_refuses_new_ones(folder: Path) -> None:
    with process(folder, "--shutdown-timeout-s", "60") as (url, server):
        ended: list[list[str]] = []
        begun = threading.Barrier(5)
        threads = [threading.Thread(target=read, args=(url, 600, begun, ended)) for _ in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [lines[-1] for lines in ended] == ["data: [DONE]"] * 4
        assert server.wait(30) == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_what_does_not_finish_in_time_is_told_so(folder: Path) -> None:
    with process(folder, "--shutdown-timeout-s", "0.3") as (url, server):
        ended: list[list[str]] = []
        begun = threading.Barrier(2)
        thread = threading.Thread(target=read, args=(url, 2000, begun, ended))
        thread.start()
        begun.wait(30)
        server.send_signal(signal.SIGTERM)
        thread.join()
        assert server.wait(30) == -signal.SIGTERM
        (lines,) = ended
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_stopped"


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--port", "70000"], "port"),
        (["--tls-cert", "x.pem"], "tls_key"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "tls_cert"),
        (["--isolate-cache"], "api_keys"),
        (["--admin-key", ""], "admin_key"),
        (["--kv", "int4"], "int8"),
        (["--api-key", ""], "api_keys"),
        (["--adapter-dir", "/nowhere"], "adapter_dir"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--log-file", "/nowhere/log"], "log_file"),
    ],
)
def test_wrong_settings_are_one_line(folder: Path, flags: list[str], hint: str) -> None:
    command = [sys.executable, "-m", "midstream.cli.main", "serve", "--model", str(folder / "tiny"), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert hint in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_tls(folder: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    port = free_port()
    command = [sys.executable, "-m", "midstream.cli.main", "serve", "--model", str(folder / "tiny"), "--no-library"]
    flags = ["--port", str(port), "--tls-cert", str(certificate), "--tls-key", str(key)]
    server = subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                found = httpx.get(f"https://localhost:{port}/health", verify=trusted)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert found.json() == {"status": "ok"}
    finally:
        server.terminate()
        assert server.wait(30) == -signal.SIGTERM
