"""Two servers in processes of their own behind a real router, and who answered what."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from midstream.remote.affinity import SESSION_HEADER
from tests.server.test_ending import free_port, process

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"


def needs_haproxy() -> str:
    """The router's program. Skips the test where there is none."""
    found = shutil.which("haproxy")
    if found is None:
        pytest.skip("THE ROUTER OF deploy/ IS NOT TESTED: haproxy is not installed (apt-get install haproxy)")
    return found


@dataclass
class Routed:
    """`url` is the router's; `replicas` are the servers by the names that the router gives them."""

    url: str
    replicas: dict[str, subprocess.Popen[str]]
    urls: dict[str, str]


@contextmanager
def routed(folder: Path, *flags: str) -> Iterator[Routed]:
    """Two replicas of one model behind HAProxy, as deploy/haproxy.cfg has it."""
    program = needs_haproxy()
    # One thread each: threads that wait for each other stand still where they outnumber the cores.
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            started = pool.map(
                lambda one: stack.enter_context(process(folder, *flags, **one)), [{"OMP_NUM_THREADS": "1"}] * 2
            )
            servers = list(started)
        names = {f"replica{number}": server for number, server in enumerate(servers, 1)}
        url = stack.enter_context(haproxy(program, [url for url, _ in servers]))
        yield Routed(
            url, {name: it for name, (_, it) in names.items()}, {name: url for name, (url, _) in names.items()}
        )


@contextmanager
def haproxy(program: str, replicas: list[str]) -> Iterator[str]:
    """The router before servers of these addresses, once one of them answers through it."""
    address = f"127.0.0.1:{free_port()}"
    addresses = {f"REPLICA_{number}": url.removeprefix("http://") for number, url in enumerate(replicas, 1)}
    router = subprocess.Popen(
        [program, "-db", "-q", "-f", str(CONFIG)], env={**os.environ, "ROUTER_BIND": address, **addresses}
    )
    try:
        for _ in range(100):
            assert router.poll() is None, "HAProxy did not start"
            try:
                if httpx.get(f"http://{address}/v1/models").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield f"http://{address}"
    finally:
        router.kill()
        router.wait()


class Heard(httpx.AsyncHTTPTransport):
    """The network of a backend: which replica answered which conversation, and which models it named."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas: defaultdict[str, list[str]] = defaultdict(list)
        self.models: defaultdict[str, set[str]] = defaultdict(set)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        session = request.headers.get(SESSION_HEADER)
        if session is not None:
            self.models[session].add(json.loads(request.content)["model"])
            self.replicas[session].append(response.headers.get("x-replica", "router"))
        return response
