"""The page on performance states what the results and the model of bytes and operations give."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.load import table
from benchmarks.scaling import SMALL, elsewhere, here

ROOT = Path(__file__).parent.parent


def test_its_tables_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert here() in page
    assert elsewhere() in page


def test_the_shape_is_that_of_the_default_model() -> None:
    # 30 layers of 3,538,944 weights in linear layers; the embedding is the head.
    assert SMALL.layer_weights == 106_168_320
    assert SMALL.layer_weights + SMALL.head_weights == 134_479_872
    assert SMALL.kv_bytes_per_token == 23_040
    assert SMALL.read_bytes(4096) == 2 * 134_479_872 + 4096 * 23_040


def test_operations_count_each_token_and_each_pair_once() -> None:
    whole = SMALL.operations(0, 100)
    parts = SMALL.operations(0, 60) + SMALL.operations(60, 100)
    assert parts - whole == 2 * SMALL.head_weights  # each forward has a head of its own
    one = SMALL.operations(7, 8) - 2 * (SMALL.layer_weights + SMALL.head_weights)
    assert one == 4 * 8 * 30 * 9 * 64


def test_the_load_is_that_of_the_results() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "load.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert table(report) in page
    beside = report["beside_prefill"]
    for seconds in (beside["alone_s"]["median"], beside["beside_s"]["median"], beside["beside_s"]["max"]):
        assert f"{1e3 * seconds:,.0f} ms" in page


def test_the_peers_rows_are_those_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for row in rows:
        times = f"{1e3 * row['peer_s']:,.1f} ms | {1e3 * row['midstream_s']:,.1f} ms | {row['ratio']:.2f} |"
        assert f"| {row['work']} | {row['context']:,} | {times}" in page
