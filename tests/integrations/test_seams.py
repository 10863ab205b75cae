"""All functions are replaced, or none, and only where they look as they should."""

import re
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import pytest

from midstream_vllm.install import TESTED, UNTESTED_VARIABLE, UnknownVllm, check_version
from midstream_vllm.seams import Seam, put_in


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a function and a class, and one that has imported the function by name."""
    module, other = ModuleType("vllm.fake"), ModuleType("vllm.fake_other")
    exec(
        "def plain(a, b, *, c=0): return ('plain', a)\n"
        "class Base:\n"
        "    def method(self, x): return ('method', x)\n"
        "class Thing(Base): pass\n",
        module.__dict__,
    )
    other.plain = module.plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.fake", module)
    monkeypatch.setitem(sys.modules, "vllm.fake_other", other)
    return module


def ours(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ("ours", stock(*args, **kwargs))

    return replaced


PLAIN = Seam("vllm.fake:plain", ("a", "b"), ours, others=("c",), bound_by_name=True)
METHOD = Seam("vllm.fake:Thing.method", ("self", "x"), ours)


def test_all_are_replaced_wherever_they_are_bound_and_only_once(stock: Any) -> None:
    assert put_in([PLAIN, METHOD]) == []
    assert put_in([PLAIN, METHOD]) == []
    assert stock.plain(1, 2) == ("ours", ("plain", 1))
    assert sys.modules["vllm.fake_other"].plain(1, 2) == ("ours", ("plain", 1))
    assert stock.Thing().method(3) == ("ours", ("method", 3))
    assert stock.Base().method(3) == ("method", 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Seam("vllm.fake:gone", ("a",), ours), "is not there"),
        (Seam("vllm.nowhere:plain", ("a",), ours), "is not there"),
        (Seam("vllm.fake:Thing.method", ("self", "y"), ours), r"takes \(self, x\)"),
        (Seam("vllm.fake:plain", ("a",), ours, others=("d",)), "does not take d"),
    ],
)
def test_none_is_replaced_where_one_does_not_fit(stock: Any, wrong: Seam, said: str) -> None:
    (problem,) = put_in([PLAIN, METHOD, wrong])
    assert re.search(said, problem)
    assert stock.plain(1, 2) == ("plain", 1)
    assert stock.Thing().method(3) == ("method", 3)


def test_versions() -> None:
    for version in TESTED:
        check_version(version, None)
    with pytest.raises(
        UnknownVllm, match=rf"does not know vLLM 0\.99\.0.*{TESTED[0]}, {TESTED[1]}.*{UNTESTED_VARIABLE}"
    ):
        check_version("0.99.0", "0.98.0")
    check_version("0.99.0", "0.99.0")
