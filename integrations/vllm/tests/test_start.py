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
