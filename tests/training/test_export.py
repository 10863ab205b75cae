"""From files to a folder: stock PEFT agrees with it, the engine calls it, and its card says where it comes from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from midstream.intrinsics.spec import Contract
from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.export import export
from midstream.training.losses import batch_loss
from midstream.training.run import Budget, DataConfig, run_training
from midstream.training.tasks import TASKS, Task
from midstream.training.trainer import TrainConfig, train
from tests.helpers import tiny_llama
from tests.reference import logits, peft_model
from tests.tiny import save_tiny_tokenizer

INVOCATION = (256, 71)
EXAMPLES = [Example(tuple((i + j) % 200 for j in range(4 + i % 5)), INVOCATION, (90 + i % 2, 95)) for i in range(12)]


def write(network: Any, folder: Path, config: TrainConfig, task: Task) -> None:
    export(
        network,
        folder,
        config,
        base_model="tiny",
        task=task,
        invocation=INVOCATION,
        invocation_text="<x>",
        max_tokens=8,
        card="card",
    )


@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_stock_peft_gives_the_trained_networks_losses(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    plain = copy.deepcopy(model)
    config = TrainConfig(kind=kind, rank=4, epochs=2, batch_size=4, learning_rate=5e-3)  # type: ignore[arg-type]
    base_kv = BaseKV(model)
    result = train(model, EXAMPLES, config, base_kv=base_kv, run_folder=tmp_path / "run")
    folder = tmp_path / "adapter"
    write(result.network, folder, config, TASKS["jailbreak"])
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "io.yaml", "midstream.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["alora_invocation_tokens"] == (list(INVOCATION) if kind == "alora" else None)
    reference = peft_model(plain, {"a": folder})
    # The folder holds bfloat16: compare with the trained network rounded the same way.
    with torch.no_grad():
        for parameter in result.network.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(torch.bfloat16).float())
    kv = base_kv if kind == "alora" else None
    for example in EXAMPLES[:3]:
        ours = batch_loss(result.network.get_base_model(), [example], kv).detach()
        tokens = [*example.prefix, *example.invocation, *example.target]
        rows = logits(reference, tokens, "a")[-len(example.target) - 1 : -1]
        assert float(ours) == pytest.approx(float(F.cross_entropy(rows, torch.tensor(example.target))), abs=1e-3)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_contract_fits_the_task(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    config = TrainConfig(rank=2, epochs=1)
    result = train(model := tiny_llama(), EXAMPLES[:4], config, base_kv=BaseKV(model), run_folder=tmp_path / "run")
    write(result.network, tmp_path / "adapter", config, task)
    contract = Contract.model_validate(yaml.safe_load((tmp_path / "adapter" / "io.yaml").read_text()))
    assert contract.json_schema == task.schema
    assert contract.options() == task.options
    assert contract.instruction == task.instruction
    sidecar = json.loads((tmp_path / "adapter" / "midstream.json").read_text())
    assert sidecar == {"format": 1, "invocation_text": "<x>", "reads": task.reads, "task": name}


def test_a_run_writes_a_card_that_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDSTREAM_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    rows = [json.dumps({"text": f"t {i}", "label": i % 2, "source": "xstest" if i % 4 else "mine"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arguments = ["train", "--task", "jailbreak", "--data", "a folder/rows.jsonl"]

    def run(out: str) -> dict[str, Any]:
        return run_training(
            str(tmp_path / "tiny"),
            DataConfig((tmp_path / "rows.jsonl",), "jailbreak"),
            TrainConfig(rank=2, epochs=2),
            tmp_path / out,
            tmp_path / f"run-{out}",
            budget=Budget(memory_bytes=0, disk_bytes=10**8),
            arguments=arguments,
        )

    first = run("one")
    assert first["prefix_tokens_computed"] > 0
    assert first["rows"] == 40
    assert run("two")["prefix_tokens_computed"] == 0
    card = (tmp_path / "one" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert "alora" in front["tags"]
    for part in (
        "| XSTest | 30 | CC BY 4.0 | Röttger et al., 2024 |",
        "| the user's own data | 10 | not stated |",
        "midstream train --task jailbreak --data 'a folder/rows.jsonl'",
        "rows.jsonl`, sha256",
        repr(first["invocation"]).replace("|", "\\|"),
        f"epoch {first['best_epoch']} is exported",
        '`"yes"`',
    ):
        assert part in card, part
    assert str(tmp_path) not in card.replace(str(tmp_path / "tiny"), "")
