"""All that is replaced in vLLM, and why. The list at the end says which function and what of it is relied upon.
Each of vLLM's processes gets all of it:

  front (API server, LLM)     reads adapters, finds each request's activation index and sends it along
  engine core                 hashes blocks of KV by who owns their tokens
  workers                     give each token of a step to its adapter or to the base model
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.core import kv_cache_utils

from midstream_vllm import kernels
from midstream_vllm.core import MidstreamError
from midstream_vllm.faults import coded
from midstream_vllm.front import Bound, front_of
from midstream_vllm.metrics import count_finished
from midstream_vllm.ownership import block_keys, owned_tokens, owner_of
from midstream_vllm.seams import Seam

Stock = Callable[..., Any]

# ---------------------------------------------------------------------- front


def _process_inputs(stock: Stock) -> Stock:
    """The adapter becomes the engine's own, and the request gets its activation index; without one it is an error."""
    signature = inspect.signature(stock)

    @wraps(stock)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        asked = given.arguments.get("lora_request")
        if asked is None or self.lora_config is None:
            return stock(self, *args, **kwargs)
        bound = front_of(self).resolve(asked)
        given.arguments["lora_request"] = bound.request
        request = stock(*given.args, **given.kwargs)
        front_of(self).mark(request, bound)
        return request

    return process_inputs


def _generate(stock: Stock) -> Stock:
    """A missing invocation is found before a stream has begun, so that its status is 400 and not 200."""

    @wraps(stock)
    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("lora_request")
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if asked is not None and tokens is not None and self.vllm_config.lora_config is not None:
            front_of(self.input_processor).check(asked, tokens)
        return stock(self, prompt, sampling_params, request_id, **kwargs)

    return generate


def _first_seen(self: Any, given: inspect.BoundArguments) -> Bound | None:
    """The adapter of a request that the workers have not taken yet."""
    asked = given.arguments.get("lora_request")
    if asked is None or self.vllm_config.lora_config is None:
        return None
    front = front_of(self.input_processor)
    bound = front.resolve(asked)
    return None if bound.request.lora_int_id in front.loaded else bound


def _add_request_async(stock: Stock) -> Stock:
    """Workers try an adapter before its first request; stock vLLM's engine dies of one that it cannot load."""
    signature = inspect.signature(stock)

    @wraps(stock)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if bound := _first_seen(self, signature.bind(self, *args, **kwargs)):
            await self.engine_core.add_lora_async(bound.request)
            front_of(self.input_processor).loaded.add(bound.request.lora_int_id)
        return await stock(self, *args, **kwargs)

    return add_request


def _add_request_sync(stock: Stock) -> Stock:
    """The same for the offline engine."""
    signature = inspect.signature(stock)

    @wraps(stock)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if bound := _first_seen(self, signature.bind(self, *args, **kwargs)):
            self.engine_core.add_lora(bound.request)
            front_of(self.input_processor).loaded.add(bound.request.lora_int_id)
        return stock(self, *args, **kwargs)

    return add_request


def _add_lora_async(stock: Stock) -> Stock:
    """What is loaded is the folder as it was read and checked now, under a number that follows from its content."""

    @wraps(stock)
    async def add_lora(self: Any, lora_request: Any) -> Any:
        front = front_of(self.input_processor)
        bound = await asyncio.to_thread(front.read, lora_request)
        added = await stock(self, bound.request)
        front.took(lora_request, bound)
        return added

    return add_lora


def _add_lora_sync(stock: Stock) -> Stock:
    """The same for the offline engine."""

    @wraps(stock)
    def add_lora(self: Any, lora_request: Any) -> Any:
        front = front_of(self.input_processor)
        bound = front.read(lora_request)
        added = stock(self, bound.request)
        front.took(lora_request, bound)
        return added

    return add_lora


def _remove_lora(stock: Stock) -> Stock:
    """A caller's number becomes the engine's, and stands for nothing any more."""

    @wraps(stock)
    def remove_lora(self: Any, lora_id: int) -> Any:
        return stock(self, front_of(self.input_processor).unbind(lora_id))

    return remove_lora


def _pin_lora(stock: Stock) -> Stock:
    """A caller's number becomes the engine's."""

    @wraps(stock)
    def pin_lora(self: Any, lora_id: int) -> Any:
        return stock(self, front_of(self.input_processor).engine_number(lora_id))

    return pin_lora


def _list_loras_async(stock: Stock) -> Stock:
    """The engine's numbers become the callers'."""

    @wraps(stock)
    async def list_loras(self: Any) -> Any:
        return front_of(self.input_processor).caller_numbers(await stock(self))

    return list_loras


def _list_loras_sync(stock: Stock) -> Stock:
    """The same for the offline engine."""

    @wraps(stock)
    def list_loras(self: Any) -> Any:
        return front_of(self.input_processor).caller_numbers(stock(self))

    return list_loras


def _load_lora_adapter(stock: Stock) -> Stock:
    """A folder that is refused is the caller's fault: 400 with all its violations, where stock vLLM says 500."""

    @wraps(stock)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        front = front_of(self.engine_client.input_processor)
        front.failures.pop(request.lora_name, None)
        answer = await stock(self, request, base_model_name)
        if failure := front.failures.pop(request.lora_name, None):
            return coded(answer, failure)
        if loaded := self.lora_requests.get(request.lora_name):
            loaded.load_inplace = False  # it is loaded; stock vLLM would read the folder again for each request
        return answer

    return load_lora_adapter


def _create_error_response(stock: Stock) -> Stock:
    """Errors of ours carry midstream's code."""

    @wraps(stock)
    def create_error_response(message: Any, *args: Any, **kwargs: Any) -> Any:
        response = stock(message, *args, **kwargs)
        return coded(response, message) if isinstance(message, MidstreamError) else response

    return create_error_response


def _note_params(stock: Stock) -> Stock:
    """A finished request still knows its activation index, for the counters."""

    @wraps(stock)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, request, *args, **kwargs)
        if state := self.request_states.get(request.request_id):
            state.midstream_params = request.sampling_params
        return result

    return add_request


def _count_finished(stock: Stock) -> Stock:
    """Prompt tokens are counted by who owns them."""

    @wraps(stock)
    def _update_stats_from_finished(self: Any, req_state: Any, *args: Any, **kwargs: Any) -> Any:
        count_finished(req_state, req_state.midstream_params)
        return stock(self, req_state, *args, **kwargs)

    return _update_stats_from_finished


# ---------------------------------------------------------------------- engine core


def _extra_keys(stock: Stock) -> Stock:
    """A block carries its adapter only when it reaches past the activation index; then by digest, not by name."""
    of_adapter = kv_cache_utils._gen_lora_extra_hash_keys

    @wraps(stock)
    def extra_keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> tuple[Any, int]:
        keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
        if request.lora_request is None:
            return keys, next_mm_idx
        owner = owner_of(request.lora_request, request.sampling_params)
        return block_keys(keys, of_adapter(request), owner, end_token_idx), next_mm_idx

    return extra_keys


# ---------------------------------------------------------------------- workers


def _starts(holder: Any) -> dict[str, int]:
    """Activation indices by request, of those that have one after the start."""
    found: dict[str, int] = holder.__dict__.setdefault("midstream_starts", {})
    return found


def _note_start(holder: Any, request_id: str, lora_request: Any, params: Any) -> None:
    owner = owner_of(lora_request, params)
    if owner is None or owner.start == 0:
        _starts(holder).pop(request_id, None)
    else:
        _starts(holder)[request_id] = owner.start


def _v1_add(stock: Stock) -> Stock:
    """The V1 runner knows a row's activation index."""

    @wraps(stock)
    def add_request(self: Any, request: Any) -> Any:
        row = stock(self, request)
        _note_start(self, request.req_id, request.lora_request, request.sampling_params)
        return row

    return add_request


def _forget(stock: Stock) -> Stock:
    """A runner forgets the activation index of a request that has left."""

    @wraps(stock)
    def remove_request(self: Any, req_id: str) -> Any:
        _starts(self).pop(req_id, None)
        return stock(self, req_id)

    return remove_request


def _v1_inputs(stock: Stock) -> Stock:
    """Tokens before the activation index go to the base model."""

    @wraps(stock)
    def make_lora_inputs(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        prompts, tokens, active = stock(self, num_scheduled_tokens, num_sampled_tokens)
        if starts := _starts(self):
            rows = {self.req_id_to_index[request]: start for request, start in starts.items()}
            tokens = owned_tokens(tokens, num_scheduled_tokens, self.num_computed_tokens_cpu, rows)
        return prompts, tokens, active

    return make_lora_inputs


def _v2_add(stock: Stock) -> Stock:
    """The V2 runner knows a request's activation index."""

    @wraps(stock)
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        result = stock(self, scheduler_output)
        state = self.lora_state
        state.midstream_computed = self.req_states.num_computed_tokens_np
        for new in scheduler_output.scheduled_new_reqs:
            _note_start(state, new.req_id, new.lora_request, new.sampling_params)
        return result

    return add_requests


def _v2_inputs(stock: Stock) -> Stock:
    """Tokens before the activation index go to the base model."""

    @wraps(stock)
    def make_lora_inputs(self: Any, req_ids: list[str], idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        prompts, tokens, active = stock(self, req_ids, idx_mapping, num_scheduled_tokens)
        if starts := _starts(self):
            rows = {row: starts[request] for row, request in enumerate(req_ids) if request in starts}
            computed = self.midstream_computed[idx_mapping]
            tokens = owned_tokens(tokens, num_scheduled_tokens, computed, rows)
        return prompts, tokens, active

    return make_lora_inputs


def _wrapper_init(stock: Stock) -> Stock:
    """Room for two segments a request: activation splits one in two."""

    @wraps(stock)
    def make_room(self: Any, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        stock(self, max_num_batched_tokens, 2 * max_batches, device, **kwargs)

    return make_room


def _instead(ours: Stock) -> Callable[[Stock], Stock]:
    """One product for each adapter's rows; stock vLLM gathers weights per token, and base rows get an adapter's."""
    return lambda stock: wraps(stock)(ours)


def _update_metadata(stock: Stock) -> Stock:
    """A step's rows are grouped once for all layers."""

    @wraps(stock)
    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        kernels.note_groups(self)

    return update_metadata


# ---------------------------------------------------------------------- the list

_ASYNC, _SYNC = "vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine"
_OUTPUT = "vllm.v1.engine.output_processor:OutputProcessor"
_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_ERRORS = "vllm.entrypoints.serve.exception_handling.error_response"
_BLOCKS = "vllm.v1.core.kv_cache_utils"
_V1 = "vllm.v1.worker.gpu_input_batch:InputBatch"
_V2 = "vllm.v1.worker.gpu.lora_utils:LoraState"
_CPU = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
_REQUEST, _LORA = ("self", "request_id", "prompt", "params"), ("lora_request",)
_ADD, _NUMBER = ("self", "lora_request"), ("self", "lora_id")
_BLOCK = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
_METADATA = ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size")
_SHRINK, _BOTH = ("self", "y", "x", "lora_a_stacked", "scale"), ("self", "y", "x", "lora_a_stacked", "lora_b_stacked")
_EXPAND = ("self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs")

SEAMS = (
    Seam("vllm.v1.engine.input_processor:InputProcessor.process_inputs", _REQUEST, _process_inputs, others=_LORA),
    Seam(f"{_ASYNC}.generate", ("self", "prompt", "sampling_params", "request_id"), _generate, others=_LORA),
    Seam(f"{_ASYNC}.add_request", _REQUEST, _add_request_async, others=_LORA),
    Seam(f"{_SYNC}.add_request", _REQUEST, _add_request_sync, others=_LORA),
    Seam(f"{_ASYNC}.add_lora", _ADD, _add_lora_async),
    Seam(f"{_SYNC}.add_lora", _ADD, _add_lora_sync),
    Seam(f"{_ASYNC}.remove_lora", _NUMBER, _remove_lora),
    Seam(f"{_SYNC}.remove_lora", _NUMBER, _remove_lora),
    Seam(f"{_ASYNC}.pin_lora", _NUMBER, _pin_lora),
    Seam(f"{_SYNC}.pin_lora", _NUMBER, _pin_lora),
    Seam(f"{_ASYNC}.list_loras", ("self",), _list_loras_async),
    Seam(f"{_SYNC}.list_loras", ("self",), _list_loras_sync),
    Seam(f"{_MODELS}.load_lora_adapter", ("self", "request", "base_model_name"), _load_lora_adapter),
    Seam(f"{_ERRORS}:create_error_response", ("message",), _create_error_response, bound_by_name=True),
    Seam(f"{_OUTPUT}.add_request", ("self", "request"), _note_params),
    Seam(f"{_OUTPUT}._update_stats_from_finished", ("self", "req_state"), _count_finished),
    Seam(f"{_BLOCKS}:generate_block_hash_extra_keys", _BLOCK, _extra_keys, bound_by_name=True),
    Seam(f"{_BLOCKS}:_gen_lora_extra_hash_keys", ("request",), lambda stock: stock),  # called by ours, not replaced
    Seam(f"{_V1}.add_request", ("self", "request"), _v1_add),
    Seam(f"{_V1}.remove_request", ("self", "req_id"), _forget),
    Seam(f"{_V1}.make_lora_inputs", ("self", "num_scheduled_tokens", "num_sampled_tokens"), _v1_inputs),
    Seam("vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests", ("self", "scheduler_output"), _v2_add),
    Seam(f"{_V2}.remove_request", ("self", "req_id"), _forget),
    Seam(f"{_V2}.make_lora_inputs", ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"), _v2_inputs),
    Seam(f"{_CPU}.__init__", ("self", "max_num_batched_tokens", "max_batches", "device"), _wrapper_init),
    Seam(f"{_CPU}.update_metadata", _METADATA, _update_metadata),
    Seam(f"{_CPU}.add_lora_linear", (*_BOTH, "scale", "output_slices"), _instead(kernels.add_lora_linear)),
    Seam(f"{_CPU}.add_lora_logits", (*_BOTH, "scale"), _instead(kernels.add_lora_logits)),
    Seam(f"{_CPU}.add_shrink", _SHRINK, _instead(kernels.add_shrink)),
    Seam(f"{_CPU}.add_expand", _EXPAND, _instead(kernels.add_expand)),
    Seam(f"{_CPU}.add_lora_embedding", (*_EXPAND[:4], "add_inputs"), _instead(kernels.add_lora_embedding)),
)
