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

from tests.server.running import ADAPTERS, Running, make_engine, running, settled

_NAME_A_MODEL = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
CASES = int(os.environ.get("MIDSTREAM_FUZZ_CASES", "600"))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("fuzzed")
    (root / "shelf").mkdir()
    engine = make_engine(root / "start", max_context_tokens=96)
    with running(engine, default_max_tokens=4, admin_key="boss", adapter_dir=root / "shelf") as server:
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
    assert len(tried) == len(operations) == 15, sorted(tried)
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
        response = case.call(timeout=120, headers={"Authorization": "Bearer boss"})
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
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
