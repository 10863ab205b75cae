"""Rows of data as they lie in files: read by the tasks, reported when bad, and made into token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.adapters.activation import find_last
from midstream.engine.constraints import ConstraintCompiler
from midstream.errors import DataError, InvocationError
from midstream.intrinsics.spec import Contract
from midstream.training.augment import read_histories, with_wrong_documents, within_histories
from midstream.training.data import encode, propose_invocation, sample
from midstream.training.plain import plain_task
from midstream.training.run import DataConfig, load_examples
from midstream.training.tasks import TASKS, bin_of, read_rows
from midstream.types import Message
from tests.tiny import VOCAB, tiny_chat

TURNS = [{"role": "user", "content": "who?"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "me"}]
GOOD: dict[str, tuple[dict[str, Any], Any]] = {
    "answerability": ({"messages": TURNS, "documents": [{"text": "d"}], "label": "answerable"}, "answerable"),
    "certainty": ({"messages": ANSWERED, "share": 0.37, "correct": True}, 3),
    "hallucination": (
        {"messages": TURNS, "documents": [{"text": "d"}], "response": "r", "label": "grounded"},
        "grounded",
    ),
    "jailbreak": ({"text": "hi \u2028 there", "label": 1}, "yes"),
    "query_rewrite": ({"messages": TURNS, "rewrite": "who is it?"}, {"rewritten_question": "who is it?"}),
    "requirement_check": ({"prompt": "p", "response": "r", "requirement": "short", "label": "not_met"}, "not_met"),
}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows))
    return file


def asking(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "target": "t"}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_task_reads_its_rows_and_reports_every_bad_one(name: str, tmp_path: Path) -> None:
    good, target = GOOD[name]
    (row,), left_out = read_rows([write(tmp_path / "good.jsonl", [good])], TASKS[name])
    assert row.target == target
    assert left_out == 0
    wrong_types = {**good, "messages": 3, "text": 3, "prompt": 3}
    with pytest.raises(DataError) as caught:
        read_rows([write(tmp_path / "bad.jsonl", ["{", "[1]", {}, wrong_types, good])], TASKS[name])
    assert len(caught.value.problems) == 4
    for line in (1, 2, 3, 4):
        assert f"bad.jsonl line {line}:" in str(caught.value)


def test_rows_of_another_question_are_counted_and_not_dropped_in_silence(tmp_path: Path) -> None:
    good, _ = GOOD["answerability"]
    file = write(tmp_path / "rows.jsonl", [good, {**good, "label": "partial"}, {**good, "label": "conversational"}])
    rows, left_out = read_rows([file], TASKS["answerability"])
    assert (len(rows), left_out) == (1, 2)
    with pytest.raises(DataError, match="label 'mostly' is none of"):
        read_rows([write(file, [{**good, "label": "mostly"}])], TASKS["answerability"])


def test_rows_that_cannot_be_rendered_are_all_named_when_an_invocation_is_proposed(tmp_path: Path) -> None:
    good, bad = ({"messages": TURNS, "arguments": a, "target": "t"} for a in ({"tone": "dry"}, {}))
    file = write(tmp_path / "rows.jsonl", [bad, good, bad])
    with pytest.raises(DataError, match=r"line 1: .*needs argument.*line 3: .*needs argument"):
        load_examples(DataConfig((file,), "mine", instruction="Is it {tone}?"), tiny_chat())


def test_bins_mean_chances() -> None:
    assert [bin_of(share) for share in (0.0, 0.09, 0.1, 0.55, 0.99, 1.0)] == [0, 0, 1, 5, 9, 9]


def test_an_instruction_comes_after_the_conversation_and_takes_no_documents(tmp_path: Path) -> None:
    row = {"messages": TURNS, "documents": [{"text": "the passage"}], "arguments": {"tone": "dry"}, "target": "yes"}
    file = write(tmp_path / "rows.jsonl", [row, row])
    task = plain_task("tone", [file], instruction="Is it {tone}?")
    assert (task.kind, task.labels) == ("label", ("yes",))
    rows, _ = read_rows([file], task)
    (example, _) = encode(rows, task, tiny_chat(), "<t>")
    text = tiny_chat().decode(example.prefix)
    assert text.index("the passage") < text.index("who?") < text.index("Is it dry?")
    for wrong, argument in (("{mood}", "'mood'"), ("{tone.x}", "x")):
        with pytest.raises(DataError, match=rf"line 1: .*needs argument .*{argument}.*line 2: "):
            encode(rows, plain_task("tone", [file], instruction=wrong), tiny_chat(), "<t>")


def test_an_invocation_is_proposed_short_and_absent_from_the_data(tmp_path: Path) -> None:
    file, task = tmp_path / "rows.jsonl", plain_task("my task", [write(tmp_path / "rows.jsonl", [asking("x")] * 2)])

    def proposed(text: str) -> str:
        rows, _ = read_rows([write(file, [asking(text)] * 2)], task)
        return propose_invocation(rows, task, tiny_chat())

    assert proposed("who?") == "<|im_start|>my_task\n"
    assert proposed("why <|im_start|>my_task\n") == "<my_task>"
    with pytest.raises(InvocationError, match="Choose one yourself"):
        proposed("<my_task> [my_task] <|im_start|>my_task\n")


def test_invocations_are_checked_in_every_row(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}], "target": "t"} for text in ("a", "<x> b", "c <x>")]
    file = write(tmp_path / "rows.jsonl", rows)
    task = plain_task("x", [file])
    read, _ = read_rows([file], task)
    with pytest.raises(DataError, match=r"line 2: .*already contains.*line 3: .*already contains"):
        encode(read, task, tiny_chat(), "<x>")
    for example in encode(read, task, tiny_chat(), "<y>"):
        assert find_last(example.prefix + example.invocation, example.invocation) == len(example.prefix)


def test_samples_are_balanced_and_wrong_documents_are_others(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{i}"}],
            "documents": [{"doc_id": "d", "title": f"t{i}", "text": f"text {i}"}],
            "label": "answerable" if i % 4 else "unanswerable",
        }
        for i in range(40)
    ]
    task = TASKS["answerability"]
    read, _ = read_rows([write(tmp_path / "rows.jsonl", rows)], task)
    more = with_wrong_documents(read, 0.5, task.labels, seed=1)
    wrong = [row for row in more if row.group == "wrong documents"]
    assert len(wrong) == 15
    for row in wrong:
        assert row.target == "unanswerable"
        assert row.chat.documents[0].text.split()[1] != row.chat.messages[0].content[1:]
    picked = sample(encode(more, task, tiny_chat(), "<z>"), 20, None, 0)
    assert sum(e.label == '"answerable"' for e in picked) == 10


def test_a_sample_takes_what_a_rare_label_lacks_from_the_others(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": int(i < 3)} for i in range(30)]
    task = TASKS["jailbreak"]
    read, _ = read_rows([write(tmp_path / "rows.jsonl", rows)], task)
    picked = sample(encode(read, task, tiny_chat(), "<z>"), 20, None, 0)
    assert len(picked) == 20
    assert sum(e.label == '"yes"' for e in picked) == 3


def test_histories_put_turns_deep_into_conversations_over_passages(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(20)])
    earlier = {
        "messages": [{"role": "user", "content": "when?"}],
        "documents": [{"doc_id": "d", "title": "T", "text": "in 1752"}],
        "answers": ["1752"],
    }
    rows, _ = read_rows([file], TASKS["jailbreak"])
    histories = read_histories([write(tmp_path / "earlier.jsonl", [earlier])])
    assert [message.content for message in histories[0].chat.messages] == ["when?", "1752"]
    mixed = within_histories(rows, histories, 0.5, "no", seed=0)
    placed = [row for row in mixed[:20] if len(row.chat.messages) == 3]
    assert len(placed) == 10
    assert all(row.chat.messages[0].documents and row.chat.messages[2].content.startswith("t") for row in placed)
    questions = mixed[20:]
    assert len(questions) == 10
    assert {row.target for row in questions} == {"no"}
    assert {len(row.chat.messages) for row in questions} == {1, 3}
    assert all(row.chat.messages[-1].content == "when?" for row in questions)
    assert all(isinstance(message, Message) for row in mixed for message in row.chat.messages)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_constraint_that_decodes_an_answer_allows_what_was_trained(name: str, tmp_path: Path) -> None:
    task, chat = TASKS[name], tiny_chat()
    good, _ = GOOD[name]
    rows, _ = read_rows([write(tmp_path / "good.jsonl", [good])], task)
    contract = Contract(response_format=json.dumps(task.schema))
    compiler = ConstraintCompiler(chat.tokenizer, chat.encode, sorted(chat.eos_token_ids), VOCAB)
    constraint = contract.constraint()
    assert constraint is not None
    matcher = compiler.compile(constraint, 96)()
    written: list[int] = []
    target = list(encode(rows, task, chat, "<t>")[0].target)
    while not matcher.finished:
        if forced := matcher.forced():
            written += forced
        elif not matcher.finished:
            matcher.restrict(torch.zeros(VOCAB))
            # Raises where the grammar forbids the token.
            matcher.accept(target[len(written)])
            written.append(target[len(written)])
    assert written == target
