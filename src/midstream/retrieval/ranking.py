"""What every index here shares: the text of a document that is searched, and the choice of the best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from midstream.errors import InputError
from midstream.types import Document


def searched_text(document: Document) -> str:
    """The title belongs to what is found: a passage often names its subject nowhere else."""
    return f"{document.title} {document.text}".strip()


def check_k(k: int) -> None:
    """Raises InputError where no passage is asked for."""
    if k < 1:
        raise InputError(f"k is the number of passages asked for, at least 1, not {k}")


def best(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Places of the `k` highest of some scores, highest first, and equal ones in their order."""
    least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    # Everything that ties with the k-th stays in, so that order and not chance decides between them.
    places = np.flatnonzero(scores >= least)
    return places[np.argsort(-scores[places], kind="stable")][:k]
