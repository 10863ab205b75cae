"""All layers in one call of the compiled kernels against the same layers one after the other."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from midstream.adapters.weights import LoraWeights
from midstream.config import EngineConfig
from midstream.engine.engine import AsyncEngine
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment
from midstream.models.deltas import DeltaGroup
from midstream.models.load import LoadedModel
from midstream.models.native.stack import NativeStack
from midstream.models.pool import ForwardPlan, KVPool
from midstream.models.stack import FusedStack
from midstream.types import Request, SamplingParams
from tests.models.native import DTYPES, decoder_layers, needs_compiler, random, threads
from tests.models.test_fused_layers import FUSED, made, network

pytestmark = needs_compiler
# Of the largest number. Where residuals are scaled, layers round the scaled ones; a bfloat16 that is rounded to the
# other side goes through all layers after it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2}
SLOTS = 700
PREFIX = Range(300, 260, 0)
NAMES: dict[str, tuple[Any, dict[str, Any]]] = {
    **FUSED,
    "llama with heads of 64": (
        tf.LlamaConfig,
        {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    # The prefix is 260 positions long.
    "mistral within its window": (tf.MistralConfig, {"sliding_window": 300}),
}
ALIKE = ["llama with biases", "llama with heads of 64", "mistral within its window", "granite", "qwen2"]


class Scene(NamedTuple):
    """A step over a pool: rows, and which of them belong to an adapter."""

    segments: tuple[RowSegment, ...]
    owned: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> int:
        return sum(segment.count for segment in self.segments)


def segments_of(*counts: int) -> tuple[RowSegment, ...]:
    """Branches of one prefix, each on slots of its own."""
    found, row = [], 0
    for i, count in enumerate(counts):
        start = 31 * i + 5
        # A single row sees its own slot in a range.
        own = (Range(start, 1, PREFIX.length),) if count == 1 else ()
        found.append(RowSegment(row, count, PREFIX.length, start, (PREFIX, *own)))
        row += count
    return tuple(found)


SCENES = {
    "one row": Scene(segments_of(1)),
    "one row of an adapter": Scene(segments_of(1), ((0, 1),)),
    "some rows": Scene(segments_of(1, 7, 1, 1)),
    "some rows of an adapter": Scene(segments_of(1, 7, 1, 1), ((1, 8),)),
    "three adapters and the base": Scene(segments_of(1, 7, 1, 1, 30, 1, 2), ((0, 8), (8, 9), (10, 41))),
    "as many rows as one call takes": Scene(segments_of(30, 30, 30, 1, 1, 1, 1, 1, 1), ((0, 29), (29, 90), (95, 96))),
}


class Stacked(NamedTuple):
    """A model whose layers are in one stack."""

    loaded: LoadedModel
    stack: FusedStack
    rotary: nn.Module


@functools.cache
def stacked(name: str, dtype: torch.dtype = torch.float32) -> Stacked:
    loaded = made(network(*NAMES[name]).to(dtype), "stack")
    (stack,) = loaded.model.model.layers
    assert isinstance(stack, FusedStack)
    assert isinstance(stack._run, NativeStack)
    return Stacked(loaded, stack, loaded.model.model.rotary_emb)


def pool_of(model: Stacked, seed: int) -> KVPool:
    """With KV in the prefix, and NaN where nobody may look."""
    loaded = model.loaded
    pool = KVPool(loaded.kv_shapes, SLOTS, loaded.dtype, loaded.device)
    for i, tensor in enumerate(tensors(pool)):
        tensor.fill_(float("nan"))
        place = slice(PREFIX.start, PREFIX.start + PREFIX.length)
        tensor[:, place] = random(*tensor[:, place].shape, seed=100 * seed + i, dtype=tensor.dtype)
    return pool


def tensors(pool: KVPool) -> list[Tensor]:
    return [tensor for kv in pool.layers for tensor in kv if tensor is not None]


def copied(pool: KVPool, model: Stacked) -> KVPool:
    other = KVPool(model.loaded.kv_shapes, SLOTS, model.loaded.dtype, model.loaded.device)
    for to, source in zip(tensors(other), tensors(pool), strict=True):
        to.copy_(source)
    return other


def adapters(model: Stacked, count: int) -> list[dict[str, LoraWeights]]:
    """Each of some linear layers: all, every second, every third."""
    found = []
    for number in range(count):
        chosen = list(model.loaded.linear_shapes.items())[number :: number + 1]
        rank = (4, 3, 17)[number]
        found.append(
            {
                path: LoraWeights(
                    random(rank, features, seed=i, dtype=model.loaded.dtype) * features**-0.5,
                    random(out, rank, seed=i + 1, dtype=model.loaded.dtype) * 0.3,
                    0.7,
                )
                for i, (path, (out, features)) in enumerate(chosen, start=1000 * number)
            }
        )
    return found


class Step(NamedTuple):
    """What a model's layers get."""

    x: Tensor
    positions: tuple[Tensor, Tensor]
    plan: AttentionPlan


def step_of(model: Stacked, scene: Scene, extents: bool | None = None, seed: int = 7) -> Step:
    """The scene's input, its adapters put into the model."""
    loaded = model.loaded
    weights = adapters(model, len(scene.owned))
    loaded.deltas.set([DeltaGroup(str(i), *owned, weights[i]) for i, owned in enumerate(scene.owned)])
    served = loaded.extents if extents is None else extents
    plan = AttentionPlan(scene.segments, loaded.dtype, loaded.device, scene.rows, served)
    x = random(1, scene.rows, loaded.model.config.hidden_size, seed=seed, dtype=loaded.dtype)
    numbers = torch.tensor([[s.position + i for s in scene.segments for i in range(s.count)]])
    return Step(x, model.rotary(x, numbers), plan)


@torch.inference_mode()
def one_after_another(model: Stacked, step: Step, pool: KVPool) -> Tensor:
    x = step.x.clone()
    for layer in decoder_layers(model.loaded):
        plan = ForwardPlan(step.plan, pool, model.loaded.kernels)
        layer(x, position_embeddings=step.positions, midstream_plan=plan)
    return x[0]


@torch.inference_mode()
def in_one_call(model: Stacked, step: Step, pool: KVPool) -> Tensor:
    x = step.x.clone()[0]
    positions = step.positions[0][0], step.positions[1][0]
    plan = ForwardPlan(step.plan, pool, model.loaded.kernels)
    assert model.stack._run(x, positions, plan, model.loaded.deltas)
    return x


def assert_close(found: Tensor, expected: Tensor) -> None:
    """NaN where there is NaN; all else within the bound."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    largest = float(expected.double().nan_to_num().abs().max())
    off = float((found.double() - expected.double()).nan_to_num().abs().max())
    assert off <= TOLERANCE[found.dtype] * largest


def check(model: Stacked, scene: Scene, *, seed: int = 0, before: KVPool | None = None) -> KVPool:
    """One step on a pool, both ways; returns the pool of the one call."""
    pool = before or pool_of(model, seed)
    other = copied(pool, model)
    step = step_of(model, scene, seed=seed)
    found, expected = in_one_call(model, step, pool), one_after_another(model, step, other)
    assert bool(expected.isfinite().all())
    assert_close(found, expected)
    for mine, theirs in zip(tensors(pool), tensors(other), strict=True):
        assert_close(mine, theirs)
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", ALIKE)
def test_one_call_gives_what_the_layers_give(name: str, scene: str, dtype: torch.dtype) -> None:
    model = stacked(name, dtype)
    check(model, SCENES[scene])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_change_what_the_call_gives(dtype: torch.dtype) -> None:
    """Their rows, and no other ones: here no row sees another's."""
    model = stacked("llama with biases", dtype)
    results = []
    for owned in ((), ((1, 2),), ((0, 1), (1, 3))):
        scene = Scene(segments_of(1, 1, 1, 1), owned)
        results.append(in_one_call(model, step_of(model, scene), pool_of(model, 0)))
    base, one, two = results
    assert [bool((one[row] == base[row]).all()) for row in range(4)] == [True, False, True, True]
    assert [bool((two[row] == base[row]).all()) for row in range(4)] == [False, False, False, True]
    assert not torch.equal(one[1], two[1])


def test_steps_of_more_and_fewer_rows_one_after_another() -> None:
    model = stacked("llama with biases")
    for number, scene in enumerate(["one row", "as many rows as one call takes", "some rows of an adapter", "one row"]):
        check(model, SCENES[scene], seed=number)


def test_another_pool_and_the_first_again() -> None:
    model = stacked("llama with biases")
    first = check(model, SCENES["some rows"], seed=1)
    second = check(model, SCENES["some rows"], seed=2)
    check(model, SCENES["one row"], seed=3, before=first)
    check(model, SCENES["one row"], seed=4, before=second)


def test_the_memory_of_a_pool_is_not_kept() -> None:
    model = stacked("llama with biases")
    pool = check(model, SCENES["one row"])
    kept = weakref.ref(pool)
    del pool
    gc.collect()
    assert kept() is None
    check(model, SCENES["one row"], seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_the_same_numbers(dtype: torch.dtype) -> None:
    model = stacked("granite", dtype)
    scene = SCENES["as many rows as one call takes"]
    results = []
    for count in (2, 1):
        with threads(count):
            pool = pool_of(model, 0)
            results.append((in_one_call(model, step_of(model, scene), pool), *tensors(pool)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_with_windows_and_without_in_one_call(dtype: torch.dtype) -> None:
    """Each layer's attention is of its own window."""
    model = stacked("qwen2 with windows in some layers", dtype)
    scene = Scene(segments_of(1, 1, 1), ((1, 3),))
    plan = step_of(model, scene).plan
    assert [int(plan.extent_call(window).chunks[:, 1].sum()) for window in (None, 20)] == [
        263,
        22,
    ]  # 19 that all three see, and each itself
    check(model, scene)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_rows_beyond_a_window_in_one_call(dtype: torch.dtype) -> None:
    for name in ("mistral with a window", "qwen2 with windows in some layers"):
        check(stacked(name, dtype), Scene(segments_of(3, 1, 40)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("name", ["llama with biases", "granite"])
def test_eight_bit_keys_and_values(name: str, scene: str, dtype: torch.dtype) -> None:
    """The first layer's are the same; of later ones, a number between two whole ones may go to either."""
    model = stacked(name, dtype)
    loaded, before = model.loaded, pool_of(model, 0)
    pools = [KVPool(loaded.kv_shapes, SLOTS, loaded.dtype, loaded.device, "int8") for _ in range(2)]
    for pool in pools:
        for to, source in zip(pool.layers, before.layers, strict=True):
            to.write(torch.arange(SLOTS), source.keys, source.values)
    step = step_of(model, SCENES[scene])
    found, expected = in_one_call(model, step, pools[0]), one_after_another(model, step, pools[1])
    assert bool(expected.isfinite().all())
    off = (found - expected).double().abs().max()
    assert float(off / expected.double().abs().max()) < (5e-3 if dtype == torch.float32 else 4e-2)
    for mine, theirs in zip(pools[0].layers[0], pools[1].layers[0], strict=True):
        assert mine is not None
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    whole = in_one_call(model, step, before)
    assert not torch.equal(whole, found)


# ---------------------------------------------------------------------- when the layers run one after the other


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """By step: its rows, and whether they went through all layers in one call."""
    run, seen = NativeStack.__call__, []

    def note(self: NativeStack, x: Tensor, *others: Any) -> bool:
        seen.append((len(x), run(self, x, *others)))
        return seen[-1][1]

    monkeypatch.setattr(NativeStack, "__call__", note)
    return seen


@torch.inference_mode()
def check_refused(model: Stacked, step: Step) -> None:
    """Nothing is done; the module in the place of the layers gives what they give."""
    pool = pool_of(model, 0)
    x, before, untouched = step.x.clone(), step.x[0], copied(pool, model)
    plan = ForwardPlan(step.plan, pool, model.loaded.kernels)
    positions = step.positions[0][0], step.positions[1][0]
    assert not model.stack._run(x[0], positions, plan, model.loaded.deltas)
    assert torch.equal(x[0], before)
    expected = one_after_another(model, step, untouched)
    for mine, theirs in zip(tensors(pool), tensors(untouched), strict=True):
        assert int(mine.isnan().sum()) > int(theirs.isnan().sum())
    found = model.stack(x, position_embeddings=step.positions, midstream_plan=plan)
    assert found is x
    assert torch.equal(found[0], expected)
    for mine, theirs in zip(tensors(pool), tensors(untouched), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_without_extents_runs_layer_by_layer(dtype: torch.dtype) -> None:
    model = stacked("llama with biases", dtype)
    scene = SCENES["three adapters and the base"]
    check_refused(model, step_of(model, scene, extents=False))


def test_without_a_plan() -> None:
    model = stacked("llama")
    step = step_of(model, SCENES["one row"])
    with pytest.raises(RuntimeError, match="does not pass the engine's plan"):
        model.stack(step.x, position_embeddings=step.positions)


def test_layers_that_are_not_alike_or_not_packed_are_no_stack() -> None:
    odd = made(network(tf.LlamaConfig, {"intermediate_size": 71}).to(torch.bfloat16), "stack")
    unpacked = made(network(*FUSED["llama"]), "layers")
    scaled = network(*FUSED["granite"])
    scaled.model.layers[1].residual_multiplier = 0.3
    for loaded in (odd, unpacked, made(scaled, "stack")):
        assert len(loaded.model.model.layers) == 3
        assert not any(isinstance(layer, FusedStack) for layer in loaded.model.model.layers)


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
async def test_an_engines_steps(name: str, runs: list[tuple[int, bool]]) -> None:
    """Decoding goes through all layers in one call, with a window too, and as many steps as there are tokens."""
    engine = AsyncEngine(stacked(name).loaded, EngineConfig(kv_budget_bytes=4 * 1024**2))
    try:
        await engine.warm(tuple(range(5, 75)))
        runs.clear()
        prompt = (*range(5, 75), 80)
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        await engine.complete(Request(prompt=prompt, params=params))
    finally:
        await engine.aclose()
    assert runs == [(1, True)] * 6
