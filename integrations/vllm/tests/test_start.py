"""The plugin at start-up: a vLLM that it does not know is refused, and left as it was."""

from __future__ import annotations

from serving import Vllm

_UNKNOWN = """
import midstream_vllm.install as plugin
plugin.TESTED = ("0.1.0",)
plugin.install()
"""
_ANOTHER = """
import vllm.v1.core.block_pool as pool
from vllm.v1.worker.gpu_input_batch import InputBatch
stock = pool.generate_block_hash_extra_keys
InputBatch.make_lora_inputs = lambda self, tokens: None
import midstream_vllm
try:
    midstream_vllm.register()
finally:
    assert pool.generate_block_hash_extra_keys is stock
    print("left as it was")
"""
_TWICE = """
import midstream_vllm
midstream_vllm.register()
import vllm.v1.core.block_pool as pool
first = pool.generate_block_hash_extra_keys
midstream_vllm.register()
assert pool.generate_block_hash_extra_keys is first
print(first.__midstream__)
"""
_V2 = """
from types import SimpleNamespace as Fake
import numpy as np
import midstream_vllm
midstream_vllm.register()
from midstream_vllm.patches import _v2_add
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState

adapter = LoRARequest("mine@abab", 9, "/kept/alora-" + "ab" * 32)
state = LoraState(4)
state.add_request("base", 0, None)
state.add_request("mine", 2, adapter)
runner = Fake(lora_state=state, req_states=Fake(num_computed_tokens_np=np.array([30, 0, 7, 0])))
new = Fake(req_id="mine", lora_request=adapter, sampling_params=Fake(extra_args={"midstream_activation_index": 9}))
_v2_add(lambda self, scheduled: None)(runner, Fake(scheduled_new_reqs=[new]))
step = ["base", "mine"], np.array([0, 2]), np.array([2, 4])
print([int(number) for number in state.make_lora_inputs(*step)[1]])
runner.req_states.num_computed_tokens_np[2] = 11
print([int(number) for number in state.make_lora_inputs(*step)[1]])
state.remove_request("mine")
print(state.midstream_starts)
"""


def test_another_version_is_refused_by_name(vllm: Vllm) -> None:
    done = vllm.run(_UNKNOWN)
    assert done.returncode == 1
    assert f"UnknownVllm: midstream-vllm does not know vLLM {vllm.version}. It was tested with 0.1.0" in done.stderr


def test_another_signature_is_refused_and_nothing_is_replaced(vllm: Vllm) -> None:
    done = vllm.run(_ANOTHER)
    assert done.returncode == 1
    assert "InputBatch.make_lora_inputs takes (self, tokens), expected" in done.stderr
    assert "left as it was" in done.stdout


def test_registering_again_changes_nothing(vllm: Vllm) -> None:
    done = vllm.run(_TWICE)
    assert done.stdout.endswith("True\n"), done.stderr


def test_the_v2_runners_own_state_gives_tokens_to_base_and_adapter(vllm: Vllm) -> None:
    """All of that runner that can be run without a GPU."""
    done = vllm.run(_V2)
    found = done.stdout.splitlines()[-3:]
    assert found == ["[0, 0, 0, 0, 9, 9]", "[0, 0, 9, 9, 9, 9]", "{}"], done.stderr
