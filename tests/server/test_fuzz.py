"""The described interface, fuzzed: whatever fits it, and much that does not, is never a server error.

MIDSTREAM_FUZZ_CASES sets how many cases are tried in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.flows.engines import make_intrinsics
from tests.server.running import ADAPTERS, Running, make_engine, running, settled

_NAME_A_MODEL = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
# The most that a flow of each kind is let do, by its settings.
_SMALL: dict[str, dict[str, int]] = {
    "rag": {"passages": 2},
    "best-of-n": {"n": 3},
    "majority": {"n": 3},
    "weighted-majority": {"n": 3},
    "repair": {"attempts": 2},
    "guarded": {},
    "agent": {"max_steps": 2, "think_tokens": 4, "act_tokens": 64, "string_chars": 8},
}
CASES = int(os.environ.get("MIDSTREAM_FUZZ_CASES", "600"))

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    # The server runs in a thread of this process: what it draws at random meanwhile, hypothesis takes for a strategy's.
    "ignore:Do not use the `random` module inside strategies",
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("fuzzed")
    (root / "shelf").mkdir()
    (root / "docs.txt").write_text("A passage.")
    engine = make_engine(root / "start", max_context_tokens=1024)
    for folder in make_intrinsics(root / "more", ["hallucination", "certainty"]):
        asyncio.run(engine.load_adapter(folder))
    settings = {"default_max_tokens": 4, "admin_key": "boss", "adapter_dir": root / "shelf", "docs": root / "docs.txt"}
    with running(engine, **settings) as server:
        yield server


def test_no_request_is_a_server_error_and_the_engine_stays_whole(fuzzed: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    bodies = sum(bool(operation.body) for operation in operations)
    tried: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    for operation in operations:
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            _fuzz(operation, mode, -(-CASES // (2 * bodies)), tried, statuses)
    assert len(tried) == len(operations) == 23, sorted(tried)
    assert tried.total() >= CASES
    assert statuses[200] > 0
    assert statuses[400] > 0
    print(f"{tried.total()} cases: {dict(statuses)}")
    asyncio.run(settled(fuzzed.service.engine))


def _fuzz(operation: Any, mode: GenerationMode, cases: int, tried: Counter[str], statuses: Counter[int]) -> None:
    """Send so many cases of one operation."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        tried[operation.label] += 1
        if mode is GenerationMode.POSITIVE:
            _name_what_exists(case, tried.total())
            _make_playable(case, tried.total())
        response = case.call(timeout=120, headers={"Authorization": "Bearer boss"})
        statuses[response.status_code] += 1
        assert response.status_code < 500 or _wanted(case, response), response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has nothing to do wrong
        send()


def _name_what_exists(case: Any, number: int) -> None:
    """Most made-up names are nobody's, and their requests would end there."""
    name = ["tiny", *ADAPTERS][number % (1 + len(ADAPTERS))]
    if isinstance(case.body, dict) and case.path in _NAME_A_MODEL:
        case.body["model"] = name
    if "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = name


def _make_playable(case: Any, number: int) -> None:
    """Most made-up conversations wait for no answer, and most flows would ask for more and longer answers than so
    small a model has room for."""
    flow, body = case.path.rpartition("/v1/flows/")[2], case.body
    if flow not in _SMALL or not isinstance(body, dict):
        return
    content = body["messages"][-1].get("content")
    body["messages"] = [*body["messages"][-2:-1], {"role": "user", "content": content or "what?"}]
    chosen = body.setdefault("settings", {})
    for name, most in _SMALL[flow].items():
        chosen[name] = min(chosen.get(name, most), most)
    if flow != "agent":
        chosen["params"] = {**chosen.get("params", {}), "max_tokens": 4, "n": 1, "seed": None}
    elif number % 2:
        body["tools"] = ["search", "certainty"]
    if number % 4:
        body.pop("deadline_s", None)


def _wanted(case: Any, response: Any) -> bool:
    """Whether a flow ended by the deadline that its request set."""
    return response.status_code == 504 and isinstance(case.body, dict) and "deadline_s" in case.body
