"""Drafts by n-gram, which one step verifies: tokens of base and adapter beside each other, several a row."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import SMALL, Reference
from prompts import calls
from serving import Vllm


@pytest.mark.newest
def test_drafted_answers_are_pefts(vllm: Vllm, model_folder: str, peft: Reference, tokenizer: Any) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    asked = calls(tokenizer, 12)[28:32]
    with vllm.offline(model=model_folder, **SMALL, speculative_config=drafts) as engine:
        found = engine.ask("generate", calls=asked)
        assert engine.ask("metric", name="vllm:spec_decode_num_accepted_tokens") > 0
    for call, answer in zip(asked, found, strict=True):
        assert answer["tokens"][0] == peft.greedy(call, answer["tokens"][0]), call["adapter"]
