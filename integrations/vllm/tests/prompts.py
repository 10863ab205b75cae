"""Ten conversations of several turns, and the calls of two aLoRAs, a LoRA and the base model on each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LIBRARY = ROOT / "library" / "smollm2-135m-instruct"
ALORAS = ("answerability", "certainty")
LORA = "jailbreak-lora"
NUMBERS = {name: number for number, name in enumerate((*ALORAS, LORA), start=1)}

_TURNS = (
    ("Who wrote Faust?", "Goethe wrote it, over sixty years.", "And which river flows through his town?"),
    ("Name three rivers of France.", "The Seine, the Loire and the Rhone.", "Which of them is the longest?"),
    ("What is a prime number?", "A number above one that only one and itself divide.", "Is 91 one of them?"),
    ("My train leaves at noon.", "Then you should be at the station a little earlier.", "How long is the way there?"),
    ("Translate 'good morning' into German.", "Guten Morgen.", "And into Italian, please?"),
    ("I have two cats and a dog.", "That sounds like a lively home.", "How many legs have they together?"),
    ("When was the bridge built?", "The bridge was opened in 1937.", "Who was the engineer?"),
    (
        "Write a haiku about rain.",
        "Rain on the tin roof, the gutter hums, the cat sleeps through it.",
        "Another.",
    ),
    ("What boils first, water or oil?", "Water does, at a hundred degrees.", "Why is that so?"),
    ("Give me a name for a sailing boat.", "What about Petrel, after the bird of the storms?", "Something shorter."),
)


def adapter(name: str, folder: Path | None = None) -> list[Any]:
    """Name, number and folder, as vLLM's own request for an adapter has them."""
    return [name, NUMBERS[name], str(folder or LIBRARY / name)]


def invocation(name: str) -> list[int]:
    """An adapter's invocation tokens; the LoRA has none, and is asked the way the first aLoRA is."""
    config = json.loads((LIBRARY / name / "adapter_config.json").read_text())
    return list(config.get("alora_invocation_tokens") or invocation(ALORAS[0]))


def conversations(tokenizer: Any) -> list[list[int]]:
    """The ten as token ids, of growing length, each ending with a question. The fourth quotes an invocation."""
    found = []
    for number, (first, answer, question) in enumerate(_TURNS):
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        turns = turns * (1 + number // 4) + [{"role": "user", "content": question}]
        found.append(list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)))
    quoted = invocation(ALORAS[0])
    found[3] = [*found[3][:20], *quoted, *found[3][20:]]
    return found


def calls(tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """All calls on all conversations, as vLLM's side takes them."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    found: list[dict[str, Any]] = []
    for conversation in conversations(tokenizer):
        params = {"max_tokens": tokens}
        found += [
            {"adapter": adapter(name), "prompt": conversation + invocation(name), "params": params} for name in NUMBERS
        ]
        found.append({"adapter": None, "prompt": conversation + header, "params": params})
    return found
