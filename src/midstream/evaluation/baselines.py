"""Shortcuts: what a task's data gives away without any understanding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline

from midstream.evaluation.predict import Prediction
from midstream.training.tasks import Row, Task

_FOLDS = 5


def shortcuts(rows: Sequence[Row], task: Task, train: Sequence[Row] = ()) -> dict[str, list[Prediction]]:
    """Predictions of each shortcut by its name.

    Labels and scales: word overlap with the documents, where there are any, and TF-IDF of the judged text, each with
    a logistic regression fitted on `train`, else on the other four fifths of the rows themselves. Texts: the last
    turn as it stands.
    """
    if task.kind == "text":
        key = task.key
        texts = [row.chat.messages[-1].content for row in rows]
        return {"last_turn": [Prediction({key: text} if key else text) for text in texts]}
    found = {
        "tfidf": _fitted(make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)), _text, rows, task, train)
    }
    if any(row.chat.documents for row in rows):
        found["word_overlap"] = _fitted(LogisticRegression(), lambda row: [word_overlap(row)], rows, task, train)
    return {name: predictions for name, predictions in found.items() if predictions is not None}


def word_overlap(row: Row) -> float:
    """Share of the judged text's words that occur in the documents."""
    words = _words(row.chat.messages[-1].content)
    known = set(_words(" ".join(document.text for document in row.chat.documents)))
    return sum(word in known for word in words) / max(1, len(words))


def _fitted(model: Any, feature: Any, rows: Sequence[Row], task: Task, train: Sequence[Row]) -> list[Prediction] | None:
    """Predictions of a model fitted on other rows; None where there are too few of a label, or no words, to fit."""
    classes = _classes(task)
    truth = np.array([classes.index(_class(row, task)) for row in rows])
    features = [feature(row) for row in rows]
    known = np.array([classes.index(_class(row, task)) for row in train]) if train else truth
    _, counts = np.unique(known, return_counts=True)
    if len(counts) < 2 or (not train and counts.min() < _FOLDS):
        return None
    try:
        if train:
            model.fit([feature(row) for row in train], known)
            shares = model.predict_proba(features)
        else:
            shares = cross_val_predict(model, features, truth, cv=_FOLDS, method="predict_proba")
    except ValueError as error:
        if "empty vocabulary" in str(error):
            return None
        raise
    full = np.zeros((len(rows), len(classes)))
    full[:, np.unique(known)] = shares
    return [_prediction(tuple(map(float, share)), task) for share in full]


def _classes(task: Task) -> list[Any]:
    return [False, True] if task.kind == "scale" else list(task.labels)


def _class(row: Row, task: Task) -> Any:
    return bool(row.correct) if task.kind == "scale" else row.target


def _prediction(shares: tuple[float, ...], task: Task) -> Prediction:
    if task.kind == "label":
        return Prediction(task.labels[int(np.argmax(shares))], shares)
    # The chance itself, as two bins' mixture whose expectation it is.
    chance = min(max((shares[1] - 0.05) / 0.9, 0.0), 1.0)
    return Prediction(None, (1 - chance, *[0.0] * 8, chance))


def _text(row: Row) -> str:
    return " ".join([row.chat.messages[-1].content, *row.arguments.values()])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
