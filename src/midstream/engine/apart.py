"""Work with tensors outside of the engine's thread, done so that it does not slow that one down for good."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """Run a function in a thread that ends with it, and wait.

    Each thread that runs a parallel product gets an OpenMP team of its own, which lives as long as the thread. With
    more workers than cores, libgomp has them sleep between two products instead of spinning, and a decode step, which
    is hundreds of small products, then takes half as long again. So no thread but the engine's keeps a team.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="midstream-apart") as pool:
        return pool.submit(function).result()
