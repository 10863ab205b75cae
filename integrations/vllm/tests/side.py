"""vLLM's side of the tests, in vLLM's own environment: an offline `LLM` that obeys one JSON line after another."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Side:
    """One `LLM`. Adapters are named by (name, number, folder), as vLLM's own `LoRARequest` does."""

    def load(self, options: dict[str, Any]) -> str:
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(**options)
        return str(vllm.__version__)

    def generate(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All calls as one batch: each has `prompt` (token ids), `adapter` or None, `params`."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": call["prompt"]} for call in calls],
            [self._params(call["params"]) for call in calls],
            lora_request=[self._lora(call["adapter"]) for call in calls],
            use_tqdm=False,
        )
        return [self._answer(output) for output in outputs]

    def add_lora(self, adapter: list[Any]) -> bool:
        return bool(self._llm.llm_engine.add_lora(self._lora(adapter)))

    def list_loras(self) -> list[int]:
        return sorted(self._llm.llm_engine.list_loras())

    def clear(self) -> bool:
        return bool(self._llm.reset_prefix_cache())

    def metric(self, name: str) -> float:
        """The sum of a counter's values."""
        return float(sum(metric.value for metric in self._llm.get_metrics() if metric.name == name))

    def _params(self, given: dict[str, Any]) -> Any:
        given = dict(given)
        if choice := given.pop("choice", None):
            from vllm.sampling_params import StructuredOutputsParams

            given["structured_outputs"] = StructuredOutputsParams(choice=choice)
        return self._vllm.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "logprobs": 0, **given})

    @staticmethod
    def _lora(adapter: list[Any] | None) -> Any:
        from vllm.lora.request import LoRARequest

        return None if adapter is None else LoRARequest(*adapter)

    @staticmethod
    def _answer(output: Any) -> dict[str, Any]:
        return {
            "cached": output.num_cached_tokens,
            "texts": [one.text for one in output.outputs],
            "tokens": [list(one.token_ids) for one in output.outputs],
            "logprobs": [
                [table[token].logprob for token, table in zip(one.token_ids, one.logprobs or (), strict=False)]
                for one in output.outputs
            ],
        }


def main() -> None:
    target = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints must not stand between our lines
    side = Side()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = {"ok": getattr(side, message.pop("op"))(**message)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        target.write(json.dumps(reply) + "\n")
        target.flush()


if __name__ == "__main__":
    main()
