"""Servers as replicas of a Ray Serve deployment: Ray places them on a cluster's GPUs, watches them, routes to them.

Each replica starts one server process of its own, vLLM with midstream's plugin or `midstream serve`, and passes every
request on to it as it is. Ray's consistent hashing by the header x-session-id, which midstream's backend sends, keeps a
conversation, base model and adapters alike, on one replica. Run with Ray 2.60:

    pip install "ray[serve]" httpx
    SERVER="vllm serve MODEL --enable-lora --lora-modules NAME=FOLDER" \\
        REPLICAS=4 GPUS=1 serve run deploy.ray.serve_replicas:app
    midstream serve --backend http://127.0.0.1:8000 --model MODEL --adapter NAME=FOLDER --port 8080
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Iterable

import httpx
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

# Connections are this hop's own, and the body's framing with them.
_OF_THE_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
_START_S = 1800.0
_LAST_WORDS_S = 0.5


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")),
    ray_actor_options={"num_cpus": float(os.environ.get("CPUS", "1")), "num_gpus": float(os.environ.get("GPUS", "1"))},
    request_router_config=RequestRouterConfig(
        # A name is taken, whatever its types say.
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",  # type: ignore[arg-type]
        # What a replica refuses, with max_ongoing_requests under way, goes to the next one and is read anew there.
        request_router_kwargs={"num_fallback_replicas": 1},
    ),
    max_ongoing_requests=512,
    health_check_period_s=2.0,
    graceful_shutdown_timeout_s=60.0,
)
class Replica:
    """One server process, and the way to it."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._start())

    async def __call__(self, request: Request) -> Response:
        """Pass a request on, and its answer back as it comes."""
        await self._ready
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        asked = self._client.build_request(
            request.method, path, headers=_kept(request.headers.items()), content=await request.body()
        )
        try:
            answer = await self._client.send(asked, stream=True)
        except httpx.TransportError:
            # What a proxy says of a lost server: midstream's backend asks again, and Ray has another replica by then.
            return Response("the replica's server is lost", status_code=502)
        return StreamingResponse(_parts(answer), status_code=answer.status_code, headers=_kept(answer.headers.items()))

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        await self._ready
        (await self._client.get("/health")).raise_for_status()

    async def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(650.0, connect=5.0))
        self._process = await asyncio.create_subprocess_exec(*shlex.split(self._command), "--port", str(port))
        self._watch = asyncio.get_running_loop().create_task(self._end_with(self._process))
        end = time.monotonic() + _START_S
        while not await self._answers():
            if self._process.returncode is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {self._command}")
            await asyncio.sleep(0.5)

    async def _answers(self) -> bool:
        try:
            return (await self._client.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def _end_with(self, process: asyncio.subprocess.Process) -> None:
        """A replica without its server ends, so that Ray knows at once: nothing more is sent here."""
        await process.wait()
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.returncode is None:
            process.terminate()


def _kept(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _OF_THE_CONNECTION}


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


app = Replica.bind(os.environ["SERVER"]) if "SERVER" in os.environ else None  # type: ignore[attr-defined]  # the decorator's
