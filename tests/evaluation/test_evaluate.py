"""Evaluation on a tiny model: every arm on every row, groups, shortcuts, retrieval, and the report's forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from midstream.cli.eval import _arms
from midstream.errors import DataError, InputError
from midstream.evaluation.answers import answer_rows, certainty_row, certainty_rows, is_right, read_question
from midstream.evaluation.baselines import shortcuts, word_overlap
from midstream.evaluation.catalogue import headline, read_entry
from midstream.evaluation.catalogue import markdown as catalogue
from midstream.evaluation.report import markdown, update_card, write_picture
from midstream.evaluation.rows import EvalData, load_rows
from midstream.evaluation.run import evaluate, task_of
from midstream.session import Engine
from midstream.training.card import FIGURES_END, FIGURES_START
from midstream.training.run import Budget, DataConfig, run_training
from midstream.training.tasks import TASKS, read_rows
from midstream.training.trainer import TrainConfig
from tests.helpers import tiny_llama
from tests.tiny import save_tiny_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    tiny_llama().save_pretrained(root / "tiny")
    save_tiny_tokenizer(root / "tiny")
    rows = [
        {"text": f"{'bad' if i % 2 else 'good'} {i}", "label": i % 2, "source": "ab"[i % 3 == 0]} for i in range(48)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[Engine]:
    run_training(
        str(home / "tiny"),
        DataConfig((home / "rows.jsonl",), "jailbreak"),
        TrainConfig(rank=8, epochs=6, learning_rate=1e-2, batch_size=6),
        home / "mine",
        home / "run",
        budget=Budget(disk_bytes=0),
    )
    with Engine.load(str(home / "tiny"), dtype="float32") as engine:
        engine.load_adapter(home / "mine")
        yield engine


def run(engine: Engine, name: str, data: EvalData, **adapters: Any) -> Any:
    task = TASKS[name]
    rows = engine.portal.run(load_rows(engine.aio, task, data))
    return engine.portal.run(evaluate(engine.aio, task, rows, adapters))


def test_a_trained_adapter_beats_the_base_model_and_the_report_says_so(
    engine: Engine, home: Path, tmp_path: Path
) -> None:
    (info,) = engine.adapters()
    found = run(engine, "jailbreak", EvalData((home / "rows.jsonl",)), alora=info)
    report = found.as_dict()
    assert report["n"] == 48
    assert set(report["arms"]) == {"base", "base_constrained", "alora", "tfidf"}
    for arm in ("base_constrained", "alora"):
        assert set(report["arms"][arm]) == {"accuracy", "balanced_accuracy", "f1", "auroc", "ece"}
        for figure in report["arms"][arm].values():
            assert set(figure) == {"value", "low", "high"}
    assert report["arms"]["alora"]["accuracy"]["value"] > 0.95
    assert report["differences"]["alora - base_constrained"]["accuracy"]["low"] > 0.1
    assert {name: group["n"] for name, group in report["groups"].items()} == {"a": 32, "b": 16}
    assert report["adapters"]["alora"]["digest"] == info.digest
    write_picture(tmp_path / "curves.png", found)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = markdown(report, "midstream eval jailbreak")
    assert "| alora | " in text
    assert "Paired differences" in text
    assert "- Against `base_constrained`: better in accuracy, balanced_accuracy, f1, auroc, ece." in text


def test_a_card_takes_figures_and_replaces_those_of_the_same_title(engine: Engine, home: Path) -> None:
    (info,) = engine.adapters()
    found = run(engine, "jailbreak", EvalData((home / "rows.jsonl",), max_rows=12), alora=info)
    folder, card = home / "mine", home / "mine" / "README.md"
    for title, command in (("On b", "first"), ("On a", "other"), ("On b", "second")):
        update_card(folder, title, found, command)
    inside = card.read_text().split(FIGURES_START)[1].split(FIGURES_END)[0]
    assert [line for line in inside.split("\n") if line.startswith("### ")] == ["### On b", "### On a"]
    assert "second" in inside
    assert "first" not in inside
    with pytest.raises(InputError, match="no place for figures"):
        update_card(home, "On a", found, "x")
    entry = read_entry(folder)
    assert (entry.task, entry.kind, entry.rank) == ("jailbreak", "alora", 8)
    assert list(entry.figures) == ["On b", "On a"]
    assert "auroc" in headline(entry)
    shown = catalogue([entry])
    assert f"[mine]({home.name}/mine/README.md)" in shown
    assert "| mine | On a | 12 | accuracy |" in shown


def test_an_adapter_of_the_same_name_is_compared_and_not_measured_twice(
    engine: Engine, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "mine", tmp_path / "other" / "mine")
    with pytest.raises(InputError, match="rename the folder"):
        _arms(engine, "mine", [tmp_path / "tfidf"])
    (tmp_path / "other" / "mine").rename(tmp_path / "other" / "second")
    arms = _arms(engine, "mine", [tmp_path / "other" / "second"])
    assert {arm: info.name for arm, info in arms.items()} == {"alora": "mine", "second": "compared second"}
    engine.unload_adapter("compared second")


def test_a_task_of_ones_own_is_told_by_the_adapters_contract(engine: Engine, home: Path, tmp_path: Path) -> None:
    (info,) = engine.adapters()
    assert task_of(info) is TASKS["jailbreak"]
    own = replace(info, name="mine", metadata={**info.metadata, "task": "my_task"})
    task = task_of(own)
    assert (task.kind, task.labels) == ("label", ("yes", "no"))
    rows = [{"messages": [{"role": "user", "content": f"good {i}"}], "target": "no"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = engine.portal.run(load_rows(engine.aio, task, EvalData((tmp_path / "rows.jsonl",))))
    found = engine.portal.run(evaluate(engine.aio, task, data, {"alora": info}))
    assert found.arms["alora"]["accuracy"].value == 1.0
    with pytest.raises(InputError, match="another schema"):
        task_of(replace(info, metadata={**info.metadata, "task": "certainty"}))


def test_bad_rows_are_refused_before_anything_is_asked(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y"}\n{"label": 0}')
    with pytest.raises(DataError, match=r"line 2: .*line 3: "):
        run(engine, "jailbreak", EvalData((tmp_path / "bad.jsonl",)))
    with pytest.raises(InputError, match="retrieval queries"):
        run(engine, "jailbreak", EvalData((tmp_path / "bad.jsonl",), corpus=(tmp_path / "bad.jsonl",)))


def test_questions_become_rows_with_the_base_models_own_answers(engine: Engine, tmp_path: Path) -> None:
    choice = {"id": "c", "source": "s", "passage": "p", "question": "is it?", "choices": ["no", "yes"], "gold": 1}
    free = {"id": "f", "source": "s", "question": "who?", "answers": ["the Queen"]}
    rows = [{**choice, "id": f"c{i}", "gold": i % 2} for i in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run(engine, "certainty", EvalData((tmp_path / "questions.jsonl",)))
    assert {"accuracy", "auroc", "ece"} <= set(found.arms["base_constrained"])
    questions = [read_question(choice), read_question(free)]
    drawn = engine.portal.run(certainty_rows(engine.aio, questions, count=6, seed=1))
    again = engine.portal.run(certainty_rows(engine.aio, questions[::-1], count=6, seed=1))[::-1]
    assert [row["answers"] for row in drawn] == [row["answers"] for row in again]
    assert set(drawn[0]["answers"]) <= {"no", "yes"}
    assert drawn[0]["share"] == drawn[0]["answers"].count("yes") / 6
    assert drawn[0]["messages"][-1]["content"] == drawn[0]["answers"][0]
    assert is_right("It was Queen!", ["the Queen"])
    assert not is_right("Queens", ["the Queen"])
    assert certainty_row(questions[1], ["queen", "king"])["share"] == 0.5
    # Options are compared as they are: a sign or a capital may be all that tells them apart.
    signs = read_question({"id": "x", "question": "q", "choices": ["+1", "-1", "A"], "gold": 0})
    assert certainty_row(signs, ["-1", "+1", "A", "+1"])["share"] == 0.5
    each = answer_rows(signs, ["-1", "+1", "A", "+1"], 3)
    assert [(row["id"], row["share"], row["correct"]) for row in each] == [
        (f"{signs.id}#{n}", float(right), right) for n, right in enumerate((False, True, False))
    ]
    assert [row["messages"][-1]["content"] for row in each] == ["-1", "+1", "A"]
    for wrong in ({**choice, "gold": 2}, {**choice, "gold": -1}, {**free, "answers": "Queen"}, {**free, "answers": []}):
        with pytest.raises(ValueError, match=r"gold|answers"):
            read_question(wrong)


def test_retrieval_queries_are_read_with_their_conversations(engine: Engine, tmp_path: Path) -> None:
    passages = [{"doc_id": f"d{i}", "title": "", "text": f"passage about topic{i}"} for i in range(12)]
    turns = [{"user": "tell me of topic3", "answer": "It is a topic."}, {"user": "more?", "answer": "-"}]
    query = {"conversation": "k", "turn": 2, "last_turn": "more?", "silver_rewrite": "more of topic3?"}
    for name, rows in {
        "m_corpus_a.jsonl": passages,
        "m_conversations.jsonl": [{"id": "k", "turns": turns}],
        "queries.jsonl": [{**query, "relevant_doc_ids": ["d3"]}] * 4,
    }.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    found = run(engine, "query_rewrite", EvalData((tmp_path / "queries.jsonl",)))
    assert [message.content for message in found.rows[0].chat.messages] == [
        "tell me of topic3",
        "It is a topic.",
        "more?",
    ]
    assert found.arms["reference"]["recall_at_5"].value == 1.0
    assert found.arms["last_turn"]["recall_at_5"].value == 0.0
    assert found.arms["reference"]["exact_match"].value == 1.0
    write_picture(tmp_path / "bars.png", found)
    (tmp_path / "m_conversations.jsonl").unlink()
    with pytest.raises(InputError, match="files of conversations"):
        run(engine, "query_rewrite", EvalData((tmp_path / "queries.jsonl",)))


def test_shortcuts_are_fitted_on_other_rows(tmp_path: Path) -> None:
    task = TASKS["hallucination"]
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}],
            "documents": [{"text": f"red green blue n{i}"}],
            "response": f"red green n{i}" if i % 2 else f"one two three{i}",
            "label": "grounded" if i % 2 else "ungrounded",
        }
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read, _ = read_rows([tmp_path / "rows.jsonl"], task)
    assert word_overlap(read[1]) == 1.0
    assert word_overlap(read[0]) == 0.0
    for train in ((), read):
        found = shortcuts(read, task, train)
        assert set(found) == {"tfidf", "word_overlap"}
        assert all(p.answer == row.target for p, row in zip(found["word_overlap"], read, strict=True))
    assert shortcuts(read[:6], task) == {}
