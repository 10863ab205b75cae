"""Loading a base model for the engine: any transformers causal LM whose attention the engine can serve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from midstream.errors import ModelError
from midstream.models.attention import NAME
from midstream.models.attention_plan import AttentionPlan, RowSegment
from midstream.models.chat import ChatTokenizer
from midstream.models.cuda.kernels import cuda_kernels
from midstream.models.deltas import DeltaContext
from midstream.models.device import on_device
from midstream.models.direct import ModelCall, pick_call, probe_tokens
from midstream.models.fuse import Seen, Watched, fuse_layers, stack_layers
from midstream.models.fusions import fuse_norms
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.linear import wrap_linears
from midstream.models.native.kernels import start_kernels
from midstream.models.pool import AttentionShape, ForwardPlan, ProbePool
from midstream.models.products import WeightKind, can_pack
from midstream.models.source import loading_bars, name_of, resolve

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference between our logits and transformers' own in the probe, relative to the largest logit.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class Pending:
    """Kernels that are being compiled, and what the model's fused layers got in the probe, by path."""

    kernels: Future[Kernels]
    seen: dict[str, Seen]


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A base model ready for the engine. `linear_shapes`: (out, in) of each adaptable layer by module path.

    `weights`: what its linear layers' weights were rounded to, None where they are as the model has them;
    `extents`: whether `kernels` serve the attention of all layers.

    `pending`: what will take the place of torch's kernels, None where nothing will. `upgrade.changes` then changes
    `call`, `kernels`, `extents` and `pending`; nothing else ever changes.
    """

    name: str
    model: nn.Module
    call: ModelCall
    chat: ChatTokenizer
    deltas: DeltaContext
    kernels: Kernels
    extents: bool
    linear_shapes: dict[str, tuple[int, int]]
    kv_shapes: list[tuple[int, int]]
    vocab_size: int
    max_context_tokens: int
    dtype: torch.dtype
    device: torch.device
    weights: WeightKind | None
    pending: Pending | None = None


def load_model(
    model: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    weights: str | None = None,
    wait_for_kernels: bool = False,
    progress: bool = False,
) -> LoadedModel:
    """Load a known name, a Hugging Face folder or hub id, or a GGUF file.

    `weights`: "int8" rounds the linear layers' weights to eight bits; None leaves them as the model has them.
    `wait_for_kernels`: where the machine has none of its own yet, wait until they are compiled, as what is measured or
    compared must; else the model starts on torch's, and they are `pending`.

    Raises ModelError when it cannot be found, read or served, with the reason.
    """
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    rounded = _pick_weights(weights)
    folder = resolve(model, progress=progress)
    config = _read_config(folder)
    start_kernels(kind, target, _head_dims(config))  # what has to be compiled is, while the weights are read
    chat = ChatTokenizer.from_folder(folder)
    with loading_bars(progress):
        network = _read_model(folder, config, kind)
    return prepare(network.to(target), chat, name=name_of(model), weights=rounded, wait_for_kernels=wait_for_kernels)


def prepare(
    network: Any,
    chat: ChatTokenizer,
    *,
    name: str,
    weights: WeightKind | None = None,
    kernels: Kernels | None = None,
    wait_for_kernels: bool = True,
) -> LoadedModel:
    """Make a transformers causal LM servable, or raise ModelError with the reason that it is not.

    `weights` None: as the model has them. `kernels` None: the fastest for its type and device; those that have to be
    compiled first are waited for, or left `pending`.
    """
    network.eval()
    config = network.config.get_text_config()
    _refuse_known(config)
    device, dtype = network.device, network.dtype
    watched = Watched(network)
    attention = _probe(network, config, watched)
    pending = None
    if kernels is None:
        kernels, pending = _pick_kernels(network, watched, attention.values(), wait_for_kernels)
    deltas = DeltaContext()
    with torch.inference_mode(), on_device(device):
        shapes = fuse_layers(network, watched, attention, deltas, kernels, weights)
        stack_layers(network, kernels)
        shapes |= wrap_linears(network, deltas, kernels, weights)
    shapes_of_kv = [(attention[layer].kv_heads, attention[layer].dim) for layer in sorted(attention)]
    extents = all(kernels.supports(dim) for _, dim in shapes_of_kv)
    return LoadedModel(
        name=name,
        model=network,
        call=pick_call(network, kernels, extents, shapes_of_kv),
        chat=chat,
        deltas=deltas,
        kernels=kernels,
        extents=extents,
        linear_shapes=shapes,
        kv_shapes=shapes_of_kv,
        vocab_size=config.vocab_size,
        max_context_tokens=int(getattr(config, "max_position_embeddings", 0) or 4096),
        dtype=dtype,
        device=device,
        weights=weights,
        pending=pending,
    )


def _pick_kernels(
    network: Any, watched: Watched, shapes: Iterable[AttentionShape], wait: bool
) -> tuple[Kernels, Pending | None]:
    """The fastest for a model's type and device; those that have to be compiled first are waited for, or pending."""
    if network.device.type == "cuda":
        return cuda_kernels(network.dtype, network.device), None
    started = start_kernels(network.dtype, network.device, (shape.dim for shape in shapes))
    if wait or started.done():
        return started.result(), None
    return TorchKernels(), Pending(started, watched.seen)


def pick_device(device: str | None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}: {error}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not supported: use cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch sees no CUDA device")
    return chosen


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The named type, else bfloat16 where the processor computes it natively, else float32."""
    if dtype is not None:
        if dtype not in _DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if can_pack(torch.bfloat16, device) else torch.float32


def _pick_weights(weights: str | None) -> WeightKind | None:
    if weights is None:
        return None
    if weights != "int8":
        raise ModelError(f"unknown weights {weights!r}: use int8, or leave it out")
    return "int8"


def _read_config(folder: Path) -> Any:
    with _telling(folder):
        config = AutoConfig.from_pretrained(folder)
    _refuse_known(config.get_text_config())
    return config


def _read_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    with _telling(folder):
        return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager")


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Whatever goes wrong as a ModelError."""
    try:
        yield
    except Exception as error:
        # transformers raises many types here (missing files, unknown architectures, broken weights).
        raise ModelError(f"cannot load a causal language model from {folder}: {error}") from error


def _head_dims(config: Any) -> list[int]:
    """The sizes of heads that a configuration speaks of; which ones there are, the probe will show."""
    text = config.get_text_config()
    named = getattr(text, "head_dim", None)
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    return [named] if named else [hidden // heads] if hidden and heads else []


def _refuse_known(config: Any) -> None:
    """Refuse what can be told from the configuration, with a reason in words."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    foreign = kinds - {"full_attention", "sliding_attention", "attention"}
    if foreign:
        raise ModelError(
            f"{config.model_type}: layers of type {', '.join(sorted(foreign))} keep a state that is not "
            "per-token keys and values, so no prefix of theirs can be shared; this engine cannot serve them"
        )
    for name in ("kv_lora_rank", "attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            raise ModelError(f"{config.model_type}: {name}={getattr(config, name)} is not implemented")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder; this engine serves decoder-only models")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{config.model_type}: bidirectional attention has no reusable prefix")


@torch.inference_mode()
def _probe(network: Any, config: Any, watched: Watched) -> dict[int, AttentionShape]:
    """Run a few tokens as transformers has them, then with our attention and norms; refuse the model if they differ.

    Returns how each layer attends, and notes what the watched ones did.

    This finds what no list of architectures can: layers that do not call the attention function, arguments that it
    does not implement, a plan that is not passed through.
    """
    ids = probe_tokens(network)
    with watched.watching():
        reference = _logits(network, ids)
    fuse_norms(network)
    network.set_attn_implementation(NAME)
    try:
        pool = ProbePool()
        segment = RowSegment(row=0, count=len(ids), position=0, slot=0, seen=())
        plan = AttentionPlan((segment,), network.dtype, network.device, len(ids))
        ours = _logits(network, ids, midstream_plan=ForwardPlan(plan, pool, TorchKernels()))
    except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(f"{config.model_type} cannot be served: {error}") from error
    missing = set(range(config.num_hidden_layers)) - set(pool.shapes)
    if missing:
        raise ModelError(
            f"{config.model_type} cannot be served: layers {sorted(missing)} do not use the shared attention "
            "function (recurrent state, or an attention of their own)"
        )
    difference = float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-6))
    if not difference <= _PROBE_TOLERANCE[network.dtype]:
        raise ModelError(
            f"{config.model_type} cannot be served: its logits differ by {difference:.1e} (relative) from "
            "transformers' own; its attention does something that this engine does not implement"
        )
    return pool.shapes


def _logits(network: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    positions = torch.arange(len(ids), device=ids.device)[None]
    output = network(input_ids=ids[None], position_ids=positions, use_cache=False, **kwargs)
    logits: Tensor = output.logits[0].float()
    return logits
