"""Who answers a turn's calls: midstream's engine with aLoRAs or plain LoRAs, and stock PEFT."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.turn_script import Call
from midstream.engine.apart import apart
from midstream.session import Engine
from midstream.types import Choice, Request, SamplingParams

# Whose KV outlives a call: everybody's, the base model's alone, or nobody's.
Keeps = Literal["all", "base", "nothing"]


class Answer(NamedTuple):
    """The tokens of an answer, and how many of the prompt's were computed for it."""

    tokens: tuple[int, ...]
    computed: int


class Side(Protocol):
    """One way to serve the same program."""

    name: str

    async def fresh(self) -> None:
        """Forget all KV."""
        ...

    async def run(self, call: Call) -> Answer: ...

    async def kv_bytes(self) -> int:
        """KV that is kept now."""
        ...


class EngineSide:
    """midstream's engine. `adapters` are the names under which the intrinsics' adapters are loaded.

    A call whose KV is not kept has a cache scope of its own, in which it finds nothing, and which is emptied after it.
    """

    def __init__(self, name: str, engine: Engine, adapters: Mapping[str, str], keeps: Keeps) -> None:
        self.name = name
        self._engine = engine.aio
        self._adapters = adapters
        self._keeps = keeps
        self._scopes = itertools.count(1)

    async def fresh(self) -> None:
        await self._engine.clear_cache()

    async def run(self, call: Call) -> Answer:
        kept = self._keeps == "all" or (self._keeps == "base" and call.adapter is None)
        scope = "" if kept else f"{self.name}-{next(self._scopes)}"
        params = SamplingParams(max_tokens=call.tokens, ignore_eos=True)
        if call.options:
            params = SamplingParams(constraint=Choice(options=call.options))
        adapter = None if call.adapter is None else self._adapters[call.adapter]
        request = Request(prompt=call.prompt, adapter=adapter, params=params, cache_scope=scope)
        completion = await self._engine.complete(request)
        if not kept:
            await self._engine.clear_cache(scope)
        return Answer(completion.token_ids, completion.usage.computed_tokens)

    async def kv_bytes(self) -> int:
        return (await self._engine.stats()).kv_used_bytes


class PeftSide:
    """One PeftModel with all six aLoRAs, as PEFT and transformers are used: `set_adapter`, then `generate`.

    The base model answers with the adapters disabled and keeps its KV over the turns. An adapter reads the whole
    prompt at each call: PEFT keeps no KV between calls. A label is one decoded token behind the tokens that all
    labels begin with, as on the engine's sides.
    """

    name = "peft"

    def __init__(
        self, model: Path, folders: Mapping[str, Path], encode: Callable[[str], Sequence[int]], dtype: torch.dtype
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        first, *others = folders
        self._model: Any = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
        for name in others:
            self._model.load_adapter(folders[name], adapter_name=name)
        self._model.eval()
        # Every side decodes the same number of tokens.
        self._model.generation_config.eos_token_id = None
        self._encode = encode
        self._cache = DynamicCache()
        self._cached: tuple[int, ...] = ()

    async def fresh(self) -> None:
        self._cache, self._cached = DynamicCache(), ()

    async def run(self, call: Call) -> Answer:
        return apart(lambda: self._answer(call))  # a team of this thread's own would slow the engine's sides

    def _answer(self, call: Call) -> Answer:
        if call.adapter is None:
            return self._base(call)
        self._model.set_adapter(call.adapter)
        if not call.options:
            return Answer(self._generate(call.prompt, call.tokens), len(call.prompt))
        opening, parting = parted([tuple(self._encode(option)) for option in call.options])
        allowed = list(parting)
        (token,) = self._generate((*call.prompt, *opening), 1, prefix_allowed_tokens_fn=lambda _batch, _ids: allowed)
        return Answer(parting[token], len(call.prompt))

    async def kv_bytes(self) -> int:
        kept = (t for layer in self._cache.layers if layer.is_initialized for t in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in kept)

    def _base(self, call: Call) -> Answer:
        # At least the last prompt token is computed, for its logits.
        same = _common(self._cached, call.prompt[:-1])
        if same < len(self._cached):
            self._cache.crop(same - len(self._cached))  # negative: so many tokens less
        with self._model.disable_adapter():
            tokens = self._generate(call.prompt, call.tokens, cache=self._cache)
        self._cached = (*call.prompt, *tokens[:-1])
        return Answer(tokens, len(call.prompt) - same)

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[int], count: int, **more: Any) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        mask: Tensor = torch.ones_like(ids)
        found = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **more
        )
        return tuple(found[0, len(prompt) :].tolist())


def plain_copies(folders: Mapping[str, Path], target: Path) -> dict[str, Path]:
    """Copies of aLoRA folders that are plain LoRAs: the same weights, owning every token of the prompts they read."""
    copies: dict[str, Path] = {}
    for name, folder in folders.items():
        copies[name] = target / f"{name}-plain"
        shutil.copytree(folder, copies[name])
        path = copies[name] / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": None}))
    return copies


def parted(options: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    """What all options begin with, and each option by the token in which it parts from the others."""
    shared = min(_common(options[0], option) for option in options)
    parting = {option[shared]: option for option in options if len(option) > shared}
    if len(parting) < len(options):
        raise SystemExit("these labels part at several places: one decoded token cannot tell them apart")
    return options[0][:shared], parting


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
