"""Random adapters, plain LoRA twins, and which adapters are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from midstream.bench.adapters import FANOUT, check_rank, load_adapters, write_random, write_twin
from midstream.bench.model import ModelFacts
from midstream.errors import InputError
from midstream.session import Engine
from midstream.types import Completion, Request, SamplingParams
from tests.helpers import SEVEN, make_adapter_folder, tiny_llama
from tests.tiny import tiny_chat, tiny_engine


@pytest.mark.parametrize("invocation", [(), (256, 97, 10)])
def test_stock_peft_loads_a_random_adapter_whole_and_agrees(
    engine: Engine, tmp_path: Path, invocation: tuple[int, ...]
) -> None:
    write_random(tmp_path / "r", ModelFacts.of(engine).linear_shapes, 4, invocation, seed=3)
    info = engine.load_adapter(tmp_path / "r")
    assert (info.kind, info.invocation_tokens, info.rank) == ("alora" if invocation else "lora", invocation, 4)
    model = tiny_llama()
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "r")).eval()
    written = load_file(tmp_path / "r" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): w for name, w in adapted.named_parameters() if ".lora_" in name}
    assert loaded.keys() == written.keys()
    assert all(torch.equal(weight, written[name].float()) for name, weight in loaded.items())
    prompt = (*tiny_chat().encode("The museum opens at nine."), *invocation)
    score = engine.run(engine.aio.score(Request(prompt=prompt, adapter=info.name), [[65, 66, 67]]))
    with torch.inference_mode():
        logits = adapted(input_ids=torch.tensor([[*prompt, 65, 66]])).logits[0]
        plain = tiny_llama()(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[[-3, -2, -1], [65, 66, 67]]
    assert score.logprobs[0] == pytest.approx(expected.tolist(), abs=1e-3)
    assert (logits[-3] - plain).abs().max() > 1e-3, "it changes what the model says"


def test_six_random_ones_that_differ_and_a_twin(engine: Engine) -> None:
    found = load_adapters(engine, ModelFacts.of(engine), None)
    assert found.as_dict() == {
        "alora": [f"random-{number}" for number in range(FANOUT)],
        "random": FANOUT,
        "rank": 16,
        "invocation_tokens": len(tiny_chat().encode("<|im_start|>bench\n")),
    }
    assert found.longest_invocation == found.as_dict()["invocation_tokens"]
    assert len({info.digest for info in (*found.alora, found.lora)}) == FANOUT + 1
    assert found.lora.kind == "lora"
    assert found.lora.size_bytes == found.alora[0].size_bytes
    assert all(info.pinned for info in engine.adapters())


def test_the_twin_answers_as_the_alora_where_both_own_every_token(engine: Engine) -> None:
    found = load_adapters(engine, ModelFacts.of(engine), 8)
    invocation = found.alora[0].invocation_tokens
    context = tiny_chat().encode("A conversation that the base model has read.")

    def answer(prompt: tuple[int, ...], adapter: str) -> Completion:
        params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
        return engine.complete(Request(prompt=prompt, adapter=adapter, params=params))

    alora, lora = (answer(invocation, info.name) for info in (found.alora[0], found.lora))
    assert alora.token_ids == lora.token_ids
    logprobs = [[each.logprob for each in answer.choices[0].logprobs or ()] for answer in (alora, lora)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    engine.run(engine.aio.warm(context))
    after = [answer((*context, *invocation), info.name).usage for info in (found.alora[0], found.lora)]
    assert [usage.computed_tokens for usage in after] == [len(invocation), len(context) + len(invocation)]


def test_a_twin_of_the_older_form_has_no_invocation_either(tmp_path: Path) -> None:
    folder = make_adapter_folder(tiny_llama(), tmp_path / "old", targets=SEVEN)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace("{", '{"invocation_string": "<|im_start|>old",', 1))
    with Engine(tiny_engine(tiny_llama())) as engine:
        assert engine.load_adapter(folder).kind == "alora"
        assert engine.load_adapter(write_twin(folder, tmp_path / "plain")).kind == "lora"


def test_the_library_goes_first_and_random_ones_fill_up(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "library" / "tiny"
    for number, name in enumerate(("a", "b", "c")):
        invocation = None if name == "b" else tiny_chat().encode(f"<|im_start|>{name}\n")
        make_adapter_folder(tiny_llama(), root / name, targets=SEVEN, invocation=invocation, seed=number)
    monkeypatch.setenv("MIDSTREAM_LIBRARY", str(tmp_path / "library"))
    facts = ModelFacts.of(engine)
    found = load_adapters(engine, facts, None)
    assert [info.name for info in found.alora] == ["a", "c", "random-2", "random-3", "random-4", "random-5"]
    assert (found.random, found.alora[0].rank) == (4, 4)
    assert {info.name for info in engine.adapters()} == {info.name for info in (*found.alora, found.lora)}
    assert load_adapters(engine, facts, 2).random == FANOUT, "a rank that is asked for is measured"


def test_a_rank_must_fit_the_narrowest_layer(engine: Engine) -> None:
    facts = ModelFacts.of(engine)
    check_rank(16, facts)
    for rank in (0, 17):
        with pytest.raises(InputError, match="1 to 16"):
            check_rank(rank, facts)
    with pytest.raises(InputError, match="1 to 16"):
        load_adapters(engine, facts, 64)
