"""vLLM's CPU build: a worker in vLLM's own environment, over its offline `LLM`, so that no HTTP stands between.

The adapters are plain LoRAs there: stock vLLM knows no aLoRA. The variant "compiled" is the base model without LoRA;
"plugin" has the plugin of integrations/vllm, and aLoRAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers_protocol import Absent, Answer, Call, Setup, serve

_RANK = 16


class VllmSide:
    """Calls of one adapter are one batch, and the adapters come one after the other; with the plugin all are one batch.

    Stock vLLM takes two to three times as long for six adapters in one batch: its CPU kernel gathers weights per token.
    """

    _llm: Any = None
    _together = False

    def load(self, setup: Setup) -> dict[str, Any]:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise Absent(f"vLLM cannot be imported: {error}") from error
        self._params = vllm.SamplingParams
        variant = setup.options["variant"]
        compiled, self._together = variant == "compiled", variant == "plugin"
        adapted: dict[str, Any] = {}
        if not compiled:
            count = len(setup.adapters)
            adapted = {"enable_lora": True, "max_loras": count, "max_lora_rank": _RANK, "enforce_eager": True}
        self._llm = vllm.LLM(
            model=setup.model,
            dtype=setup.dtype,
            max_model_len=setup.max_tokens,
            block_size=32,
            enable_prefix_caching=True,
            **adapted,
        )
        named = enumerate(setup.adapters.items(), start=1)
        self._adapters = {name: LoRARequest(name, number, folder) for number, (name, folder) in named}
        kind = {"compiled": None, "plugin": "alora"}.get(variant, "lora")
        return {"version": vllm.__version__, "format": setup.dtype, "adapters": kind}

    def clear(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget its prefixes")

    def warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self.run([Call(None, prompt, 1) for prompt in prompts], False)

    def run(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        if self._together:
            return self._batch(calls, logprobs)
        found: dict[int, Answer] = {}
        for adapter in dict.fromkeys(call.adapter for call in calls):
            numbers = [number for number, call in enumerate(calls) if call.adapter == adapter]
            batch = self._batch([calls[number] for number in numbers], logprobs)
            found.update(zip(numbers, batch, strict=True))
        return [found[number] for number in range(len(calls))]

    def close(self) -> None:
        self._llm = None

    def _batch(self, calls: Sequence[Call], logprobs: bool) -> list[Answer]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": [*call.prompt, *(call.label.opening if call.label else ())]} for call in calls],
            [self._sampling(call, logprobs) for call in calls],
            lora_request=[None if call.adapter is None else self._adapters[call.adapter] for call in calls],
            use_tqdm=False,
        )
        return [_answer(output) for output in outputs]

    def _sampling(self, call: Call, logprobs: bool) -> Any:
        return self._params(
            temperature=0.0,
            max_tokens=1 if call.label else call.tokens,
            ignore_eos=True,
            allowed_token_ids=list(call.label.parting) if call.label else None,
            logprobs=0 if logprobs else None,
            detokenize=False,
        )


def _answer(output: Any) -> Answer:
    found = output.outputs[0]
    tokens = tuple(found.token_ids)
    chances = zip(tokens, found.logprobs or (), strict=False)
    computed = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
    return Answer(tokens, computed, tuple(float(table[token].logprob) for token, table in chances))


if __name__ == "__main__":
    serve(VllmSide())
