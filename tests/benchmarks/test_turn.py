"""The chat of benchmarks/turn.py on a tiny model: the sides do the same work, and its own checks can fail."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.turn import engine_sides, measure
from benchmarks.turn_play import Comparison, Played, differences, play, recomputed
from benchmarks.turn_script import CHECKS, INTRINSICS, Lengths, Script, read_rows, write_script
from benchmarks.turn_sides import EngineSide, PeftSide, parted

from midstream.session import Engine
from tests.benchmarks.rag_home import make_home
from tests.helpers import tiny_llama
from tests.tiny import tiny_chat, tiny_engine

LENGTHS = Lengths(answer=6, rewrite=3)
TURNS = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("turn"))


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[Engine]:
    with Engine(tiny_engine(tiny_llama())) as engine:
        yield engine


@pytest.fixture(scope="module")
def folders(home: Path) -> dict[str, Path]:
    return {name: home / name for name in INTRINSICS}


@pytest.fixture(scope="module")
def sides(engine: Engine, home: Path, folders: dict[str, Path]) -> list[Any]:
    peft = PeftSide(home / "model", folders, tiny_chat().encode, torch.float32)
    return [*engine_sides(engine, folders, home), peft]


@pytest.fixture(scope="module")
def script(engine: Engine, home: Path, sides: list[Any]) -> Script:
    adapters = {info.name: info for info in engine.adapters()}
    return write_script(next(read_rows(home)), tiny_chat(), adapters, TURNS, LENGTHS)


@pytest.fixture(scope="module")
def played(sides: list[Any], script: Script) -> dict[str, Played]:
    reference = asyncio.run(play(sides[0], script))
    return {side.name: asyncio.run(play(side, script, reference.answers)) for side in sides}


def test_a_script_is_the_chat_as_the_template_writes_it(script: Script, home: Path) -> None:
    """Passages stand in the turn that retrieved them, and the next turn leaves them where they are."""
    text = tiny_chat().decode([t for turn in script.turns for t in (*turn.given, *turn.header, *turn.closing)])
    assert text == (
        "<|im_start|>user\nDocument [1]:\nIt opens at nine.\n\nDocument [2]:\nIt closes at five.\n\nWhen?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nDocument [1]:\nIt is in the old town.\n\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
    )
    assert tiny_chat().decode(script.turns[1].asked) == "<|im_start|>user\nWhere?<|im_end|>\n"
    assert tiny_chat().decode(script.turns[0].required).startswith("<|im_start|>user\nRequirement: ")


def test_all_sides_are_asked_the_same_and_decode_as_much(played: dict[str, Played], script: Script) -> None:
    alora = played["alora"]
    assert len(alora.calls) == TURNS * (len(INTRINSICS) + 1)
    for side in played.values():
        assert [done.call for done in side.calls] == [done.call for done in alora.calls]
        for done in side.calls:
            if done.call.options:
                assert tiny_chat().decode(done.answer.tokens) in done.call.options
            else:
                assert len(done.answer.tokens) == done.call.tokens
    assert max(len(done.call.prompt) for done in alora.calls) <= script.size()


def test_base_answers_are_the_same_on_every_side_and_peft_agrees_with_the_aloras(played: dict[str, Played]) -> None:
    assert all(side.answers == played["alora"].answers for side in played.values())
    assert not differences(played["alora"], played["peft"])
    assert len(played["alora"].answers) == TURNS


def test_each_side_keeps_what_it_is_said_to_keep(played: dict[str, Played]) -> None:
    computed = {name: [done.answer.computed for done in side.calls] for name, side in played.items()}
    calls = [done.call for done in played["alora"].calls]
    own = [i for i, call in enumerate(calls) if call.adapter is not None]
    assert all(computed["lora_cold"][i] == len(calls[i].prompt) for i in own)
    assert all(computed["peft"][i] == len(calls[i].prompt) for i in own)
    base = [i for i, call in enumerate(calls) if call.adapter is None]
    # In the second turn the base model has the first one.
    assert all(
        computed[side][base[1]] < len(calls[base[1]].prompt) - len(calls[base[0]].prompt) + 20 for side in computed
    )
    # A warm plain LoRA reads at first everything, then what is new.
    checks = [i for i in own if calls[i].adapter in CHECKS]
    assert all(computed["lora_warm"][i] == len(calls[i].prompt) for i in checks[: len(CHECKS)])
    assert all(computed["lora_warm"][i] < len(calls[i].prompt) for i in checks[len(CHECKS) :])
    assert played["alora"].computed_tokens < played["lora_warm"].computed_tokens < played["lora_cold"].computed_tokens


def test_a_side_that_keeps_nothing_of_its_calls_holds_only_the_base_models_kv(played: dict[str, Played]) -> None:
    assert played["lora_cold"].kv_bytes[-1] < played["alora"].kv_bytes[-1] < played["lora_warm"].kv_bytes[-1]
    # All but the last answer's last token, "<|im_end|>" and "\n": layers, keys and values, heads, their size, float32.
    assert played["peft"].kv_bytes[-1] == (played["peft"].context_tokens[-1] - 3) * 2 * 2 * 2 * 8 * 4


def test_recomputing_from_nothing_finds_an_answer_that_is_not_so(
    engine: Engine, sides: list[Any], played: dict[str, Played]
) -> None:
    alone = EngineSide("alone", engine, {name: name for name in INTRINSICS}, "nothing")
    again = asyncio.run(recomputed(alone, played["alora"]))
    assert differences(played["alora"], again) == []
    assert all(done.answer.computed == len(done.call.prompt) for done in again.calls)
    wrong = dataclasses.replace(played["alora"], calls=list(played["alora"].calls))
    call, answer, seconds = wrong.calls[3]
    wrong.calls[3] = type(wrong.calls[3])(call, answer._replace(tokens=(*answer.tokens[:-1], 1)), seconds)
    assert call.adapter is None
    last = LENGTHS.answer - 1
    assert differences(wrong, again) == [f"call 3 (base answer) from token {last} on"]
    with pytest.raises(SystemExit, match=f"answers of lora_warm differ .*base answer. from token {last} on"):
        Comparison(strict=True).note("lora_warm", wrong.base(), again.base())
    counting = Comparison(strict=False)
    counting.note("lora_warm", wrong.base(), again.base())
    assert counting.counts == {"lora_warm": {"compared": TURNS, "differing": 1}}


def test_the_report_has_the_published_keys(engine: Engine, sides: list[Any], script: Script) -> None:
    report = measure(engine, sides, [script], rounds=2, peft_rounds=1)
    json.dumps(report)
    names = {"alora", "lora_cold", "lora_warm", "peft"}
    assert report["ratio"] == report["lora_cold_s"] / report["alora_s"]
    assert report["ratio_warm"] == report["lora_warm_s"] / report["alora_s"]
    assert report["peft_s"] > 0
    assert {name: len(values) for name, values in report["raw_s"].items()} == dict.fromkeys(names, 2) | {"peft": 1}
    assert report["phases_s"].keys() == report["kv"].keys() == report["waits_s"].keys() == names
    compared = {name: counts["compared"] for name, counts in report["equal"].items()}
    alone = {"alora, computed from nothing": TURNS * 7}
    assert compared == alone | {
        "alora": 2 * TURNS * 7,
        "lora_cold": 2 * TURNS,
        "lora_warm": 2 * TURNS,
        "peft": TURNS * 7,
    }
    assert not any(counts["differing"] for counts in report["equal"].values())


def test_labels_that_part_at_several_places_are_refused() -> None:
    assert parted([(1, 2, 3), (1, 4)]) == ((1,), {2: (1, 2, 3), 4: (1, 4)})
    with pytest.raises(SystemExit, match="several places"):
        parted([(1, 2, 3), (1, 2, 4), (1, 5)])
