"""A run on the tiny model: what fits, the order of its pieces, and the report that they fill."""

from __future__ import annotations

import pytest

from midstream.bench.model import ModelFacts
from midstream.bench.run import Run
from midstream.errors import InputError
from midstream.session import Engine
from tests.helpers import tiny_llama
from tests.tiny import tiny_engine

SLOT = 256  # bytes of one token's KV in the tiny model
pytestmark = pytest.mark.usefixtures("known_machine")


def test_all_pieces_fill_the_report(engine: Engine) -> None:
    run = Run(engine, [96, 64, 96], 2, rank=4)
    assert [piece.text for piece in run.pieces] == [
        "first use",
        *(f"64 tokens, calls, round {n} of 2" for n in (1, 2)),
        "64 tokens, reading",
        *(f"64 tokens, decoding, round {n} of 2" for n in (1, 2)),
        *(f"96 tokens, calls, round {n} of 2" for n in (1, 2)),
        "96 tokens, reading",
        *(f"96 tokens, decoding, round {n} of 2" for n in (1, 2)),
    ]
    assert all(piece.cost > 0 for piece in run.pieces)
    for piece in run.pieces:
        piece.run()
    run.finish()
    found = run.report.as_dict()
    assert [row["context"] for row in found["rows"]] == [64, 96]
    for row in found["rows"]:
        assert {len(values) for values in row["raw"].values()} == {2}
        assert len(row["figures"]) == 15
        assert row["share_of_bound"].keys() == {"label", "free"}
    kinds = {"dtype": "float32", "weights": "float32", "kv": "float32"}
    assert found["model"] == {"name": "tiny", **kinds, "device": "cpu"}
    assert found["machine"]["read_gb_per_s"] == 20.0
    assert "load_average_after" in found["machine"]
    assert found["left_out"] == []


def test_eight_bit_keys_and_values_are_read_as_such() -> None:
    """Heads of 8: twelve bytes for 32."""
    with Engine(tiny_engine(tiny_llama(), kv_dtype="int8")) as engine:
        run = Run(engine, [64], 1, rank=4)
        assert run.report.model["kv"] == "int8"
        assert ModelFacts.of(engine).token_bytes == SLOT * 12 // 32


def test_the_trial_round_is_not_kept(engine: Engine) -> None:
    run = Run(engine, [64], 1, rank=4)
    run.pieces[0].run()
    assert run.report.measured == []


def test_contexts_beyond_the_models_are_left_out_with_the_reason(engine: Engine) -> None:
    run = Run(engine, [64, 2040], 1, rank=4)
    assert [row.context for row in run.report.rows] == [64]
    (left,) = run.report.left_out
    assert (left["context"], left["what"]) == (2040, "all")
    assert "the model's context is 2048" in left["reason"]


def test_contexts_and_streams_beyond_the_kv_budget_are_left_out_with_what_they_need() -> None:
    with Engine(tiny_engine(tiny_llama(), kv_budget_bytes=1024 * SLOT)) as engine:
        run = Run(engine, [64, 400, 1500], 1, rank=4)
        assert [row.context for row in run.report.rows] == [64, 400]
        whole, streams = run.report.left_out
        assert (whole["context"], whole["what"]) == (1500, "all")
        assert whole["reason"] == "it takes 1 MiB of KV, and there are 0"
        assert (streams["context"], streams["what"]) == (400, "8 streams")
        for piece in run.pieces:
            piece.run()
        assert "streams_tokens_per_s" in run.report.rows[0].figures()
        assert "streams_tokens_per_s" not in run.report.rows[1].figures()
        assert "step_ms" in run.report.rows[1].figures()


def test_what_cannot_be_measured_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="no context fits: 5000"):
        Run(engine, [5000], 1, rank=4)
    for contexts, rounds in (([], 1), ([16], 1), ([64], 0)):
        with pytest.raises(InputError, match="at least"):
            Run(engine, contexts, rounds)
    with pytest.raises(InputError, match="rank 17"):
        Run(engine, [64], 1, rank=17)


def test_a_busy_machine_and_an_early_end_are_in_the_report(engine: Engine) -> None:
    run = Run(engine, [64], 1, rank=4, load_before=1000.0)
    run.finish("interrupted")
    assert run.report.ended == "interrupted"
    assert run.report.machine["load_average"] == 1000.0
    assert "busy before" in run.report.warnings[0]
