"""How vLLM is started: its arguments and its variables, from the server's settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from midstream.config import ServerConfig
from midstream.remote.request import MAX_LOGPROBS
from midstream.server.vllm.environment import VllmEnvironment
from midstream.types import AdapterInfo

# The ranks that vLLM has room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Adapters of that many kinds in one batch; each has a place in memory, used or not.
_MAX_AT_ONCE = 16
# Room for what may be loaded while serving.
_LATER_RANK = 64
_LATER_ADAPTERS = 16
# vLLM's CPU build would take nearly all of the machine's memory, and cut the cache into blocks of 128 tokens, of which
# a call loses half a one on average.
_CPU_KV_BYTES = 2 * 1024**3
_CPU_BLOCK_TOKENS = 32
_PLUGIN = "midstream"


@dataclass(frozen=True, slots=True)
class Launch:
    """What vLLM is to serve: the model in `folder` as `name`, and adapters, at a local port and for `key` alone."""

    environment: VllmEnvironment
    folder: Path
    name: str
    adapters: Sequence[AdapterInfo]
    port: int
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, config: ServerConfig) -> list[str]:
        """The command line. What the settings give to vLLM as it is comes last, and so goes before."""
        flags = {
            "--model": str(self.folder),
            "--served-model-name": self.name,
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": config.dtype,
            "--max-model-len": config.max_context_tokens,
            "--kv-cache-memory-bytes": self._kv_bytes(config),
            "--block-size": _CPU_BLOCK_TOKENS if self.environment.cpu else None,
            "--max-logprobs": MAX_LOGPROBS,
            # The model's own defaults of sampling would change what a request does not name.
            "--generation-config": "vllm",
        }
        # `vllm serve` does not start where vLLM was installed under another name, as its CPU build is.
        command = [str(self.environment.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
        command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        return [*command, *self._adapters(config), *config.vllm_args]

    def variables(self, config: ServerConfig, outer: Mapping[str, str]) -> dict[str, str]:
        """The environment: `outer` with what vLLM needs; what `outer` says itself stays."""
        found = {"VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1", **outer, "VLLM_API_KEY": self.key}
        plugins = outer.get("VLLM_PLUGINS")
        if plugins is not None and _PLUGIN not in plugins.split(","):
            found["VLLM_PLUGINS"] = ",".join([*filter(None, plugins.split(",")), _PLUGIN])
        if config.adapter_dir is not None:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.environment.cpu:
            # Its own choice leaves cores idle, on a small machine all but one. Where none can be chosen it may choose.
            if hasattr(os, "sched_getaffinity"):
                found.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
            found["LD_PRELOAD"] = ":".join([*filter(None, [outer.get("LD_PRELOAD")]), *map(str, self._preloads())])
        return found

    def _kv_bytes(self, config: ServerConfig) -> int | None:
        if config.kv_mib is not None:
            return config.kv_mib * 1024**2
        return _CPU_KV_BYTES if self.environment.cpu else None

    def _adapters(self, config: ServerConfig) -> list[str]:
        later = config.adapter_dir is not None
        if not self.adapters and not later:
            return []
        rank = max([info.rank for info in self.adapters] + ([_LATER_RANK] if later else []))
        at_once = min(max(1, len(self.adapters)), _MAX_AT_ONCE)
        flags = ["--enable-lora", "--max-lora-rank", str(next((r for r in _RANKS if r >= rank), rank))]
        flags += ["--max-loras", str(at_once)]
        flags += ["--max-cpu-loras", str(max(at_once, len(self.adapters)) + (_LATER_ADAPTERS if later else 0))]
        modules = [json.dumps({"name": info.name, "path": info.path}) for info in self.adapters]
        return [*flags, *(["--lora-modules", *modules] if modules else [])]

    def _preloads(self) -> list[Path]:
        """What the CPU build wants to be loaded first: tcmalloc where there is one, and its own OpenMP."""
        tcmalloc = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))[:1]
        return [*tcmalloc, *sorted(self.environment.libraries.glob("libiomp5.so"))]
