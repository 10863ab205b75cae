"""Tiny models gain nothing from threads, and on a busy machine the threads wait for one another."""

import os

import torch

torch.set_num_threads(1)

# Where there is no card, Triton's programs are interpreted; Triton reads this when it is imported, whoever does that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
