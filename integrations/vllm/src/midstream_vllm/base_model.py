"""The base model's linear layers, by the names that PEFT gives them, without its weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import nn

logger = logging.getLogger("vllm.midstream")


def linear_shapes(model_config: Any) -> dict[str, tuple[int, int]] | None:
    """(out, in) of each linear layer of a vLLM model's configuration, by its path in transformers.

    None where transformers cannot build the architecture: then an adapter is checked against its own weights alone.
    """
    config = model_config.hf_config
    for name in [*(config.architectures or ()), "AutoModelForCausalLM"]:
        kind = getattr(transformers, name, None)
        if kind is None:
            continue
        build = kind.from_config if name.startswith("Auto") else kind._from_config
        try:
            # On the meta device a model has shapes and no memory.
            with torch.device("meta"):
                model = build(config)
        except Exception as error:  # a model's code may raise anything; another class may do
            logger.debug("midstream: %s cannot be built: %s", name, error)
            continue
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        return {path: (module.out_features, module.in_features) for path, module in linears.items()}
    logger.warning(
        "midstream: transformers cannot build %s, so adapters are not checked against the base model's layers",
        config.architectures,
    )
    return None
