"""What flows gain and cost on held-out data: selection among answers, the answerability gate, and the whole RAG turn.

- `right`: eight answers to each question of ARC, BoolQ and NQ-open, scored; is the selected one right more often?
- `grounded`: eight answers to each MTRAG turn from its passages; is more of the selected one in the passages?
- `gate`: is each held-out MTRAG turn, answerable or not, let through by answerability on what is retrieved for it?
- `turns`: MTRAG turns played by the RAG flow with and without rewriting. Every check's score is kept, so that turns
  with and without each intrinsic can be told apart.
- `time`: a few of these turns with each intrinsic left out, and best-of-n beside one answer, interleaved.

Rows are drawn once and kept in --raw, so a run that was stopped goes on; --json is made of what is there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from benchmarks.flows_data import Turn, corpora, questions, turns
from benchmarks.flows_draw import Raw, draw_gate, draw_grounded, draw_right, draw_unscored, play_turn
from benchmarks.flows_report import plots, summary
from midstream.flows.rag import RagSettings
from midstream.retrieval import Bm25Retriever
from midstream.session import Engine
from midstream.types import SamplingParams

PARTS = ("right", "grounded", "gate", "turns", "time")
# Nothing is refused, gated or withheld: the scores are kept, and what each threshold would do is told from them.
_OPEN = RagSettings(guard=1.0, answerable=0.0, grounded=0.0, certain=0.0, params=SamplingParams(max_tokens=64))
_WITHOUT: Mapping[str, dict[str, Any]] = {
    "all": {},
    "no guard": {"guard": None},
    "no rewrite": {"rewrite": False},
    "no answerability": {"answerable": None},
    "no hallucination": {"grounded": None},
    "no certainty": {"certain": None},
    "base alone": {"guard": None, "rewrite": False, "answerable": None, "grounded": None, "certain": None},
}


def main() -> None:
    arguments = _parser().parse_args()
    raw = Raw(arguments.raw)
    if arguments.minutes > 0:
        with Engine.load(dtype=arguments.dtype, wait_for_kernels=True) as engine:
            engine.load_library()
            _run(engine, raw, arguments)
    report = summary(raw)
    if arguments.plots is not None:
        plots(report, arguments.plots)
    write(arguments.json, {"machine": machine(), **report})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--turns", type=int, default=100, help="for `grounded`; `turns` takes 30 and all unanswerable")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long; 0: only report")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--raw", type=Path, default=Path("benchmarks/results/flows_raw.jsonl"))
    parser.add_argument("--plots", type=Path, help="folder for PNG files")
    parser.add_argument("--json", type=Path)
    return parser


def _run(engine: Engine, raw: Raw, arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    parts = arguments.parts.split(",")
    n = arguments.n
    if "right" in parts:
        asked = questions(arguments.data, arguments.questions)
        random.Random(1).shuffle(asked)
        raw.fill("right", [(q.id, lambda q=q: draw_right(engine, q, n)) for q in asked], deadline)
    found = turns(arguments.data, passages=3, max_words=900)
    if "grounded" in parts:
        answerable = [turn for turn in found if turn.answerable][: arguments.turns]
        raw.fill("grounded", [(t.id, lambda t=t: draw_grounded(engine, t, n)) for t in answerable], deadline)
    retrievers = {name: Bm25Retriever(documents) for name, documents in corpora(arguments.data).items()}
    chosen = [turn for turn in found if not turn.answerable] + [turn for turn in found if turn.answerable][:30]
    if "gate" in parts:
        raw.fill("gate", [(t.id, lambda t=t: draw_gate(engine, t, retrievers[t.domain])) for t in found], deadline)
    if "turns" in parts:
        for part, more in (("turns", {}), ("turns, no rewrite", {"rewrite": False})):
            settings = _OPEN.model_copy(update=more)
            work = [(t.id, lambda t=t, s=settings: play_turn(engine, t, retrievers[t.domain], s)) for t in chosen]
            raw.fill(part, work, deadline)
    if "time" in parts:
        raw.fill(
            "time",
            [("all", lambda: _timed(engine, [t for t in chosen if t.answerable][: arguments.rounds], retrievers, n))],
            deadline,
        )


def _timed(engine: Engine, some: Sequence[Turn], retrievers: Mapping[str, Bm25Retriever], n: int) -> dict[str, Any]:
    """Seconds and tokens of each way to answer the same turns, each from an empty cache, in turn."""
    started = time.perf_counter()
    figures: dict[str, list[tuple[float, int]]] = {}
    for turn in some:
        for name, left_out in _WITHOUT.items():
            engine.clear_cache()
            settings = _OPEN.model_copy(update=left_out)
            played = play_turn(engine, turn, retrievers[turn.domain], settings)
            figures.setdefault(name, []).append((played["seconds"], played["tokens"]))
        for count in (1, n):
            engine.clear_cache()
            drawn = draw_grounded(engine, turn, count)
            figures.setdefault(f"best of {count}", []).append((drawn["seconds"], drawn["tokens"]))
        engine.clear_cache()
        figures.setdefault(f"{n} answers, not scored", []).append(draw_unscored(engine, turn, n))
    rows = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in each),
            "tokens": statistics.median(tokens for _, tokens in each),
            "raw_s": [seconds for seconds, _ in each],
        }
        for name, each in figures.items()
    }
    return {"seconds": time.perf_counter() - started, "rows": rows}


if __name__ == "__main__":
    main()
