"""The Triton programs for tests: on a CUDA device where there is one, else in Triton's interpreter (tests/conftest.py).

The interpreter multiplies no bfloat16; on the CPU, float16 stands for it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch's CUDA wheels"
)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float16


def triton_programs() -> Any:
    from midstream.models.cuda.programs.launch import TritonPrograms

    return TritonPrograms()
