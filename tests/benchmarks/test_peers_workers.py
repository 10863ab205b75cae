"""The sides of the comparison with peers: the protocol, two real sides on a tiny model, and exported adapters."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from benchmarks.peers_export import ExportError, write_gguf
from benchmarks.peers_launch import read_info
from benchmarks.peers_measure import Equality
from benchmarks.peers_midstream import MidstreamSide
from benchmarks.peers_peft import PeftSide
from benchmarks.peers_process import Ran, Worker, WorkerError
from benchmarks.peers_protocol import Absent, Answer, Call, Label, Setup, serve
from benchmarks.peers_work import Question, make_label
from benchmarks.turn_script import INTRINSICS
from safetensors.torch import load_file

from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import save_tiny_tokenizer, tiny_chat

FAKE = Path(__file__).parent / "peers_fake.py"
SETUP = Setup("m", "float32", 1, {}, 1, 64, 2**20, {})


def fake(log: Path, timeout_s: float = 30.0) -> Worker:
    return Worker([sys.executable, str(FAKE), '{"seconds": 0.25}'], log=log, timeout_s=timeout_s)


# ---------------------------------------------------------------------- the protocol


def test_a_worker_answers_line_by_line(tmp_path: Path) -> None:
    call = Call("a", (1, 2, 3), 1, Label(('"yes"', '"no"'), (4,), (5, 6)))
    with fake(tmp_path / "log") as worker:
        assert worker.load(SETUP) == {"version": "fake", "format": "float32", "adapters": "alora"}
        worker.clear()
        worker.warm([(1, 2)])
        ran = worker.run([call, Call(None, (7,), 2)], logprobs=True)
        assert ran == Ran((Answer((5,), 3, (-0.5,)), Answer((7, 7), 1, (-0.5, -0.5))), 0.25)
        with pytest.raises(Absent, match="no such library"):
            worker.ask("absent")
        with pytest.raises(WorkerError, match="boom: ValueError: it broke"):
            worker.ask("boom")
        if Path("/proc").is_dir():
            assert worker.peak_bytes(children_only=False) > 2**20
            assert worker.peak_bytes(children_only=True) is None


def test_a_dead_worker_is_told_with_its_last_words(tmp_path: Path) -> None:
    with fake(tmp_path / "log") as worker:
        with pytest.raises(WorkerError, match=r"die: the worker ended with 3: out of luck"):
            worker.ask("die")
        with pytest.raises(WorkerError, match=r"clear: the worker ended with 3"):
            worker.clear()


def test_a_silent_worker_is_given_up(tmp_path: Path) -> None:
    with fake(tmp_path / "log", timeout_s=0.2) as worker, pytest.raises(WorkerError, match="no answer within"):
        worker.ask("sleep")


class Recorder:
    """A side that can do nothing but repeat its prompts."""

    closed = False

    def load(self, setup: Setup) -> dict[str, Any]:
        raise Absent(f"no {setup.model} here")

    def clear(self) -> None:
        raise RuntimeError("cannot")

    def warm(self, prompts: Any) -> None:
        assert prompts == [(1, 2)]

    def run(self, calls: Any, logprobs: bool) -> list[Answer]:
        return [Answer(call.prompt, 0) for call in calls]

    def close(self) -> None:
        self.closed = True


def test_the_loop_goes_on_after_an_error_and_closes_the_side(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        {"op": "load", "setup": asdict(SETUP)},
        {"op": "clear"},
        {"op": "warm", "prompts": [[1, 2]]},
        {"op": "run", "calls": [asdict(Call("a", (3,), 1, Label(("x",), (), (1,))))]},
    ]
    side, target = Recorder(), io.StringIO()
    serve(side, io.StringIO("".join(json.dumps(line) + "\n" for line in asked)), target)
    replies = [json.loads(line) for line in target.getvalue().splitlines()]
    assert replies[:3] == [{"absent": "no m here"}, {"error": "RuntimeError: cannot"}, {"ok": None}]
    assert replies[3]["ok"]["answers"] == [{"tokens": [3], "computed": 0, "logprobs": []}]
    assert side.closed
    assert "cannot" in capsys.readouterr().err


# ---------------------------------------------------------------------- real sides, a tiny model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    model = tiny_llama()
    model.save_pretrained(root / "model")
    save_tiny_tokenizer(root / "model")
    for seed, name in enumerate("ab"):
        invocation = tiny_chat().encode(f"<|im_start|>{name}\n")
        make_adapter_folder(model, root / name, targets=SEVEN, invocation=invocation, seed=seed)
    return root


@pytest.fixture(scope="module")
def sides(home: Path) -> Iterator[dict[str, Any]]:
    found = {"midstream": MidstreamSide(), "peft": PeftSide(), "cache": PeftSide()}
    adapters = {name: str(home / name) for name in "ab"}
    for variant, side in found.items():
        options = {"variant": "cache" if variant == "cache" else ""}
        facts = side.load(Setup(str(home / "model"), "float32", 1, adapters, 2, 512, 2**22, options))
        assert facts["adapters"] == "alora"
    yield found
    for side in found.values():
        side.close()


def calls(held: tuple[int, ...]) -> list[list[Call]]:
    label = make_label(tiny_chat(), ('"yes"', '"no"'))
    asked = {name: Question(tiny_chat().encode(f"<|im_start|>{name}\n"), label) for name in "ab"}
    base = Call(None, (*held, *tiny_chat().encode("<|im_start|>assistant\n")), 6)
    one, other = (Call(name, (*held, *question.invocation), 1, label) for name, question in asked.items())
    free = Call("b", other.prompt, 5)
    return [[base], [one], [other], [one, other], [free], [base]]


@pytest.mark.parametrize("peer", ["peft", "cache"])
def test_two_sides_give_the_same_answers_and_say_what_they_computed(sides: dict[str, Any], peer: str) -> None:
    held = tiny_chat().encode("<|im_start|>user\nWhen does it open, and when does it close?<|im_end|>\n")
    equality = Equality(frozenset())
    computed: list[int] = []
    for side in (sides["midstream"], sides[peer]):
        side.clear()
        side.warm([held])
    for group in calls(held):
        ours, theirs = (side.run(group, True) for side in (sides["midstream"], sides[peer]))
        lengths = [call.tokens for call in group]
        assert [len(answer.tokens) for answer in ours] == [len(answer.logprobs) for answer in ours] == lengths
        equality.note(group, Ran(tuple(ours), 0), Ran(tuple(theirs), 0))
        computed.append(theirs[0].computed)
    assert equality.compared == 7
    assert equality.equal, equality.as_dict()
    assert equality.largest is not None
    assert equality.largest < 1e-3
    width = len(calls(held)[1][0].prompt) - len(held)
    assert computed[1] == (width if peer == "cache" else len(held) + width)
    assert computed[0] < len(held)


def test_streams_are_one_batch_and_keep_their_kv(sides: dict[str, Any]) -> None:
    prompts = [tiny_chat().encode(text) for text in ("abcdefgh", "12345678")]
    for side in sides.values():
        side.clear()
        side.warm(prompts)
        answers = [side.run([Call(None, prompt, 4) for prompt in prompts], False) for _ in range(2)]
        assert answers[0] == answers[1]
        assert [answer.computed for answer in answers[0]] == [1, 1]
    found = [side.run([Call(None, prompt, 4) for prompt in prompts], False) for side in sides.values()]
    assert [[a.tokens for a in answers] for answers in found] == [[a.tokens for a in found[0]]] * 3


def test_an_adapter_active_too_early_is_found(sides: dict[str, Any]) -> None:
    equality = Equality(frozenset())
    call = Call("a", (1, 2), 2)
    equality.note([call], Ran((Answer((3, 4), 2, (-1.0, -2.0)),), 0), Ran((Answer((3, 4), 2, (-1.0, -2.17)),), 0))
    assert not equality.differing
    assert not equality.equal


# ---------------------------------------------------------------------- exported adapters


def test_the_gguf_adapter_has_the_weights_and_is_invoked_from_the_second_token_on(home: Path, tmp_path: Path) -> None:
    path = write_gguf(home / "a", tmp_path / "a.gguf", home / "model")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    invocation = list(tiny_chat().encode("<|im_start|>a\n"))
    assert fields["adapter.alora.invocation_tokens"] == invocation[1:]
    assert reader.fields["adapter.alora.invocation_tokens"].types[1] == gguf.GGUFValueType.UINT32
    assert fields["adapter.lora.alpha"] == 8.0
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    weights = load_file(home / "a" / "adapter_model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(weights) == 2 * 2 * len(SEVEN)
    prefix = "base_model.model.model.layers.1"
    down = weights[f"{prefix}.mlp.down_proj.lora_B.weight"].numpy()
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], down)
    # Two heads of eight rows: row i of a head's first half, then row i of its second.
    order = [head * 8 + half * 4 + i for head in range(2) for i in range(4) for half in range(2)]
    keys = weights[f"{prefix}.self_attn.k_proj.lora_B.weight"].numpy()
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_b"], keys[order])


def test_a_plain_lora_in_bfloat16_is_exported_too(home: Path, tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    folder = make_adapter_folder(model, tmp_path / "plain", targets=["o_proj"])
    reader = gguf.GGUFReader(write_gguf(folder, tmp_path / "plain.gguf", home / "model"))
    assert "adapter.alora.invocation_tokens" not in reader.fields
    weights = load_file(folder / "adapter_model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weight = weights["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"].float().numpy()
    assert np.array_equal(tensors["blk.0.attn_output.weight.lora_a"], weight)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"invocation": [5]}, "one token early"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"targets": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_a_gguf_adapter_cannot_say_is_refused(
    home: Path, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    folder = make_adapter_folder(tiny_llama(), tmp_path / "odd", **more)
    with pytest.raises(ExportError, match=reason):
        write_gguf(folder, tmp_path / "odd.gguf", home / "model")


def test_the_librarys_adapters_can_be_exported() -> None:
    root = Path(__file__).parents[2] / "library" / "smollm2-135m-instruct"
    for name in INTRINSICS:
        info = read_info(root / name)
        assert len(info.invocation_tokens) > 1
        assert info.contract is not None
