"""Tiny models gain nothing from threads, and on a busy machine the threads wait for one another."""

import torch

torch.set_num_threads(1)
