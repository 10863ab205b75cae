"""An agent with two tools, a calculator and a search, whose run is saved as a trace and replayed without a model.

python examples/agent.py "What is 12 * 34?" --trace agent.json
"""

import argparse
import asyncio
from pathlib import Path

from midstream import Chat, Engine, Message
from midstream.backend import Backend
from midstream.flows import AgentRun, AgentSettings, Recorder, ReplayBackend, Run, Trace, agent, calculator, search
from midstream.retrieval import Bm25Retriever, read_documents

SETTINGS = AgentSettings(max_steps=4, think_tokens=16, act_tokens=64, string_chars=60, observation_chars=300)
SHOWN = (  # A small model has to be shown how tools are used: user and assistant turns by turns.
    "What is 4 * 5?",
    'I use the calculator.\n{"tool":"calculator","arguments":{"expression":"4 * 5"}}',
    "Observation: 20",
    'Now I know it.\n{"answer":"20"}',
    "Where is the tower?",
    'I search for it.\n{"tool":"search","arguments":{"query":"tower"}}',
    'Observation: [{"title":"Tower","text":"The tower is on the hill."}]',
    'Now I know it.\n{"answer":"The tower is on the hill."}',
)
DOCS = Path(__file__).parent / "docs_sample"
TOOLS = (calculator, search(Bm25Retriever(read_documents(DOCS)), passages=1))


async def ask(backend: Backend, question: str, seed: int) -> AgentRun:
    roles = ("user", "assistant")
    turns = [Message(role=roles[i % 2], content=text) for i, text in enumerate((*SHOWN, question))]
    return await agent(backend, Chat(messages=tuple(turns)), TOOLS, SETTINGS, run=Run(seed=seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Answer a question with tools.")
    parser.add_argument("question")
    parser.add_argument("--trace", type=Path, default=Path("agent.json"))
    args = parser.parse_args()
    with Engine.load() as engine:
        recorder = Recorder(engine.aio)
        result = engine.run(ask(recorder, args.question, seed=1))
    recorder.trace(result, SETTINGS).save(args.trace)
    for step in result.steps:
        print(f"{step.number}. {step.thought}\n   {step.text}\n   {step.observation or ''}")
    print(f"answer: {result.answer}\n{result.usage.cached_tokens} tokens reused, {result.tokens_spent} computed")

    # The model is gone: the trace has all that it said, and all that the tools gave.
    trace = Trace.load(args.trace)
    replayed = asyncio.run(ask(ReplayBackend(trace), args.question, trace.seed))
    same = (replayed.answer, replayed.decisions) == (result.answer, result.decisions)
    print(f"{args.trace}: {len(trace.entries)} entries, replayed {'the same' if same else 'with another end'}")
    raise SystemExit(0 if same else 1)
