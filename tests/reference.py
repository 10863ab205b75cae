"""What PEFT and plain transformers compute, from scratch, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor


def peft_model(model: Any, folders: dict[str, Path]) -> Any:
    """A copy of `model` with the folders loaded by stock PEFT."""
    base = copy.deepcopy(model)
    wrapped = None
    for name, folder in folders.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, adapter_name=name)
    assert wrapped is not None
    return wrapped.eval()


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int], adapter: str | None = None) -> Tensor:
    """Logits [tokens, vocab] of a whole sequence read at once."""
    ids = torch.tensor([list(tokens)])
    if adapter is None:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                return model(input_ids=ids).logits[0]
        return model(input_ids=ids).logits[0]
    model.set_adapter(adapter)
    # PEFT finds the invocation itself, so that ours is compared with its rule and not with a copy of ours.
    return model(input_ids=ids).logits[0]


@torch.inference_mode()
def greedy(model: Any, tokens: Sequence[int], adapter: str | None, steps: int) -> list[int]:
    """PEFT's own greedy continuation; it goes on over end-of-sequence tokens."""
    ids = torch.tensor([list(tokens)])
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    if adapter is None:
        with model.disable_adapter():
            return model.generate(input_ids=ids, **options)[0, len(tokens) :].tolist()
    model.set_adapter(adapter)
    return model.generate(input_ids=ids, **options)[0, len(tokens) :].tolist()
