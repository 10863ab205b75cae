"""A tiny tokenizer and engine, so that tests run a real model in milliseconds."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.chat import ChatTokenizer
from midstream.models.load import prepare

VOCAB = 320
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the chat markers of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>", "<pad>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@functools.cache
def tiny_chat() -> ChatTokenizer:
    folder = Path(tempfile.mkdtemp())
    save_tiny_tokenizer(folder)
    return ChatTokenizer.from_folder(folder)


def tiny_engine(model: Any, **config: Any) -> AsyncEngine:
    """An engine over a copy of `model`. However slow the machine: only `max_step_tokens` cuts a prefill."""
    config.setdefault("kv_budget_bytes", 4 * 1024**2)
    config.setdefault("prefill_step_s", 1e6)
    return AsyncEngine(prepare(copy.deepcopy(model), tiny_chat(), name="tiny"), EngineConfig(**config))
