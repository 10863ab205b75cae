"""llama.cpp: a worker that runs a llama-server of its own and asks it over a kept connection. Standard library only.

One conversation is one slot of the server. Adapters are called one after the other on the slot of the base model's
conversation, for llama.cpp shares a prefix within a slot and not between slots.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers_protocol import Absent, Answer, Call, Setup, serve

_START_S = 120.0
_ONLY = 1000.0  # added to the logits of a label's tokens: no other can win


class LlamaSide:
    """A llama-server and what its slots hold."""

    _server: subprocess.Popen[bytes] | None = None

    def load(self, setup: Setup) -> dict[str, Any]:
        self._setup = setup
        self._slots = [_Slot() for _ in range(setup.streams)]
        self._numbers = {name: number for number, name in enumerate(setup.adapters)}
        self._invocations: dict[str, list[int]] = setup.options["invocations"]
        self._folder = tempfile.TemporaryDirectory()
        self._port = _free_port()
        try:
            self._server = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL)
        except OSError as error:
            raise Absent(f"llama-server cannot be started: {error}") from error
        self._pool = ThreadPoolExecutor(setup.streams)
        self._wait()
        self._links = [http.client.HTTPConnection("127.0.0.1", self._port) for _ in self._slots]
        return {"version": setup.options["version"], "format": setup.options["format"], "adapters": "alora"}

    def clear(self) -> None:
        for number, slot in enumerate(self._slots):
            self._post(number, f"/slots/{number}?action=erase", {})
            slot.held, slot.clean = (), 0

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self.run([Call(None, prompt, 1) for prompt in prompts], False)

    def run(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        base = [call for call in calls if call.adapter is None]
        jobs = [self._pool.submit(self._complete, slot, call, logprobs) for slot, call in enumerate(base)]
        found = {id(call): job.result() for call, job in zip(base, jobs, strict=True)}
        return [found[id(call)] if call.adapter is None else self._complete(0, call, logprobs) for call in calls]

    def close(self) -> None:
        if self._server is None:
            return
        self._server.terminate()
        self._server.wait()
        self._pool.shutdown()
        self._folder.cleanup()

    # ------------------------------------------------------------------ the server

    def _command(self) -> list[str]:
        setup = self._setup
        threads, kv = str(setup.threads), "f32" if setup.options["format"] == "F32" else "f16"
        command = [setup.options["server"], "--model", setup.model, "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--threads", threads, "--threads-batch", threads, "--parallel", str(setup.streams)]
        command += ["--ctx-size", str(setup.streams * setup.max_tokens), "--no-kv-unified"]
        command += ["--cache-type-k", kv, "--cache-type-v", kv, "--cache-ram", "0", "--no-webui"]
        # Erasing a slot is allowed only where slots may be saved.
        command += ["--slot-save-path", self._folder.name, "--log-verbosity", "1"]
        if setup.options["exact"]:
            # Flash attention rounds to 16 bits in places.
            command += ["--flash-attn", "off"]
        if setup.adapters:
            # At scale 0: a request that names no adapter is the base model's.
            command += ["--lora-scaled", ",".join(f"{file}:0" for file in setup.adapters.values())]
        return command

    def _wait(self) -> None:
        assert self._server is not None
        limit = time.monotonic() + _START_S
        while time.monotonic() < limit:
            if (code := self._server.poll()) is not None:
                raise Absent(f"llama-server ended with {code}; its log says why")
            if self._healthy():
                return
            time.sleep(0.02)
        raise Absent(f"llama-server was not ready within {_START_S:.0f} s")

    def _healthy(self) -> bool:
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            link.request("GET", "/health")
            return link.getresponse().status == 200
        except OSError:
            return False
        finally:
            link.close()

    def _post(self, slot: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = ("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        link = self._links[slot]
        try:
            link.request(*request)
            response = link.getresponse()
        except ConnectionError:
            # The server closes a connection that was idle for some seconds.
            link.close()
            link.request(*request)
            response = link.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {content[:200]!r}")
        value: dict[str, Any] = json.loads(content)
        return value

    # ------------------------------------------------------------------ calls

    def _complete(self, number: int, call: Call, logprobs: bool) -> Answer:
        slot = self._slots[number]
        start = len(call.prompt)
        body = self._body(number, call, logprobs)
        if call.adapter is not None:
            start = _last(call.prompt, self._invocations[call.adapter])
            body["lora"] = [{"id": self._numbers[call.adapter], "scale": 1.0}]
        trimmed = self._trim(number, call.prompt[:start])
        found = self._post(number, "/completion", body)
        tokens = tuple(found["tokens"])
        slot.held = (*body["prompt"], *tokens[:-1])
        slot.clean = len(slot.held) if call.adapter is None else start
        chances = tuple(float(item["logprob"]) for item in found.get("completion_probabilities", ()))
        return Answer(tokens, found["timings"]["prompt_n"] + trimmed, chances)

    def _body(self, number: int, call: Call, logprobs: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": [*call.prompt, *(call.label.opening if call.label else ())],
            "n_predict": 1 if call.label else call.tokens,
            "id_slot": number,
            "cache_prompt": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "return_tokens": True,
            "n_probs": 1 if logprobs else 0,
        }
        if call.label:
            body["logit_bias"] = [[token, _ONLY] for token in call.label.parting]
        return body

    def _trim(self, number: int, wanted: tuple[int, ...]) -> int:
        """Have the base model end the slot's KV where an adapter's begins, if `wanted` would reuse more than that.

        llama.cpp compares tokens alone and would go on from the adapter's KV. Returns the tokens computed for it.
        """
        slot = self._slots[number]
        if _common(slot.held, wanted) <= slot.clean or slot.clean == 0:
            return 0
        found = self._post(number, "/completion", self._body(number, Call(None, slot.held[: slot.clean], 1), False))
        slot.held = slot.held[: slot.clean]
        computed: int = found["timings"]["prompt_n"]
        return computed


class _Slot:
    """The tokens a slot holds KV of; the first `clean` ones are the base model's."""

    def __init__(self) -> None:
        self.held: tuple[int, ...] = ()
        self.clean = 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _last(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """Where the invocation stands for the last time."""
    width = len(invocation)
    return next(i for i in range(len(tokens) - width, -1, -1) if list(tokens[i : i + width]) == list(invocation))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    serve(LlamaSide())
