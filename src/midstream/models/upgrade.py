"""A model that runs on torch's kernels goes over to compiled ones, one piece after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from midstream.models.direct import pick_call
from midstream.models.fuse import Seen, close, stack_layers, tried
from midstream.models.kernels import Kernels, TorchKernels
from midstream.models.layer import FusedLayer
from midstream.models.linear import AdapterLinear
from midstream.models.load import LoadedModel
from midstream.models.products import Product

Change = Callable[[], None]

log = logging.getLogger(__name__)


def changes(loaded: LoadedModel, kernels: Kernels) -> Iterator[Change]:
    """What is to be done to the model, in this order and between two of its forwards.

    The model gives what it gave after each of them, so they may stop anywhere and begin anew. What takes long, to lay
    weights out, is done here when a change is asked for: in the caller's thread, beside forwards, which never see it.
    The weights of one layer at most are held twice.
    """
    pending = loaded.pending
    if pending is None:
        return
    if type(kernels) is TorchKernels:  # there are no others
        yield partial(setattr, loaded, "pending", None)
        return
    layers = {path: module for path, module in loaded.model.named_modules() if isinstance(module, FusedLayer)}
    for path, layer in layers.items():
        if layer.kernels is not kernels:
            yield partial(_move, layer, kernels, _repacked(layer.linears, kernels), pending.seen[path])
    of_layers = {linear for layer in layers.values() for linear in layer.linears}
    for module in loaded.model.modules():
        if isinstance(module, AdapterLinear) and module not in of_layers and module.kernels is not kernels:
            yield partial(module.use, kernels, *_repacked([module], kernels))
    yield partial(_finish, loaded, kernels, list(layers.values()))


@torch.inference_mode()
def _repacked(linears: Sequence[AdapterLinear], kernels: Kernels) -> list[Product]:
    return [kernels.repacked(linear.product) for linear in linears]


def _move(layer: FusedLayer, kernels: Kernels, products: Sequence[Product], seen: Seen) -> None:
    """A layer that then gives other numbers stays as it was."""
    before, old = tried(layer, seen), (layer.kernels, [linear.product for linear in layer.linears])
    layer.use(kernels, products)
    try:
        same = close(tried(layer, seen), before)
    except RuntimeError:
        same = False
    if not same:
        log.warning("layer %d stays on torch's kernels: the compiled ones give other numbers", layer.index)
        layer.use(*old)


@torch.inference_mode()
def _finish(loaded: LoadedModel, kernels: Kernels, layers: Sequence[FusedLayer]) -> None:
    """What depends on all pieces."""
    moved = all(layer.kernels is kernels for layer in layers)
    stack_layers(loaded.model, kernels)
    loaded.kernels = kernels
    loaded.extents = moved and all(kernels.supports(dim) for _, dim in loaded.kv_shapes)
    loaded.call = pick_call(loaded.model, kernels, loaded.extents, loaded.kv_shapes)
    loaded.pending = None
    log.info("the compiled kernels are in use")
