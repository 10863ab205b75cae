"""Kernels in C++ for what stands between a decode step's matrix products, compiled where they are used."""
