"""A RAG turn as a LangGraph graph over `midstream serve`: what a node asks for reuses the KV of those before.

python examples/langgraph_flow.py "What is the Tern?" "What is its hull made of?" --url http://localhost:8000
"""

import argparse
from pathlib import Path
from typing import Any, TypedDict

import httpx
from langgraph.graph import END, START, StateGraph

from midstream.retrieval import Bm25Retriever, read_documents


class Turn(TypedDict):
    messages: list[dict[str, Any]]  # the last one is the question, then its answer
    rewritten_question: str
    harmful: float
    answerable: float
    grounded: float


def build(server: httpx.Client, retriever: Bm25Retriever) -> Any:
    def ask(path: str, turn: Turn, **more: Any) -> Any:
        reply = server.post(path, json={"messages": turn["messages"], **more}).raise_for_status().json()
        print(f"  {path:26} {reply['usage']['prompt_tokens_details']['cached_tokens']:4} tokens reused")
        return reply.get("probabilities") or reply.get("result") or reply["choices"][0]["message"]

    def retrieve(turn: Turn) -> Any:
        found = [passage.document.model_dump() for passage in retriever.search(turn["rewritten_question"], 2)]
        return {"messages": [*turn["messages"][:-1], {**turn["messages"][-1], "documents": found}]}

    def answer(turn: Turn) -> Any:
        return {"messages": [*turn["messages"], ask("chat/completions", turn, max_tokens=32, temperature=0)]}

    graph = StateGraph(Turn).add_node(retrieve).add_node(answer).add_edge(START, "guard").add_edge("answer", "check")
    graph.add_node("guard", lambda turn: {"harmful": ask("intrinsics/jailbreak", turn)["yes"]})
    graph.add_node("rewrite", lambda turn: ask("intrinsics/query_rewrite", turn))
    graph.add_node("answerable", lambda turn: {"answerable": ask("intrinsics/answerability", turn)["answerable"]})
    graph.add_node("check", lambda turn: {"grounded": ask("intrinsics/hallucination", turn)["grounded"]})
    graph.add_edge("rewrite", "retrieve").add_edge("retrieve", "answerable")
    graph.add_conditional_edges("guard", lambda turn: END if turn["harmful"] > 0.5 else "rewrite")
    graph.add_conditional_edges("answerable", lambda turn: "answer" if turn["answerable"] > 0.3 else END)
    return graph.compile()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A RAG chat as a LangGraph graph.")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", required=True)
    args = parser.parse_args()
    with httpx.Client(base_url=f"{args.url}/v1/", timeout=300) as server:
        flow, history = build(server, Bm25Retriever(read_documents(Path(__file__).parent / "docs_sample"))), []
        for question in args.questions:
            print(f"> {question}")
            turn = flow.invoke({"messages": [*history, {"role": "user", "content": question}]})
            history = turn["messages"] if "grounded" in turn else history  # what was not answered is left out
            print(history[-1]["content"] if "grounded" in turn else "I cannot answer that.")
