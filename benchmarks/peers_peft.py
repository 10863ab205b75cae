"""transformers with PEFT: a worker that holds one PeftModel with all adapters, used as their documentation does.

The base model, its adapters disabled, keeps its KV from call to call. An adapter reads the whole prompt at each call,
as `set_adapter` and `generate` do; the variant "cache" gives it a copy of the base model's KV up to its invocation,
which PEFT does not do by itself but lets its caller do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers_protocol import Answer, Call, Setup, serve
from midstream.adapters.activation import find_last


class PeftSide:
    """Base calls of one length are one batch; adapters are called one after the other."""

    _model: Any
    _shares: bool

    def load(self, setup: Setup) -> dict[str, Any]:
        base = AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.dtype))
        (first, folder), *others = setup.adapters.items()
        self._model = PeftModel.from_pretrained(base, folder, adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()
        # Every side decodes the same number of tokens.
        self._model.generation_config.eos_token_id = None
        self._shares = setup.options["variant"] == "cache"
        self.clear()
        versions = f"transformers {version('transformers')}, peft {version('peft')}, torch {torch.__version__}"
        return {"version": versions, "format": setup.dtype, "adapters": "alora"}

    def clear(self) -> None:
        self._cache = DynamicCache()
        self._cached: tuple[tuple[int, ...], ...] = ()

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self._reuse(prompts, [len(prompt) for prompt in prompts])
        start = min(map(len, self._cached), default=0)
        if start < len(prompts[0]):
            with torch.inference_mode(), self._model.disable_adapter():
                ids = torch.tensor([prompt[start:] for prompt in prompts])
                self._model(input_ids=ids, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cached = tuple(prompts)

    def run(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        base = [call for call in calls if call.adapter is None]
        found = dict(zip(map(id, base), self._base(base, logprobs), strict=True)) if base else {}
        return [found[id(call)] if call.adapter is None else self._adapter(call, logprobs) for call in calls]

    def close(self) -> None:
        pass

    def _base(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        prompts = [call.prompt for call in calls]
        # At least the last token of a prompt is computed, for its logits.
        self._reuse(prompts, [len(prompt) - 1 for prompt in prompts])
        computed = len(prompts[0]) - min(map(len, self._cached), default=0)
        with self._model.disable_adapter():
            answers = self._generate(calls, self._cache, computed, logprobs)
        self._cached = tuple((*c.prompt, *a.tokens[:-1]) for c, a in zip(calls, answers, strict=True))
        return answers

    def _adapter(self, call: Call, logprobs: bool) -> Answer:
        assert call.adapter is not None
        self._model.set_adapter(call.adapter)
        cache, kept = None, 0
        if self._shares and len(self._cached) == 1:
            invocation = self._model.peft_config[call.adapter].alora_invocation_tokens
            start = find_last(call.prompt, invocation)
            assert start is not None
            kept = _common(self._cached[0], call.prompt[:start])
            cache = copy.deepcopy(self._cache)
            _shorten(cache, len(self._cached[0]) - kept)
        return self._generate([call], cache, len(call.prompt) - kept, logprobs)[0]

    def _reuse(self, prompts: Sequence[tuple[int, ...]], limits: Sequence[int]) -> None:
        """Cut the base model's KV down to what these prompts have in common with it."""
        same = 0
        if len(prompts) == len(self._cached):
            pairs = zip(self._cached, prompts, limits, strict=True)
            same = min(_common(cached, prompt[:limit]) for cached, prompt, limit in pairs)
        if same == 0:
            self.clear()
        elif same < len(self._cached[0]):
            _shorten(self._cache, len(self._cached[0]) - same)
            self._cached = tuple(cached[:same] for cached in self._cached)

    @torch.inference_mode()
    def _generate(self, calls: Sequence[Call], cache: Any, computed: int, logprobs: bool) -> list[Answer]:
        label = calls[0].label
        prompts = [(*call.prompt, *(label.opening if label else ())) for call in calls]
        more: dict[str, Any] = {"cache": cache} if cache is not None else {}
        if label:
            allowed = list(label.parting)
            more["prefix_allowed_tokens_fn"] = lambda _batch, _ids: allowed
        ids = torch.tensor(prompts)
        found = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 if label else calls[0].tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=logprobs,
            return_dict_in_generate=True,
            **more,
        )
        tokens = found.sequences[:, len(prompts[0]) :]
        chances: list[list[float]] = [[] for _ in calls]
        if logprobs:
            logits = torch.stack(found.logits, dim=1).float()
            chances = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].tolist()
        return [Answer(tuple(t), computed, tuple(c)) for t, c in zip(tokens.tolist(), chances, strict=True)]


def _shorten(cache: Any, count: int) -> None:
    """Take the last `count` positions off; crop() takes those to remove as a negative number."""
    if count:
        cache.crop(-count)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    serve(PeftSide())
