"""What rounding costs: perplexity, and every library adapter's figures, for other number types of the same model.

Sides are DTYPE[/WEIGHTS[/KV]], with - for what is not rounded: `bfloat16/int8` has eight-bit weights, `bfloat16/-/int8`
eight-bit keys and values. All sides get the same rows; figures are compared
with the first side's, paired, by bootstrap over the rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interval, machine, write
from midstream.config import EngineConfig
from midstream.evaluation.metrics import difference, figures, measures
from midstream.evaluation.predict import Prediction, by_adapter, predict
from midstream.evaluation.rows import EvalData, EvalRows, load_rows
from midstream.evaluation.run import task_of
from midstream.jsonl import read_lines
from midstream.session import Engine
from midstream.training.tasks import TASKS
from midstream.types import Request

# By adapter: held-out rows, and the share of rows that are given wrong documents beside their own.
ROWS = {
    "answerability": ("answerability/squad2.test.jsonl", 0.5),
    "certainty": ("certainty/{}.test.jsonl", 0.0),
    "hallucination": ("groundedness/begin.test.jsonl", 0.0),
    "jailbreak": ("jailbreak/mixed.test.jsonl", 0.0),
    "query_rewrite": ("rewrite/canard.test.jsonl", 0.0),
    "requirement_check": ("requirement/ifeval.test.jsonl", 0.0),
}
_PASSAGES = "rag/mtrag_corpus_*.jsonl"
_PASSAGE_TOKENS = 512
_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Side:
    """One way to hold the model's numbers."""

    dtype: str
    weights: str | None = None
    kv: str | None = None

    @classmethod
    def of(cls, text: str) -> Side:
        dtype, *others = text.split("/")
        return cls(dtype, *(None if each == "-" else each for each in others))

    def __str__(self) -> str:
        parts = [self.dtype, self.weights or "-", self.kv or "-"]
        while parts[-1] == "-":
            parts.pop()
        return "/".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sides", default="bfloat16,bfloat16/int8")
    parser.add_argument("--rows", type=int, default=200, help="of each adapter, at most")
    parser.add_argument("--passages", type=int, default=64, help="to take the perplexity of")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sides = [Side.of(text) for text in arguments.sides.split(",")]
    texts = passages(arguments.data, arguments.passages)
    rows: dict[str, EvalRows] = {}
    lost: dict[Side, list[list[float]]] = {}
    answers: dict[Side, dict[str, list[Prediction]]] = {}
    for side in sides:
        config = EngineConfig.model_validate({"kv_dtype": side.kv})
        with Engine.load(config=config, dtype=side.dtype, weights=side.weights, wait_for_kernels=True) as engine:
            engine.load_library()
            rows = rows or rows_of(engine, arguments)
            lost[side] = [surprise(engine, text) for text in texts]
            answers[side] = {name: asked(engine, name, found) for name, found in rows.items()}
            print(side, f"perplexity {_perplexity(lost[side]):.4f}", flush=True)
    first = sides[0]
    report = {
        "machine": machine(),
        "perplexity": {str(side): perplexity(lost[side], lost[first]) for side in sides},
        "adapters": {name: compared(name, found, sides, answers) for name, found in rows.items()},
    }
    write(arguments.json, report)


def passages(data: Path, count: int) -> list[str]:
    """The first passages of every corpus, as many of each."""
    files = sorted(data.glob(_PASSAGES))
    each = -(-count // len(files))
    return [text for file in files for text in read_lines([file], lambda row: str(row["text"]))[:each]][:count]


def surprise(engine: Engine, text: str) -> list[float]:
    """Nats of each token but the first."""
    tokens = engine.aio.chat.encode(text)[:_PASSAGE_TOKENS]
    score = engine.portal.run(engine.aio.score(Request(prompt=tuple(tokens[:1])), [tokens[1:]]))
    return [-logprob for logprob in score.logprobs[0]]


def perplexity(lost: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> dict[str, Any]:
    """With the mean difference in nats a token from the first side's, over passages."""
    differences = np.array([np.mean(a) - np.mean(b) for a, b in zip(lost, first, strict=True)])
    return {"value": _perplexity(lost), "tokens": sum(map(len, lost)), "nats_more": interval(differences)}


def _perplexity(lost: Sequence[Sequence[float]]) -> float:
    return math.exp(sum(map(sum, lost)) / sum(map(len, lost)))


def rows_of(engine: Engine, arguments: argparse.Namespace) -> dict[str, EvalRows]:
    known = {info.name: info for info in engine.adapters()}
    found: dict[str, EvalRows] = {}
    for name, (pattern, wrong) in ROWS.items():
        folder, _, file = pattern.rpartition("/")
        files = tuple(sorted((arguments.data / folder).glob(file.replace("{}", "*"))))
        asked_for = EvalData(files, max_rows=arguments.rows, wrong_documents=wrong)
        found[name] = engine.portal.run(load_rows(engine.aio, task_of(known[name]), asked_for))
    return found


def asked(engine: Engine, name: str, found: EvalRows) -> list[Prediction]:
    info = next(info for info in engine.adapters() if info.name == name)
    predictor = by_adapter(engine.aio, task_of(info), info)
    answers: list[Prediction] = []
    for start in range(0, len(found.rows), _TOGETHER):
        piece = found.rows[start : start + _TOGETHER]
        answers += engine.portal.run(predict(predictor, piece, lambda: None))
    return answers


def compared(
    name: str, found: EvalRows, sides: Sequence[Side], answers: Mapping[Side, Mapping[str, Sequence[Prediction]]]
) -> dict[str, Any]:
    """Each side's figures, and what they are more than the first side's."""
    made = {side: figures(measures(answers[side][name], found.rows, TASKS[name]), len(found.rows)) for side in sides}
    base, base_samples = made[sides[0]]
    return {
        "rows": len(found.rows),
        "sides": {str(side): {key: each.as_dict() for key, each in made[side][0].items()} for side in sides},
        "more": {
            str(side): {
                key: each.as_dict()
                for key, each in difference(made[side][0], base, made[side][1], base_samples).items()
            }
            for side in sides[1:]
        },
        "other_answers": {
            str(side): sum(
                one.answer != other.answer
                for one, other in zip(answers[side][name], answers[sides[0]][name], strict=True)
            )
            for side in sides[1:]
        },
    }


if __name__ == "__main__":
    main()
