"""The trainer on a tiny model: on top of given KV it learns exactly what a whole forward would."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from midstream.adapters.activation import find_last
from midstream.errors import DataError, InputError, InvocationError
from midstream.training.base_kv import BaseKV
from midstream.training.data import (
    TASKS,
    Example,
    encode,
    plain_task,
    read_histories,
    read_rows,
    sample,
    with_wrong_documents,
    within_histories,
)
from midstream.training.evaluate import figures, positive_probabilities
from midstream.training.export import export
from midstream.training.losses import batch_loss
from midstream.training.run import DataConfig, run_evaluation, run_training
from midstream.training.trainer import TrainConfig, train
from tests.helpers import SEVEN, tiny_llama
from tests.reference import logits, peft_model
from tests.tiny import save_tiny_tokenizer, tiny_chat

INVOCATION = (256, 71)
EXAMPLES = [
    Example(tuple((i * 7 + j) % 200 for j in range(4 + i % 5)), INVOCATION, (90 + i % 2, 95), "g", str(i % 2))
    for i in range(24)
]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"rank": 4, "epochs": 3, "batch_size": 6, "learning_rate": 5e-3, **changes})


def test_loss_and_gradients_on_given_kv_are_those_of_a_whole_forward() -> None:
    """Fault 7 among others: the adapted part has gradients, and the prefix has the base model's KV."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=list(SEVEN), init_lora_weights=False, task_type="CAUSAL_LM")
    whole = LoraConfig(
        r=4,
        target_modules=list(SEVEN),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(INVOCATION),
    )
    ours = get_peft_model(tiny_llama(), lora)
    theirs = get_peft_model(tiny_llama(), whole)
    theirs.load_state_dict(ours.state_dict())
    batch = EXAMPLES[:5]
    kv = BaseKV(ours.get_base_model(), model_key="tiny", dtype=torch.float32)
    loss = batch_loss(ours.get_base_model(), batch, kv)
    loss.backward()
    total = 0.0
    for example in batch:
        ids = torch.tensor([[*example.prefix, *example.invocation, *example.target]])
        rows = theirs(input_ids=ids).logits[0, -len(example.target) - 1 : -1]
        total = total + F.cross_entropy(rows, torch.tensor(example.target)) / len(batch)
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=1e-5)
    compared = 0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None, name
            assert b.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
            compared += bool(a.grad.abs().max() > 0)
    assert compared > 10


def test_prefixes_are_computed_once_whatever_the_epochs(tmp_path: Path) -> None:
    model = tiny_llama()
    kv = BaseKV(model, model_key="tiny")
    result = train(model, EXAMPLES, config(), base_kv=kv, run_folder=tmp_path)
    assert kv.computed_tokens == sum(len(p) for p in {e.prefix for e in EXAMPLES})
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]


def test_what_does_not_fit_in_memory_goes_to_disk_and_is_the_same(tmp_path: Path) -> None:
    model = tiny_llama()
    prefixes = [e.prefix for e in EXAMPLES[:4]]
    expected, mask = BaseKV(model, model_key="tiny", dtype=torch.float32).batch(prefixes)
    small = BaseKV(
        model, model_key="tiny", dtype=torch.float32, memory_bytes=1200, folder=tmp_path / "kv", disk_bytes=10**6
    )
    small.batch(prefixes)
    computed = small.computed_tokens
    again, mask2 = small.batch(prefixes)
    assert small.computed_tokens == computed
    assert list((tmp_path / "kv").glob("*.safetensors"))
    assert torch.equal(mask, mask2)
    for a, b in zip(expected.layers, again.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    def weights(result: Any) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in result.network.named_parameters() if p.requires_grad}

    def run(folder: str, examples: list[Example] = EXAMPLES, **changes: Any) -> Any:
        model = tiny_llama()
        kv = BaseKV(model, model_key="t")
        return train(model, examples, config(**changes), base_kv=kv, run_folder=tmp_path / folder)

    whole = weights(run("whole"))
    from midstream.training import trainer

    finish = trainer._Run._checkpoint

    def die(self: Any) -> None:
        finish(self)
        if len(self.history) == 1:
            raise KeyboardInterrupt

    trainer._Run._checkpoint = die  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    finally:
        trainer._Run._checkpoint = finish  # type: ignore[method-assign]
    resumed = weights(run("killed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])
    with pytest.raises(InputError, match="other settings"):
        run("killed", rank=2)
    with pytest.raises(InputError, match="rows"):
        run("killed", EXAMPLES[:10])


@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_the_exported_folder_agrees_with_stock_peft(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    plain = copy.deepcopy(model)
    settings = config(kind=kind)
    base_kv = BaseKV(model, model_key="tiny", dtype=torch.float32)
    result = train(model, EXAMPLES, settings, base_kv=base_kv, run_folder=tmp_path / "run")
    folder = tmp_path / "adapter"
    export(
        result.network,
        folder,
        settings,
        base_model="tiny",
        invocation=INVOCATION,
        invocation_text="<x>",
        labels=('"yes"', '"no"'),
        max_tokens=4,
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "io.yaml",
        "midstream.json",
    ]
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


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path: Path) -> None:
    """Fault 12: a rate that wrecks the adapter after the first epoch must not be exported."""
    model = tiny_llama()
    settings = config(learning_rate=3.0, epochs=4, patience=9)
    result = train(model, EXAMPLES, settings, base_kv=BaseKV(model, model_key="t"), run_folder=tmp_path)
    losses = [entry["validation_loss"] for entry in result.history]
    assert result.best_epoch == losses.index(min(losses))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    held = {n: p for n, p in result.network.named_parameters() if p.requires_grad}
    best = next(iter(state["best"].items()))
    name = best[0].replace(".weight", ".default.weight")
    assert torch.equal(held[name], best[1])


def test_every_bad_row_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = {"text": "hi \u2028 there", "label": 1}
    rows = [json.dumps(good, ensure_ascii=False), "{", json.dumps({"text": "x"}), json.dumps({"text": 3, "label": 0})]
    file.write_text("\n".join([*rows, ""]))
    with pytest.raises(DataError) as caught:
        read_rows([file], TASKS["jailbreak"])
    assert len(caught.value.problems) == 3
    for line in (2, 3, 4):
        assert f"line {line}:" in str(caught.value)
    file.write_text(rows[0])
    assert read_rows([file], TASKS["jailbreak"])[0].target == '"yes"'


def test_invocations_are_checked_in_every_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say <|im_start|>x\n"}], "target": "t"}
    file.write_text(json.dumps(row))
    rows = read_rows([file], plain_task("x"))
    with pytest.raises(InvocationError, match="already contains"):
        encode(rows, tiny_chat(), "<|im_start|>x\n")
    examples = encode(rows, tiny_chat(), "<|im_start|>y\n")
    assert find_last(examples[0].prefix + examples[0].invocation, examples[0].invocation) == len(examples[0].prefix)


def test_samples_are_balanced_and_wrong_documents_are_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{i}"}],
            "documents": [{"doc_id": "d", "title": f"t{i}", "text": f"text {i}"}],
            "label": "answerable" if i % 4 else "unanswerable",
        }
        for i in range(40)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    read = with_wrong_documents(read_rows([file], TASKS["answerability"]), 0.5, seed=1)
    wrong = [row for row in read if row.group == "wrong documents"]
    assert len(wrong) == 15
    for row in wrong:
        assert row.target == '"unanswerable"'
        assert row.chat.documents[0].text.split()[1] != row.chat.messages[0].content[1:]
    picked = sample(encode(read, tiny_chat(), "<|im_start|>z\n"), 20, None, 0)
    assert sum(e.label == '"answerable"' for e in picked) == 10


def test_histories_put_turns_deep_into_conversations_over_passages(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(20)))
    earlier = {
        "messages": [{"role": "user", "content": "when?"}],
        "documents": [{"doc_id": "d", "title": "T", "text": "in 1752"}],
        "answers": ["1752"],
    }
    (tmp_path / "earlier.jsonl").write_text(json.dumps(earlier))
    rows = read_rows([tmp_path / "rows.jsonl"], TASKS["jailbreak"])
    histories = read_histories([tmp_path / "earlier.jsonl"])
    assert [message.content for message in histories[0].messages] == ["when?", "1752"]
    mixed = within_histories(rows, histories, 0.5, '"no"', seed=0)
    placed = [row for row in mixed[:20] if len(row.chat.messages) == 3]
    assert len(placed) == 10
    assert all(row.chat.messages[0].documents and row.chat.messages[2].content.startswith("t") for row in placed)
    questions = mixed[20:]
    assert len(questions) == 10
    assert {row.target for row in questions} == {'"no"'}
    assert {len(row.chat.messages) for row in questions} == {1, 3}
    assert all(row.chat.messages[-1].content == "when?" for row in questions)


def test_evaluation_runs_the_adapter_and_not_the_base_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    save_tiny_tokenizer(tmp_path / "tiny")
    rows = [json.dumps({"text": ("bad " if i % 2 else "good ") + str(i), "label": i % 2}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = DataConfig((tmp_path / "rows.jsonl",), "jailbreak")
    settings = config(rank=8, epochs=6, learning_rate=1e-2)
    model, out = str(tmp_path / "tiny"), tmp_path / "mine"
    run_training(model, data, settings, out, tmp_path / "run", progress=False)
    report = run_evaluation(model, data, [out], progress=False)
    assert report["mine"]["all"]["accuracy"]["value"] > 0.95
    assert report["base"]["all"]["accuracy"]["value"] < 0.9


def test_figures_and_probabilities() -> None:
    model = tiny_llama()
    labels = [(90, 95), (91, 95)]
    found = positive_probabilities(model, EXAMPLES, labels, BaseKV(model, model_key="t", dtype=torch.float32))
    for example, share in zip(EXAMPLES, found, strict=True):
        row = logits(model, [*example.prefix, *example.invocation])[-1][[90, 91]].softmax(-1)
        assert share == pytest.approx(float(row[0]), abs=1e-4)
    perfect = torch.tensor([float(e.label == "1") for e in EXAMPLES]).numpy()
    report = figures(perfect, EXAMPLES, "1")
    assert report["accuracy"]["value"] == report["auroc"]["value"] == 1.0
    assert report["accuracy"]["low"] <= 1.0
