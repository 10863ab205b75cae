"""Best of n: several answers, each scored by intrinsics on its own KV, and a picture of quality against tokens.

python examples/best_of_n.py "How high is the lighthouse?" --n 6 --plot best_of_n.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from midstream import Chat, Engine, Message, SamplingParams
from midstream.backend import Backend
from midstream.flows import BestOfN, BestOfNSettings, Run, best_of_n
from midstream.retrieval import Bm25Retriever, read_documents


async def draw(backend: Backend, question: str, docs: Path, n: int, seed: int) -> BestOfN:
    """The weights say what counts as quality; `max_tokens` bounds the whole run."""
    found = await Bm25Retriever(read_documents(docs)).retrieve(question, 2)
    turn = Message(role="user", content=question, documents=tuple(passage.document for passage in found))
    settings = BestOfNSettings(
        n=n,
        at_once=2,
        params=SamplingParams(max_tokens=24, temperature=1.0),
        weights={"hallucination": 2.0, "certainty": 1.0},
    )
    return await best_of_n(backend, Chat(messages=(turn,)), settings, run=Run(seed=seed, max_tokens=4000))


def plot(result: BestOfN, file: Path) -> None:
    points = [point for point in result.curve() if point.score is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.step([point.tokens for point in points], [point.score for point in points], where="post", marker="o")
    axes.set(xlabel="tokens computed", ylabel="score of the best answer so far", title=f"best of {points[-1].n}")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw several answers and take the best.")
    parser.add_argument("question")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent / "docs_sample")
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=Path("best_of_n.png"))
    args = parser.parse_args()
    with Engine.load() as engine:
        engine.load_library()
        result = engine.run(draw(engine.aio, args.question, args.docs, args.n, args.seed))
    result.raise_for_error()
    for candidate in result.candidates:
        mark = "*" if candidate == result.best else " "
        print(f"{mark} {candidate.score:.3f} {candidate.tokens_spent:4} tokens  {candidate.text!r}")
    plot(result, args.plot)
    print(f"{args.plot}: {result.tokens_spent} tokens computed, {result.usage.cached_tokens} reused")
