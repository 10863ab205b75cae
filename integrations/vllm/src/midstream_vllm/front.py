"""The front's side: adapters as they are asked for become the engine's own, and requests get their activation index.

A caller's adapter has a name, a number and a folder, all of which may come to mean something else. The engine's is
known by its content alone: number, name and folder follow from the digest. So a reload under the same name is another
adapter for the engine, requests that still run with the old one finish with it, and no KV of the one is the other's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from midstream_vllm.base_model import linear_shapes
from midstream_vllm.core import AdapterFormatError, InvocationError, MidstreamError, activation_index
from midstream_vllm.faults import AdapterRefused, InvocationMissing, NotServed
from midstream_vllm.ownership import INDEX_FIELD
from midstream_vllm.store import Base, Kept, adapters_folder, keep

_NUMBERS = 2**31 - 1  # vLLM keeps adapters' numbers in 32 bits
_ATTRIBUTE = "_midstream_front"


@dataclass(frozen=True, slots=True)
class Bound:
    """What a caller's number stands for: the folder that was read, what was in it, and the engine's adapter."""

    name: str
    source: str
    kept: Kept
    request: LoRARequest


class Front:
    """The adapters of one engine, seen from its front. May be called from several threads."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._config = processor.vllm_config
        self._lock = threading.RLock()
        self._base: Base | None = None
        self._bound: dict[int, Bound] = {}  # by the caller's number
        self._digests: dict[int, str] = {}  # by the engine's number
        self.loaded: set[int] = set()  # the engine's numbers that its workers have taken once
        self.failures: dict[str, MidstreamError] = {}  # by name: why the last load of it failed

    # ------------------------------------------------------------------ adapters

    def resolve(self, asked: LoRARequest) -> Bound:
        """The adapter that a request asks for. Its folder is read only when this number is new or names another one."""
        with self._lock:
            bound = self._bound.get(asked.lora_int_id)
            if bound is None or (bound.name, bound.source) != (asked.lora_name, asked.lora_path):
                bound = self.read(asked)
                self.bind(asked, bound)
            return bound

    def read(self, asked: LoRARequest) -> Bound:
        """Read and check the folder as it is now. Raises AdapterRefused, or NotServed."""
        path = get_adapter_absolute_path(asked.lora_path)
        try:
            kept = keep(Path(path), asked.lora_name, self._checked_against(), adapters_folder())
            number = self._number(kept.digest)
        except AdapterFormatError as error:
            raise self._failed(asked, AdapterRefused(asked.lora_path, error.violations)) from None
        if kept.spec.kind == "alora" and (reasons := unserved(self._config)):
            why = f"adapter {asked.lora_name} is an activated LoRA, which is not served " + "; ".join(reasons)
            raise self._failed(asked, NotServed(why))
        request = LoRARequest(
            lora_name=f"{asked.lora_name}@{kept.digest[:12]}",
            lora_int_id=number,
            lora_path=str(kept.path),
            base_model_name=asked.base_model_name,
            is_3d_lora_weight=asked.is_3d_lora_weight,
        )
        return Bound(asked.lora_name, asked.lora_path, kept, request)

    def bind(self, asked: LoRARequest, bound: Bound) -> None:
        with self._lock:
            self._bound[asked.lora_int_id] = bound
            self.failures.pop(asked.lora_name, None)

    def took(self, asked: LoRARequest, bound: Bound) -> None:
        """The workers have loaded it: from now on the caller's number stands for it."""
        self.bind(asked, bound)
        self.loaded.add(bound.request.lora_int_id)

    def unbind(self, number: int) -> int:
        """Forget a caller's number; gives the engine's, or the same where it stood for none of ours."""
        with self._lock:
            bound = self._bound.pop(number, None)
            if bound is None:
                return number
            self.loaded.discard(bound.request.lora_int_id)
            return bound.request.lora_int_id

    def engine_number(self, number: int) -> int:
        bound = self._bound.get(number)
        return number if bound is None else bound.request.lora_int_id

    def caller_numbers(self, numbers: set[int]) -> set[int]:
        """The callers' numbers of the engine's adapters that still stand for something."""
        names = {bound.request.lora_int_id: number for number, bound in self._bound.items()}
        return {names.get(number, number) for number in numbers if number in names or number not in self._digests}

    # ------------------------------------------------------------------ requests

    def check(self, asked: LoRARequest, tokens: Sequence[int]) -> None:
        """Raises InvocationMissing where a prompt does not invoke the adapter that it asks for."""
        self._index(self.resolve(asked), tokens)

    def mark(self, request: Any, bound: Bound) -> None:
        """Give an EngineCoreRequest its activation index. Raises InvocationMissing, or NotServed."""
        if bound.kept.spec.kind != "alora":
            return
        tokens, params = request.prompt_token_ids, request.sampling_params
        if params is None:
            raise NotServed(f"adapter {bound.name} is an activated LoRA, which is not served for pooling")
        if tokens is None or request.prompt_embeds is not None:
            raise NotServed(f"adapter {bound.name} is an activated LoRA, which needs a prompt of tokens")
        if request.resumable:
            raise NotServed(f"adapter {bound.name} is an activated LoRA, not served for prompts that still grow")
        params.extra_args = {**(params.extra_args or {}), INDEX_FIELD: self._index(bound, tokens)}

    def _index(self, bound: Bound, tokens: Sequence[int]) -> int:
        if bound.kept.spec.kind != "alora":
            return 0
        tokenizer = self._processor.tokenizer
        describe = None if tokenizer is None else lambda ids: tokenizer.decode(list(ids))
        try:
            return activation_index(tokens, bound.kept.spec.invocation_tokens, adapter=bound.name, describe=describe)
        except InvocationError as error:
            raise InvocationMissing(str(error)) from None

    # ------------------------------------------------------------------ inside

    def _failed(self, asked: LoRARequest, error: MidstreamError) -> MidstreamError:
        self.failures[asked.lora_name] = error
        return error

    def _checked_against(self) -> Base:
        # Two threads may make it at once, and make the same.
        if self._base is None:
            tokenizer = self._processor.tokenizer
            self._base = Base(
                shapes=linear_shapes(self._config.model_config),
                vocab_size=self._config.model_config.get_vocab_size(),
                encode=None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False),
                max_rank=self._config.lora_config.max_lora_rank,
                patterns="rank_pattern" in PEFTHelper.__dataclass_fields__,
            )
        return self._base

    def _number(self, digest: str) -> int:
        """The engine's number for a digest: the same in every process of one engine."""
        number = 1 + int(digest[:16], 16) % _NUMBERS
        if self._digests.setdefault(number, digest) != digest:
            raise AdapterFormatError("", ["by a chance of one in two thousand million it has another adapter's number"])
        return number


def front_of(processor: Any) -> Front:
    """The front that belongs to one of vLLM's input processors."""
    found: Front | None = processor.__dict__.get(_ATTRIBUTE)
    return found if found is not None else processor.__dict__.setdefault(_ATTRIBUTE, Front(processor))


def unserved(config: Any) -> list[str]:
    """What of an engine's configuration activated LoRAs are not served with, each with its reason."""
    model, lora, speculative = config.model_config, config.lora_config, config.speculative_config
    reasons = {
        "with --specialize-active-lora, which counts adapters and not the base model's tokens among theirs": (
            lora.specialize_active_lora
        ),
        "with --enable-tower-connector-lora, which adapts images anywhere": lora.enable_tower_connector_lora,
        "with a KV connector, which may know KV by its tokens alone": config.kv_transfer_config is not None,
        "with --kv-sharing-fast-prefill, which skips tokens": config.cache_config.kv_sharing_fast_prefill,
        "with speculative decoding other than ngram, which was not tried": (
            speculative is not None and speculative.method != "ngram"
        ),
        "by encoder-decoder models": model.is_encoder_decoder,
        "by diffusion models": getattr(model, "is_diffusion", False),
        "by pooling models": model.runner_type == "pooling",
    }
    return [reason for reason, holds in reasons.items() if holds]
