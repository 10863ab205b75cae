"""Writing a trained adapter as a PEFT folder that stock PEFT loads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from midstream.training.tasks import Task
from midstream.training.trainer import TrainConfig


def export(
    network: Any,
    folder: Path,
    config: TrainConfig,
    *,
    base_model: str,
    task: Task,
    invocation: Sequence[int],
    invocation_text: str,
    max_tokens: int,
    card: str,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors (bfloat16), io.yaml, midstream.json and README.md.

    A folder of that name is replaced when the new one is whole; what it measured of the old weights goes with it.
    `max_tokens` bounds an answer.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary) / folder.name
        work.mkdir()
        _write_weights(network, work)
        _write_config(network, work, config, base_model, invocation)
        _write_contract(work, base_model, task, max_tokens)
        sidecar = {"format": 1, "invocation_text": invocation_text, "reads": task.reads, "task": task.name}
        (work / "midstream.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        (work / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        work.rename(folder)


def _write_weights(network: Any, folder: Path) -> None:
    state = get_peft_model_state_dict(network)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_config(network: Any, folder: Path, config: TrainConfig, base_model: str, invocation: Sequence[int]) -> None:
    lora = network.peft_config["default"]
    lora.base_model_name_or_path = base_model
    lora.inference_mode = True
    lora.alora_invocation_tokens = list(invocation) if config.kind == "alora" else None
    lora.save_pretrained(folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_contract(folder: Path, base_model: str, task: Task, max_tokens: int) -> None:
    contract = {
        "model": base_model,
        "response_format": None if task.schema is None else json.dumps(task.schema),
        "instruction": task.instruction,
        "parameters": {"max_tokens": max_tokens},
        "transformations": None,
    }
    (folder / "io.yaml").write_text(yaml.safe_dump(contract, sort_keys=False))
