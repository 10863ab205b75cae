"""The engine: continuous batching of base, LoRA and aLoRA rows over one shared KV cache.

Empty on purpose: the tree and the scheduler are imported without torch.
"""
