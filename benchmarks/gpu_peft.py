"""PEFT on the same device with the same weights: an adapter reads the whole prompt, as its documentation has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache


class PeftSide:
    """One model with its adapters by name."""

    def __init__(self, model: Any, folders: dict[str, Path]) -> None:
        (first, folder), *others = folders.items()
        self._model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(str(folder), adapter_name=name)
        self._model.eval()
        # PEFT keeps factors in float32; the engine has them in the model's type, which is faster.
        for name, parameter in self._model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        self._device = model.device

    @torch.inference_mode()
    def label(self, prompt: tuple[int, ...], adapter: str | None) -> int:
        """The likeliest next token; of the base model for None."""
        ids = torch.tensor([prompt], device=self._device)
        if adapter is None:
            with self._model.disable_adapter():
                output = self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
        else:
            self._model.set_adapter(adapter)
            output = self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    @torch.inference_mode()
    def begin(self, prompt: tuple[int, ...]) -> DynamicCache:
        """The base model's KV of a prompt."""
        cache = DynamicCache()
        with self._model.disable_adapter():
            ids = torch.tensor([prompt], device=self._device)
            output = self._model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        output.logits[0, -1].argmax().item()  # waits for the device
        return cache

    @torch.inference_mode()
    def decode(self, cache: DynamicCache, token: int, steps: int) -> list[int]:
        """Greedy tokens of the base model, one forward each, without what `generate` adds to them."""
        found = []
        with self._model.disable_adapter():
            for _ in range(steps):
                ids = torch.tensor([[token]], device=self._device)
                output = self._model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
                token = int(output.logits[0, -1].argmax())
                found.append(token)
        return found
