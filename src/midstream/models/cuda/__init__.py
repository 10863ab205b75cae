"""The model's kernels on one NVIDIA GPU, and its small steps as CUDA graphs."""
