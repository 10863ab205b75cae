"""A step on given KV has the loss and the gradients of PEFT's own aLoRA, whatever is recomputed or padded."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import GraniteConfig, MistralConfig

from midstream.training.base_kv import BaseKV
from midstream.training.data import Example
from midstream.training.losses import batch_loss
from midstream.training.prefix_attention import prefix_attention
from midstream.training.prefix_cache import use_gradient_checkpointing
from tests.helpers import SEVEN, tiny_llama, tiny_model

INVOCATION = (256, 71)
EXAMPLES = [
    Example(
        tuple((i * 7 + j) % 200 for j in range(4 + 3 * i)),
        INVOCATION,
        (90 + i % 2, 95, 97)[: 2 + i % 2],
        label=str(i % 2),
    )
    for i in range(4)
]


def both(model: Any, targets: tuple[str, ...]) -> tuple[Any, Any]:
    """A plain LoRA for our step, and the same weights as PEFT's aLoRA."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "r": 4,
        "target_modules": list(targets),
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(**common))
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**common, alora_invocation_tokens=list(INVOCATION)))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def reference_loss(theirs: Any, batch: list[Example]) -> torch.Tensor:
    """Each example alone through PEFT's aLoRA, prefix and all."""
    total = torch.tensor(0.0)
    for example in batch:
        ids = torch.tensor([[*example.prefix, *example.invocation, *example.target]])
        rows = theirs(input_ids=ids).logits[0, -len(example.target) - 1 : -1]
        total = total + F.cross_entropy(rows, torch.tensor(example.target)) / len(batch)
    return total


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    compared = 0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None, name
            assert float((a.grad - b.grad).norm()) <= 1e-4 * float(b.grad.norm()), name
            compared += float(b.grad.norm()) > 0
    assert compared == sum(p.requires_grad for p in theirs.parameters())


@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("targets", [("q_proj",), SEVEN], ids=["one target", "seven targets"])
def test_gradients_equal_those_of_peft(
    targets: tuple[str, ...], batch_size: int, checkpointing: bool, own_attention: bool
) -> None:
    """Fault 7 among others: PEFT's own gradient checkpointing drops the activation and leaves zero gradients."""
    ours, theirs = both(tiny_llama(), targets)
    network, batch = ours.get_base_model(), EXAMPLES[-batch_size:]
    if checkpointing:
        use_gradient_checkpointing(network)
    ours.train()
    with prefix_attention(network) if own_attention else nullcontext():
        loss = batch_loss(network, batch, BaseKV(network))
        loss.backward()
    expected = reference_loss(theirs.eval(), batch)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(ours, theirs)


def test_the_layers_are_in_fact_recomputed() -> None:
    ours, _ = both(tiny_llama(), SEVEN)
    network = ours.get_base_model()
    use_gradient_checkpointing(network)
    ours.train()
    kv = BaseKV(network)
    kv.prepare([e.prefix for e in EXAMPLES])
    calls = []
    network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch_loss(network, EXAMPLES, kv).backward()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["sliding window", "scaled logits"])
def test_gradients_on_models_with_more_than_plain_attention(kind: str) -> None:
    """A window narrower than the prefix, and Granite's multipliers, which the output layer alone would miss."""
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 258,
    }
    config = {
        "sliding window": lambda: MistralConfig(**sizes, sliding_window=6),
        "scaled logits": lambda: GraniteConfig(**sizes, logits_scaling=4.0, attention_multiplier=0.2),
    }[kind]()
    ours, theirs = both(tiny_model(config), SEVEN)
    network = ours.get_base_model()
    with prefix_attention(network):
        loss = batch_loss(network, EXAMPLES, BaseKV(network))
        loss.backward()
    expected = reference_loss(theirs, EXAMPLES)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(ours, theirs)


def test_a_plain_lora_step_equals_each_example_alone() -> None:
    ours, _ = both(tiny_llama(), SEVEN)
    network = ours.get_base_model()
    whole = batch_loss(network, EXAMPLES, None)
    alone = [float(batch_loss(network, [example], None).detach()) for example in EXAMPLES]
    assert float(whole.detach()) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    example = EXAMPLES[0]
    ids = torch.tensor([[*example.prefix, *example.invocation, *example.target]])
    rows = network(input_ids=ids).logits[0, -len(example.target) - 1 : -1]
    expected = F.cross_entropy(rows.detach(), torch.tensor(example.target))
    assert alone[0] == pytest.approx(float(expected), abs=1e-5)
