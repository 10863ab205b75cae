"""A worker that computes nothing: it speaks the protocol, and says what it was told to say.

Its one argument is a JSON object: `seconds` of every run, `first` token of free answers; `dies` at the first run.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

TOLD: dict[str, Any] = json.loads(sys.argv[1])
FACTS = {"version": "fake", "format": "float32", "adapters": "alora"}


def answer(call: dict[str, Any]) -> dict[str, Any]:
    tokens = [call["label"]["parting"][0]] if call["label"] else [TOLD.get("first", 7)] * call["tokens"]
    return {"tokens": tokens, "computed": len(call["prompt"]), "logprobs": [-0.5] * len(tokens)}


def die() -> None:
    print("out of luck", file=sys.stderr)
    sys.exit(3)


def reply(message: dict[str, Any]) -> dict[str, Any]:
    match message["op"]:
        case "load":
            return {"absent": TOLD["absent"]} if "absent" in TOLD else {"ok": FACTS}
        case "run":
            if "dies" in TOLD:
                die()
            # A call costs what its answer is long.
            length = sum(call["tokens"] for call in message["calls"])
            seconds = TOLD["seconds"] if length < 4 else TOLD["seconds"] * length
            return {"ok": {"seconds": seconds, "answers": [answer(call) for call in message["calls"]]}}
        case "absent":
            return {"absent": "no such library"}
        case "boom":
            return {"error": "ValueError: it broke"}
        case "die":
            die()
        case "sleep":
            time.sleep(0.6)
    return {"ok": None}


for line in sys.stdin:
    print(json.dumps(reply(json.loads(line))), flush=True)
