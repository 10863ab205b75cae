"""Putting fused layers in the place of a model's own, each tried first on what that layer itself computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from midstream.models.attention_plan import AttentionPlan, RowSegment
from midstream.models.deltas import DeltaContext
from midstream.models.fusions import FusedRMSNorm
from midstream.models.kernels import Kernels
from midstream.models.layer import FusedLayer, is_common
from midstream.models.linear import linear_shapes
from midstream.models.pool import AttentionShape, ForwardPlan, KVPool
from midstream.models.products import WeightKind
from midstream.models.stack import FusedStack

# Largest difference from the layer's own output, relative to the largest number in it.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class Seen(NamedTuple):
    """What a layer got and gave in one forward: [1, rows, features] each."""

    given: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    result: Tensor


class Watched:
    """The layers of a model that could be fused, by path, and what each did in a forward."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {path: module for path, module in model.named_modules() if is_common(module)}
        self.seen: dict[str, Seen] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the layers do meanwhile."""
        handles = [
            layer.register_forward_hook(self._hook(path), with_kwargs=True) for path, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            positions = kwargs.get("position_embeddings")
            if len(args) == 1 and positions is not None and isinstance(output, Tensor):
                self.seen[path] = Seen(args[0].clone(), positions, output.clone())

        return note


@torch.inference_mode()
def fuse_layers(
    model: nn.Module,
    watched: Watched,
    shapes: Mapping[int, AttentionShape],
    context: DeltaContext,
    kernels: Kernels,
    kind: WeightKind | None,
) -> dict[str, tuple[int, int]]:
    """Swap each layer whose fused form gives what the layer gave; return the swapped linear layers' (out, in)."""
    swapped: dict[str, tuple[int, int]] = {}
    for path, seen in watched.seen.items():
        layer: Any = watched.layers.pop(path)  # so that no two copies of all weights are alive
        index = layer.self_attn.layer_idx
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if not all(isinstance(norm, FusedRMSNorm) and norm.weight.dtype == seen.given.dtype for norm in norms):
            continue
        fused = FusedLayer(layer, path, index, shapes[index], context, kernels)
        if not _agrees(fused, seen):
            continue
        if kind is not None:  # tried with the weights as they are: rounded ones differ by more than the trial allows
            fused = FusedLayer(layer, path, index, shapes[index], context, kernels, kind)
        swapped |= {f"{path}.{name}": shape for name, shape in linear_shapes(layer).items()}
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], fused)
    return swapped


def stack_layers(model: nn.Module, kernels: Kernels) -> None:
    """Put one module in the place of all layers, where all are fused and the kernels compute them in one call."""
    for path, module in list(model.named_modules()):
        layers = [child for child in module.children() if isinstance(child, FusedLayer)]
        if not isinstance(module, nn.ModuleList) or not layers or len(layers) != len(module):
            continue
        run = kernels.stack(layers)
        if run is not None:
            model.set_submodule(path, nn.ModuleList([FusedStack(layers, run)]))


def _agrees(fused: FusedLayer, seen: Seen) -> bool:
    """Whether the fused layer gives what the layer gave."""
    try:
        return close(tried(fused, seen), seen.result)
    except RuntimeError:  # shapes that only look like the common ones
        return False


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether a layer's output is another's of the same input, but for rounding."""
    return bool((found - expected).abs().max() <= _TOLERANCE[expected.dtype] * expected.abs().max())


@torch.inference_mode()
def tried(fused: FusedLayer, seen: Seen) -> Tensor:
    """What the fused layer gives for what the layer got. Raises RuntimeError where it cannot compute it."""
    given, shape = seen.given, fused.shape
    rows = given.shape[1]
    pool = KVPool([(shape.kv_heads, shape.dim)] * (fused.index + 1), rows, given.dtype, given.device)
    segment = RowSegment(row=0, count=rows, position=0, slot=0, seen=())
    plan = AttentionPlan((segment,), given.dtype, given.device, rows, fused.kernels.supports(shape.dim))
    whole = ForwardPlan(plan, pool, fused.kernels)
    found: Tensor = fused(given.clone(), position_embeddings=seen.position_embeddings, midstream_plan=whole)
    return found
