"""A folder with what the benchmarks of RAG chats want, tiny: a model, the six intrinsics' adapters, conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.turn_script import INTRINSICS

from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import save_tiny_tokenizer, tiny_chat

PASSAGES = {"a": "It opens at nine.", "b": "It closes at five.", "c": "It is in the old town.", "d": "Cats."}
TURNS = [
    {"user": "When?", "answer": "Nine.", "relevant_doc_ids": ["a", "b"], "other_retrieved_doc_ids": ["d"]},
    {"user": "Where?", "answer": "Town.", "relevant_doc_ids": [], "other_retrieved_doc_ids": ["c"]},
]
SPLITS = {"test": [{"id": "tiny-1", "turns": TURNS}], "train": [{"id": "tiny-2", "turns": TURNS[::-1]}]}


def contract(name: str) -> str:
    if name == "query_rewrite":
        schema: dict[str, Any] = {"type": "object", "properties": {"rewritten_question": {"type": "string"}}}
    else:
        schema = {"type": "string", "enum": ["yes", "no"]}
    instruction = "'Requirement: {requirement}'" if name == "requirement_check" else "null"
    return f"model: null\nresponse_format: '{json.dumps(schema)}'\ninstruction: {instruction}\ntransformations: null\n"


def make_home(root: Path) -> Path:
    """`root` with the folder `model`, a folder an adapter, and the mtrag_*.jsonl files."""
    model = tiny_llama()
    model.save_pretrained(root / "model")
    save_tiny_tokenizer(root / "model")
    for seed, name in enumerate(INTRINSICS):
        invocation = tiny_chat().encode(f"<|im_start|>{name}\n")
        folder = make_adapter_folder(model, root / name, targets=SEVEN, invocation=invocation, seed=seed)
        (folder / "io.yaml").write_text(contract(name))
    write_conversations(root)
    return root


def write_conversations(root: Path) -> None:
    """The mtrag_*.jsonl files."""
    rows = [{"doc_id": name, "title": "", "text": text} for name, text in PASSAGES.items()]
    (root / "mtrag_corpus_tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, conversations in SPLITS.items():
        lines = "".join(json.dumps(row) + "\n" for row in conversations)
        (root / f"mtrag_conversations.{split}.jsonl").write_text(lines)
