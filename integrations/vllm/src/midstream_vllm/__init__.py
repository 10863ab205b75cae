"""Activated LoRA for stock vLLM, as a general plugin: vLLM calls `register` in each of its processes."""

__all__ = ["__version__", "register"]

__version__ = "0.1.0"


def register() -> None:
    """Teach this process's vLLM. Raises UnknownVllm, and changes nothing, where it is not one that can be taught."""
    # vLLM is imported only now: whoever asks for the version need not have it.
    from midstream_vllm.install import install

    install()
