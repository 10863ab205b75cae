"""bfloat16 on a card: no further from float32 than transformers' own is, and long contexts to bfloat16's own error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from midstream.models.attention import attend, attend_by_definition
from midstream.models.attention_plan import AttentionPlan, Range, RowSegment
from midstream.models.cuda.graphs import GraphForward, GraphRecorder
from midstream.models.cuda.kernels import cuda_kernels
from midstream.models.forward import Batch
from midstream.models.kv import LayerKV
from midstream.models.load import prepare
from midstream.models.pool import KVPool
from tests.gpu.device import ON_A_CARD, relative_error
from tests.helpers import tiny_model
from tests.models.native import random
from tests.reference import logits
from tests.tiny import tiny_chat

pytestmark = ON_A_CARD


@pytest.fixture(scope="module")
def model() -> Any:
    """Granite's kind of layer, wide enough that matrix units are used, with weights of a usual size."""
    config = tf.GraniteConfig(
        vocab_size=320, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.05, attention_multiplier=0.125,
        residual_multiplier=0.5, pad_token_id=258, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return tiny_model(config)


@torch.inference_mode()
def ours(model: Any, tokens: list[int], *, decoded: int) -> Tensor:
    """Logits of the last `decoded` tokens in bfloat16: all but those prefilled, then one row at a time, replayed."""
    loaded = prepare(copy.deepcopy(model).to("cuda", torch.bfloat16), tiny_chat(), name="tiny")
    pool = KVPool(loaded.kv_shapes, len(tokens), loaded.dtype, loaded.device, spare=1)
    forward = GraphForward(loaded, pool, GraphRecorder())
    first = len(tokens) - decoded
    forward.run(Batch(tokens[:first], list(range(first)), (RowSegment(0, first, 0, 0, ()),), (), []))
    found = []
    for at in range(first, len(tokens)):
        segment = RowSegment(0, 1, at, at, (Range(0, at + 1, 0),))
        found.append(forward.run(Batch([tokens[at]], [at], (segment,), (), [0]))[0])
    assert forward._recordings
    return torch.stack(found)


def test_logits_are_no_further_from_float32_than_transformers_own(model: Any) -> None:
    tokens = [(13 * i + 5) % 310 for i in range(400)]
    exact = logits(model, tokens)[-20:]
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    with torch.inference_mode():
        theirs = half(input_ids=torch.tensor([tokens], device="cuda")).logits[0, -20:].float()
    found = relative_error(ours(model, tokens, decoded=20), exact)
    assert 0 < found <= 1.5 * relative_error(theirs, exact) + 1e-3


@pytest.mark.parametrize("rows", [1, 8, 48, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_of_long_contexts(rows: int, dtype: torch.dtype) -> None:
    heads, kv_heads, dim, prefix = 8, 2, 128, 65_536
    device = torch.device("cuda")
    query = random(heads, rows, dim).to(device, dtype)
    keys, values = (random(kv_heads, prefix + rows, dim, seed=seed).to(device, dtype) for seed in (1, 2))
    own = (Range(prefix, 1, prefix),) if rows == 1 else ()
    segment = RowSegment(0, rows, prefix, prefix, (Range(0, 40_000, 0), Range(40_000, prefix - 40_000, 40_000), *own))
    plan = AttentionPlan((segment,), dtype, device, rows)
    found = attend(query, LayerKV(keys, values), plan, cuda_kernels(dtype, device), dim**-0.5, None)
    for row in {0, rows // 2, rows - 1}:
        seen = prefix + row + 1
        k, v = (numbers[:, :seen].float().repeat_interleave(heads // kv_heads, 0) for numbers in (keys, values))
        exact, _ = attend_by_definition(query[:, row : row + 1].float(), k, v, None, False, dim**-0.5)
        assert relative_error(found[row], exact[:, 0]) < 1e-2
