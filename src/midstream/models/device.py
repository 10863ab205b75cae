"""The device of this thread's launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Meanwhile this thread's kernels run on that device: those that torch does not launch go to the thread's current
    one, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
