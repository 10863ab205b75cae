"""The KV of prefixes: computed once, kept within budgets, found again by later runs, and the same from everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from midstream.training.base_kv import BaseKV
from tests.helpers import SEVEN, tiny_llama

PREFIXES = [tuple((i * 7 + j) % 200 for j in range(4 + i % 5)) for i in range(12)]


def tensors(found: Any) -> list[torch.Tensor]:
    cache, mask = found
    return [mask, *(t for layer in cache.layers for t in (layer.keys, layer.values))]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_batch_is_the_models_own_kv_and_is_never_written() -> None:
    model = tiny_llama()
    cache, mask = BaseKV(model).batch(PREFIXES[:2])
    own = model(torch.tensor([PREFIXES[1]]), use_cache=True).past_key_values
    length = len(PREFIXES[1])
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(ours.keys[1, :, -length:], theirs.keys[0], atol=1e-5, rtol=1e-5)
    assert mask.sum(dim=1).tolist() == [len(p) for p in PREFIXES[:2]]
    more = torch.zeros(2, 2, 1, 8)
    extended, _ = cache.update(more, more, 0)
    assert extended.shape[-2] == cache.get_seq_length() + 1 == mask.shape[1] + 1


def test_nothing_is_computed_twice_in_memory_or_from_disk(tmp_path: Path) -> None:
    model = tiny_llama()
    first = BaseKV(model, folder=tmp_path, disk_bytes=10**8)
    ticks: list[int] = []
    first.prepare(PREFIXES, ticks.append)
    assert sum(ticks) == len(set(PREFIXES))
    assert first.computed_tokens == sum(len(p) for p in set(PREFIXES))
    expected = first.batch(PREFIXES)
    assert first.computed_tokens == sum(len(p) for p in set(PREFIXES))
    # Another run, another task: the same conversations, found on disk even with no memory to keep them in.
    later = BaseKV(tiny_llama(), memory_bytes=0, folder=tmp_path, disk_bytes=10**8)
    later.prepare(PREFIXES)
    assert_same(later.batch(PREFIXES), expected)
    assert later.computed_tokens == 0


def test_other_weights_find_nothing(tmp_path: Path) -> None:
    BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8).prepare(PREFIXES)
    other = BaseKV(tiny_llama(seed=1), folder=tmp_path, disk_bytes=10**8)
    other.prepare(PREFIXES)
    assert other.computed_tokens > 0


def test_an_adapter_on_the_model_changes_neither_the_kv_nor_its_address(tmp_path: Path) -> None:
    plain = BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8)
    expected = plain.batch(PREFIXES)
    lora = LoraConfig(r=4, target_modules=list(SEVEN), init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_llama(), lora)
    adapted.train()
    assert_same(BaseKV(adapted.get_base_model()).batch(PREFIXES), expected)
    found = BaseKV(adapted.get_base_model(), folder=tmp_path, disk_bytes=10**8)
    found.prepare(PREFIXES)
    assert found.computed_tokens == 0
    assert adapted.training


def test_budgets_hold_and_what_fits_nowhere_is_computed_again(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = BaseKV(model).batch(PREFIXES)
    small = BaseKV(model, memory_bytes=3000, folder=tmp_path, disk_bytes=4000)
    small.prepare(PREFIXES)
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) < 8000
    assert small._kept_bytes <= 3000
    assert_same(small.batch(PREFIXES), expected)


def test_a_damaged_file_is_computed_and_written_again(tmp_path: Path) -> None:
    expected = BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8).batch(PREFIXES)
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(b"damaged")
    assert_same(BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8).batch(PREFIXES), expected)
    whole = BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8)
    whole.prepare(PREFIXES)
    assert whole.computed_tokens == 0


def test_a_disk_that_cannot_be_written_ends_the_store_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("a file where the folder should be")
    kv = BaseKV(tiny_llama(), folder=tmp_path / "kv", disk_bytes=10**8)
    with pytest.warns(UserWarning, match="no more KV is kept on disk"):
        kv.prepare(PREFIXES)
    assert_same(kv.batch(PREFIXES), BaseKV(tiny_llama()).batch(PREFIXES))


def test_what_is_on_disk_counts_even_when_its_neighbours_are_computed_now(tmp_path: Path) -> None:
    model = tiny_llama()
    BaseKV(model, folder=tmp_path, disk_bytes=10**8).prepare(PREFIXES[:3])
    more = BaseKV(model, folder=tmp_path, disk_bytes=10**8)
    more.prepare(PREFIXES)
    again = BaseKV(model, folder=tmp_path, disk_bytes=10**8)
    again.prepare(PREFIXES)
    assert again.computed_tokens == 0
    for one, other in zip(tensors(more.batch(PREFIXES)), tensors(again.batch(PREFIXES)), strict=True):
        assert torch.equal(one, other)


def test_another_configuration_of_the_same_weights_finds_nothing(tmp_path: Path) -> None:
    BaseKV(tiny_llama(), folder=tmp_path, disk_bytes=10**8).prepare(PREFIXES)
    model = tiny_llama()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    other = BaseKV(model, folder=tmp_path, disk_bytes=10**8)
    other.prepare(PREFIXES)
    assert other.computed_tokens > 0


def test_the_oldest_entries_of_earlier_runs_make_way_and_the_runs_own_do_not(tmp_path: Path) -> None:
    model = tiny_llama()
    BaseKV(model, folder=tmp_path, disk_bytes=10**8).prepare(PREFIXES)
    size = sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors"))
    others = [tuple((i * 11 + j) % 199 for j in range(8)) for i in range(4)]
    later = BaseKV(model, memory_bytes=0, folder=tmp_path, disk_bytes=size // 2)
    later.prepare(others)
    computed = later.computed_tokens
    later.prepare(others)
    assert later.computed_tokens == computed
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) <= size // 2 + 2000
