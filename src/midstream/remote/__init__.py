"""A Backend over any OpenAI-compatible server: midstream's own, or vLLM. Needs neither torch nor transformers."""

from midstream.remote.backend import RemoteBackend

__all__ = ["RemoteBackend"]
