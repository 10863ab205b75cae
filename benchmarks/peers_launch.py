"""How each side's worker is started: its command, environment, and what it is loaded with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers_build import Builder
from benchmarks.peers_export import ExportError, write_gguf
from benchmarks.peers_process import Worker, module
from benchmarks.peers_protocol import Absent, Setup
from benchmarks.turn_script import INTRINSICS
from benchmarks.turn_sides import plain_copies
from benchmarks.vllm_plugin import plugin_environment
from midstream.types import AdapterInfo

VARIANTS = {
    "peft": ("", "cache"),
    "llama.cpp": ("", "BF16", "F16", "F32", "Q8_0"),
    "vllm": ("", "compiled", "plugin"),
}
_GGUF = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer in one of its variants, such as `llama.cpp:Q8_0`."""

    name: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Raises ValueError for what is not known."""
        name, _, variant = text.partition(":")
        if variant not in VARIANTS.get(name, ()):
            known = ", ".join(f"{n}:{v}".rstrip(":") for n, variants in VARIANTS.items() for v in variants)
            raise ValueError(f"{text!r} is no peer: {known}")
        return cls(name, variant)

    def __str__(self) -> str:
        return f"{self.name}:{self.variant}".rstrip(":")

    @property
    def weights(self) -> str | None:
        """What midstream's weights are rounded to beside it, where not to the timed type."""
        return "int8" if self.variant == "Q8_0" else None

    @property
    def adapters(self) -> str | None:
        """The kind of adapters it serves: "alora", "lora", or None."""
        if self.name == "vllm":
            return {"compiled": None, "plugin": "alora"}.get(self.variant, "lora")
        return "alora"


@dataclass(frozen=True, slots=True)
class Launch:
    """A worker that can be started any number of times. `wrapped`: the engine is a child of the worker's process."""

    command: list[str]
    setup: Setup
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    wrapped: bool = False

    def worker(self) -> Worker:
        return Worker(self.command, log=self.log, env={"OMP_NUM_THREADS": str(self.setup.threads), **self.env})


@dataclass(frozen=True, slots=True)
class Shape:
    """What a side must hold: so many conversations at once, each of at most `max_tokens` tokens."""

    dtype: str
    streams: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Launcher:
    """Knows every side's files. `root` has the library's adapters by name, `model` is the Hugging Face folder.

    `kv_mib` is the memory for KV at 16 bits; 32 bits get twice as much. `scratch` and `logs` are folders to write to.
    """

    model: Path
    root: Path
    infos: Mapping[str, AdapterInfo]
    threads: int
    kv_mib: int
    builder: Builder
    scratch: Path
    logs: Path

    def midstream(self, shape: Shape, kind: str = "alora", weights: str | None = None) -> Launch:
        """Our side; `kind` "lora" loads the same weights as plain LoRAs, for the comparison of answers alone."""
        adapters = self._plain() if kind == "lora" else self._own()
        setup = self._setup(shape, str(self.model), adapters, weights=weights)
        return Launch(module("peers_midstream"), setup, self.logs / "midstream.log")

    def peer(self, peer: Peer, shape: Shape, *, exact: bool = False) -> Launch:
        """A peer's side, made ready. `exact` has it compute as precisely as it can. Raises Absent."""
        start = {"peft": self._peft, "llama.cpp": self._llama, "vllm": self._vllm}[peer.name]
        return start(peer, shape, exact)

    # ------------------------------------------------------------------ the peers

    def _peft(self, peer: Peer, shape: Shape, exact: bool) -> Launch:
        setup = self._setup(shape, str(self.model), self._own(), variant=peer.variant)
        return Launch(module("peers_peft"), setup, self.logs / "peft.log")

    def _llama(self, peer: Peer, shape: Shape, exact: bool) -> Launch:
        kind = _GGUF[shape.dtype] if exact or not peer.variant else peer.variant
        setup = self._setup(
            shape,
            str(self.builder.llama_model(self.model, kind)),
            self._gguf(),
            server=str(self.builder.llama_server()),
            version=f"llama.cpp of {self.builder.llama_version()}",
            format=kind,
            invocations={name: list(info.invocation_tokens) for name, info in self.infos.items()},
            exact=exact,
        )
        return Launch(module("peers_llama"), setup, self.logs / "llama.cpp.log", wrapped=True)

    def _vllm(self, peer: Peer, shape: Shape, exact: bool) -> Launch:
        python = self.builder.vllm_python()
        kinds = {"compiled": dict, "plugin": self._own}
        adapters = kinds.get(peer.variant, self._plain)()
        setup = self._setup(shape, str(self.model), adapters, variant=peer.variant)
        env = {
            "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(setup.kv_bytes / 2**30)),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}" if self.threads > 1 else "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(map(str, self.builder.vllm_preloads())),
            **(plugin_environment(self.scratch) if peer.variant == "plugin" else {}),
        }
        return Launch(module("peers_vllm", python), setup, self.logs / "vllm.log", env)

    # ------------------------------------------------------------------ their files

    def _setup(self, shape: Shape, model: str, adapters: Mapping[str, Path], **options: object) -> Setup:
        return Setup(
            model=model,
            dtype=shape.dtype,
            threads=self.threads,
            adapters={name: str(path) for name, path in adapters.items()},
            streams=shape.streams,
            max_tokens=shape.max_tokens,
            kv_bytes=self.kv_mib * 2**20 * _BYTES[shape.dtype] // 2,
            options=options,
        )

    def _own(self) -> dict[str, Path]:
        return {name: self.root / name for name in INTRINSICS}

    def _plain(self) -> dict[str, Path]:
        made = {name: self.scratch / f"{name}-plain" for name in INTRINSICS}
        return made if all(path.is_dir() for path in made.values()) else plain_copies(self._own(), self.scratch)

    def _gguf(self) -> dict[str, Path]:
        try:
            return {name: self._gguf_of(name) for name in INTRINSICS}
        except ExportError as error:
            raise Absent(f"its format cannot hold the adapters: {error}") from error

    def _gguf_of(self, name: str) -> Path:
        target = self.scratch / f"{name}.gguf"
        return target if target.is_file() else write_gguf(self.root / name, target, self.model)


def read_info(folder: Path) -> AdapterInfo:
    """What the prompts need to know of an aLoRA's folder, without loading it into an engine."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return AdapterInfo(
        name=folder.name,
        kind="alora",
        digest="",
        path=str(folder),
        invocation_tokens=tuple(config["alora_invocation_tokens"]),
        invocation_text="",
        rank=config["r"],
        size_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        contract=(folder / "io.yaml").read_text(encoding="utf-8"),
    )
