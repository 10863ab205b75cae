"""The adapters that are measured: the library's, random ones where it has too few, and a plain LoRA."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from midstream.adapters.spec import CONFIG_FILE
from midstream.adapters.weights import WEIGHTS_FILE
from midstream.bench.model import ModelFacts
from midstream.engine.apart import apart
from midstream.errors import InputError
from midstream.library import library_adapters
from midstream.session import Engine
from midstream.types import AdapterInfo

FANOUT = 6
RANK = 16
_INVOCATION = "<|im_start|>bench\n"


@dataclass(frozen=True, slots=True)
class Adapters:
    """Aloras, all different, and `lora`: the weights of the first as a plain LoRA. `random`: how many mean nothing."""

    alora: tuple[AdapterInfo, ...]
    lora: AdapterInfo
    random: int

    @property
    def longest_invocation(self) -> int:
        return max(len(info.invocation_tokens) for info in self.alora)

    def as_dict(self) -> dict[str, Any]:
        return {
            "alora": [info.name for info in self.alora],
            "random": self.random,
            "rank": self.alora[0].rank,
            "invocation_tokens": len(self.alora[0].invocation_tokens),
        }


def check_rank(rank: int, facts: ModelFacts) -> None:
    """Raises InputError for a rank that this model's linear layers are too narrow for."""
    if not facts.linear_shapes:
        raise InputError(f"{facts.name} has no linear layer that an adapter could be attached to")
    narrowest = min(min(shape) for shape in facts.linear_shapes.values())
    if not 1 <= rank <= narrowest:
        raise InputError(f"rank {rank}: it is 1 to {narrowest}, the narrowest linear layer of {facts.name}")


def load_adapters(engine: Engine, facts: ModelFacts, rank: int | None) -> Adapters:
    """FANOUT aloras and a plain LoRA, pinned: the library's first, then random ones over all linear layers.

    With a `rank` all are random ones of that rank; None takes RANK for those. Raises InputError for a rank that is
    too large and AdapterError where they do not fit into memory.
    """
    kept = [] if rank is not None else _library(engine)
    if len(kept) < FANOUT:
        check_rank(rank or RANK, facts)
    invocation = engine.aio.chat.encode(_INVOCATION)
    with tempfile.TemporaryDirectory(prefix="midstream-bench-") as temporary:
        root = Path(temporary)
        for number in range(len(kept), FANOUT):
            folder = root / f"random-{number}"
            # In a thread that ends: drawing random numbers is work for several cores.
            apart(lambda: write_random(folder, facts.linear_shapes, rank or RANK, invocation, seed=number))  # noqa: B023
            kept.append(engine.load_adapter(folder, pin=True))
        twin = write_twin(Path(kept[0].path), root / "plain-lora")
        lora = engine.load_adapter(twin, pin=True)
    return Adapters(tuple(kept), lora, sum(info.name.startswith("random-") for info in kept))


def write_random(
    folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, invocation: Sequence[int], *, seed: int
) -> None:
    """Write a PEFT folder with random weights for linear layers of `shapes` (module path → (out, in)).

    Without `invocation` it is a plain LoRA. B is not zero, so that the adapter changes what the model says; it is
    small, so that the numbers stay in the range that a trained adapter's have.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=draw) / columns**0.5
        b = torch.randn(rows, rank, generator=draw) * 0.01
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "bias": "none",
        "alora_invocation_tokens": list(invocation) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def write_twin(source: Path, folder: Path) -> Path:
    """Write the plain LoRA with an alora's weights: it owns every token, also those before the invocation."""
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    plain = {key: v for key, v in config.items() if key not in ("alora_invocation_tokens", "invocation_string")}
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes((source / WEIGHTS_FILE).read_bytes())
    return folder


def _library(engine: Engine) -> list[AdapterInfo]:
    """The library's first FANOUT aloras, by name."""
    kept: list[AdapterInfo] = []
    for folder in library_adapters(engine.aio.model_name):
        info = engine.load_adapter(folder, pin=True)
        if info.kind == "alora" and len(kept) < FANOUT:
            kept.append(info)
        else:
            engine.unload_adapter(info.name)
    return kept
