"""What a RAG chat over a real conversation asks, as token ids: the same script for every side of the benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.intrinsics.spec import load_contract
from midstream.models.chat import ChatTokenizer
from midstream.types import AdapterInfo, Chat, Document, Message

REWRITE, GUARD, ANSWERABLE = "query_rewrite", "jailbreak", "answerability"
CHECKS = ("hallucination", "certainty", "requirement_check")
INTRINSICS = (REWRITE, GUARD, ANSWERABLE, *CHECKS)
REQUIREMENT = "Answer in at most three sentences."
# What the rewriter's contract forces: an engine appends it, so no side decodes it.
OPENING = '{"rewritten_question": "'
MAX_PASSAGES = 3


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens that every side decodes, whatever it would have said: of a base answer and of a rewritten question."""

    answer: int = 128
    rewrite: int = 16


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a side. `adapter` None is the base model. With `options` the answer is one of these texts,
    else exactly `tokens` tokens, whatever they are."""

    adapter: str | None
    prompt: tuple[int, ...]
    tokens: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What each step of a turn appends, as token ids.

    `asked` is the bare question, `given` the question with its passages; `header` begins the answer and `closing`
    ends it; `required` is the turn that states the requirement.
    """

    asked: tuple[int, ...]
    given: tuple[int, ...]
    header: tuple[int, ...]
    closing: tuple[int, ...]
    required: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation's turns, and how the intrinsics are called on them: by aLoRA's invocation on every side."""

    id: str
    turns: tuple[Turn, ...]
    invocations: Mapping[str, tuple[int, ...]]
    options: Mapping[str, tuple[str, ...]]
    opening: tuple[int, ...]
    lengths: Lengths

    def label(self, name: str, held: tuple[int, ...]) -> Call:
        return Call(name, (*held, *self.invocations[name]), 1, self.options[name])

    def rewrite(self, held: tuple[int, ...]) -> Call:
        return Call(REWRITE, (*held, *self.invocations[REWRITE], *self.opening), self.lengths.rewrite)

    def answer(self, held: tuple[int, ...], turn: Turn) -> Call:
        return Call(None, (*held, *turn.header), self.lengths.answer)

    def size(self) -> int:
        """Tokens of the longest prompt: the last check's."""
        held = sum(len(t.given) + len(t.header) + self.lengths.answer + len(t.closing) for t in self.turns)
        return held + len(self.turns[-1].required) + max(map(len, self.invocations.values()))


def read_rows(folder: Path, splits: Sequence[str] = ("test",)) -> Iterator[dict[str, Any]]:
    """The test conversations, each turn with its `passages`: its relevant ones, others where it has none.

    `splits`: of which files, "test" and "train", where other conversations will do too.
    """
    corpus = {row["doc_id"]: row for path in sorted(folder.glob("mtrag_corpus_*.jsonl")) for row in _lines(path)}
    for row in (row for split in splits for row in _lines(folder / f"mtrag_conversations.{split}.jsonl")):
        for turn in row["turns"]:
            ids = (turn["relevant_doc_ids"] or turn["other_retrieved_doc_ids"])[:MAX_PASSAGES]
            turn["passages"] = [Document(text=corpus[i]["text"], title=corpus[i]["title"], doc_id=i) for i in ids]
        yield row


def write_script(
    row: Mapping[str, Any], chat: ChatTokenizer, adapters: Mapping[str, AdapterInfo], turns: int, lengths: Lengths
) -> Script:
    """The script of a conversation's first `turns` turns. `adapters` are the six aLoRAs by the intrinsic's name."""
    contracts = {name: load_contract(adapters[name]) for name in INTRINSICS}
    instruction = contracts["requirement_check"].instruction
    if instruction is None:
        raise SystemExit("requirement_check has no instruction, so no requirement can be given to it")
    written: list[Turn] = []
    before: tuple[Message, ...] = ()
    for source in row["turns"][:turns]:
        turn, before = _write_turn(source, chat, before, instruction)
        written.append(turn)
    constraints = {name: contracts[name].constraint() for name in INTRINSICS}
    return Script(
        id=row["id"],
        turns=tuple(written),
        invocations={name: adapters[name].invocation_tokens for name in INTRINSICS},
        options={name: tuple(getattr(constraint, "options", ())) for name, constraint in constraints.items()},
        opening=chat.encode(OPENING),
        lengths=lengths,
    )


def _write_turn(
    source: Mapping[str, Any], chat: ChatTokenizer, before: tuple[Message, ...], instruction: str
) -> tuple[Turn, tuple[Message, ...]]:
    """A turn, and the messages up to its end. Their texts matter no more than where each turn begins and ends."""
    question = Message(role="user", content=source["user"])
    given = (*before, question.model_copy(update={"documents": tuple(source["passages"])}))
    answered = (*given, Message(role="assistant", content=source["answer"]))
    whole = Chat(messages=answered)
    tokens = chat.history(whole)
    end = max(i for i, token in enumerate(tokens) if token in chat.eos_token_ids)
    turn = Turn(
        asked=_added(chat, before, Chat(messages=(*before, question))),
        given=_added(chat, before, Chat(messages=given)),
        header=chat.reply_header(Chat(messages=given)),
        closing=tokens[end:],
        required=_added(chat, answered, whole.instructed(instruction, {"requirement": REQUIREMENT})),
    )
    return turn, answered


def _added(chat: ChatTokenizer, before: Sequence[Message], after: Chat) -> tuple[int, ...]:
    """The tokens that `after` has beyond those of the messages before."""
    tokens = chat.history(after)
    held = chat.history(Chat(messages=tuple(before))) if before else ()
    if tokens[: len(held)] != held:
        raise SystemExit("this model's chat template rewrites earlier turns, so nothing could be reused on any side")
    return tokens[len(held) :]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
