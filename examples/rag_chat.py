"""A chat over a folder of Markdown files: what each turn decides, and which tokens it reuses.

python examples/rag_chat.py "What is the Tern?" "What is its hull made of?" "Who was the mayor in 1920?"

`--docs FOLDER` names another folder. Without questions they are read from standard input, one a line.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from midstream import Engine, SamplingParams
from midstream.backend import Backend
from midstream.flows import RagSettings, RagTurn, rag_turn
from midstream.retrieval import Bm25Retriever, Retriever, read_documents
from midstream.transcript import Transcript

SETTINGS = RagSettings(
    passages=2,
    answerable=0.3,  # the small model is rarely sure
    requirement="The answer is one short sentence.",
    params=SamplingParams(max_tokens=32),
)


async def chat(backend: Backend, retriever: Retriever, questions: Iterable[str]) -> None:
    """Every turn goes on from the transcript of the one before, so that all of that is read only once."""
    transcript = Transcript()
    for question in questions:
        turn = await rag_turn(backend, transcript, question, retriever, SETTINGS)
        turn.raise_for_error()
        transcript = turn.transcript
        show(turn)


def show(turn: RagTurn) -> None:
    print(f"> {turn.question}\n{turn.answer}\n  {turn.outcome}, {'trusted' if turn.trusted else 'not trusted'}")
    for decision in turn.decisions:
        print(f"  {decision.step:10} {decision.outcome}: {decision.reason}")
    for call in turn.calls:
        print(f"  {call.step:10} {call.usage.cached_tokens:5} tokens cached {call.usage.computed_tokens:5} computed")
    print(f"  {'the turn':10} {turn.usage.cached_tokens:5} tokens cached {turn.usage.computed_tokens:5} computed\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chat over a folder of Markdown files.")
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent / "docs_sample")
    args = parser.parse_args()
    with Engine.load() as engine:
        engine.load_library()
        questions = args.questions or (line.strip() for line in sys.stdin if line.strip())
        engine.run(chat(engine.aio, Bm25Retriever(read_documents(args.docs)), questions))
