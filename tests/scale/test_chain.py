"""The whole way: the front of `midstream serve --backend`, the router, two servers, one of which is lost."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.scale.replicas import routed
from tests.server.test_ending import process

CONVERSATIONS = [f"{number}. Is {number * 91} a prime?" for number in range(6)]
NAMES = ["jailbreak", "answerability"]


def talk(client: httpx.Client, opening: str) -> list[Any]:
    """What two turns say, each with two intrinsics at once; without what differs from call to call."""
    messages = [{"role": "user", "content": opening}]
    said: list[Any] = []
    for _ in range(2):
        answer = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 40})
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        checks = client.post("/v1/intrinsics", json={"names": NAMES, "messages": messages})
        assert checks.status_code == 200, checks.text
        found = [(each["intrinsic"], each["result"], each["activation_index"]) for each in checks.json()["data"]]
        said.append((text, found))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Are you sure?"}]
    return said


def all_talk(url: str) -> list[Any]:
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
        return list(pool.map(lambda opening: talk(client, opening), CONVERSATIONS))


def test_a_lost_server_costs_no_answer_of_the_front(folder: Path) -> None:
    adapters = [part for name in NAMES for part in ("--adapter", f"{name}={folder / 'adapters' / name}")]
    with (
        routed(folder, "--dtype", "float32", *adapters) as behind,
        process(folder, *adapters, "--backend", behind.url, OMP_NUM_THREADS="1") as (front, _),
        ThreadPoolExecutor(1) as pool,
    ):
        expected = all_talk(behind.urls["replica2"])
        assert all_talk(front) == expected
        found = pool.submit(all_talk, front)
        _wait_for_work(behind.urls["replica1"])
        behind.replicas["replica1"].send_signal(signal.SIGKILL)
        assert not found.done(), "all was answered before the server was lost"
        assert found.result() == expected


def _wait_for_work(url: str) -> None:
    """Until the server computes something."""
    for _ in range(5000):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        running = [line for line in lines if line.startswith("vllm:num_requests_running")]
        if any(float(line.rsplit(" ", 1)[1]) for line in running):
            return
        time.sleep(0.002)
    raise AssertionError("nothing came to the server")
