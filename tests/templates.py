"""Chat templates of several families, over one tiny tokenizer that has all their markers."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from midstream.models.chat import ChatTokenizer
from tests.tiny import TEMPLATE

FOREIGN_END = "<|end_of_text|>"  # ends an answer, and stands in no template
MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<pad>", FOREIGN_END),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]"),
)

LLAMA = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system message stands in the first user turn, and alone it is refused.
MISTRAL = (
    "{% set told = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if told else messages %}"
    "{% if not turns %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "<s>{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ told if loop.first }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
# Of an answer that is the last turn it closes nothing.
OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role != 'assistant' or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Something stands before the token that closes an answer.
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# No marker closes a turn.
PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# The system message stands in the last user turn, wherever that is.
WANDERING = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and loop.last %}{{ messages[0].content }}\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# By name: the template, and the token that ends an answer.
TEMPLATES = {
    "chatml": (TEMPLATE, "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "open": (OPEN, "<|im_end|>"),
    "spaced": (SPACED, "</s>"),
    "plain": (PLAIN, "</s>"),
    "wandering": (WANDERING, "<|im_end|>"),
}


@functools.cache
def _tokenizer() -> Any:
    """Byte-level, but that `ab` is one token: so "ab" has a tokenization that is not the tokenizer's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"ab": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
    return tokenizer


@functools.cache
def templated(name: str) -> ChatTokenizer:
    """The tiny tokenizer with a family's template; its own end and a foreign one end an answer."""
    template, end = TEMPLATES[name]
    fast = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token=end, pad_token="<pad>")
    fast.chat_template = template
    folder = Path(tempfile.mkdtemp())
    fast.save_pretrained(folder)
    chat = ChatTokenizer.from_folder(folder)
    (foreign,) = chat.encode(FOREIGN_END)
    return dataclasses.replace(chat, eos_token_ids=chat.eos_token_ids | {foreign})
