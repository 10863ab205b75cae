"""Settings. Few, frozen, each with a unit in its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

KVDtype = Literal["int8"]
Key = Annotated[SecretStr, Field(min_length=1)]


class EngineConfig(BaseModel):
    """How much memory and how many tokens the engine may use.

    `kv_budget_bytes` is the size of the KV pool; None takes 512 MiB or one full context, whichever is larger, and at
    most a quarter of the free memory. `kv_dtype` "int8" rounds keys and values to eight bits, so that it holds nearly
    twice as many tokens as of bfloat16; None keeps them as the model computes them. A long prefill is cut into chunks
    that take some `prefill_step_s`, so that nobody who comes meanwhile waits longer; `max_step_tokens` bounds the
    tokens of one forward. `max_running_sequences` counts branches: a request with n = 4 has four.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_budget_bytes: int | None = Field(default=None, gt=0)
    kv_dtype: KVDtype | None = None
    max_context_tokens: int | None = Field(default=None, gt=0)
    max_step_tokens: int = Field(default=512, ge=1)
    prefill_step_s: float = Field(default=0.1, gt=0.0)
    max_running_sequences: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
    adapter_budget_bytes: int = Field(default=2 * 1024**3, gt=0)


# Settings of the embedded engine alone, and those that whoever loads a model has too.
_ENGINE = frozenset({"weights", "device", "kv", "max_queued"})
_MODEL = frozenset({"dtype", "kv_mib", "max_context_tokens"})


class ServerConfig(BaseModel):
    """What `midstream serve` may be told. Each field's description is the help of its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="smollm2-135m-instruct", description="Known name, Hugging Face folder or hub id, or GGUF file."
    )
    served_name: str | None = Field(
        default=None, description="The base model's name in requests; default: the model's own."
    )
    adapters: tuple[str, ...] = Field(
        default=(), description="Adapter folder, or NAME=FOLDER, to load at the start; repeatable."
    )
    backend: str | None = Field(
        default=None,
        description="vllm: start vLLM and serve in front of it; or the address of a running server (vLLM, midstream); "
        "default: the engine in this process.",
    )
    backend_key: Key | None = Field(default=None, description="API key of the server at --backend.")
    vllm_python: Path | None = Field(
        default=None, description="Interpreter of the environment that has vLLM; default: wherever one is found."
    )
    vllm_args: tuple[str, ...] = Field(
        default=(), description="Further argument for vLLM, such as --tensor-parallel-size=2; repeatable."
    )
    library: bool = Field(default=True, description="Load the trained adapters that the library has for the model.")
    docs: Path | None = Field(
        default=None, description="Documents that flows search: a folder, or a .jsonl, .md or .txt file."
    )
    dtype: str | None = Field(
        default=None, description="float32, bfloat16 or float16; default: what the processor does natively."
    )
    weights: str | None = Field(
        default=None, description="int8: the linear layers' weights rounded to eight bits; default: as the model's."
    )
    device: str | None = Field(default=None, description="cpu or cuda; default: cuda where there is one.")
    kv_mib: int | None = Field(
        default=None, gt=0, description="Memory of the KV cache in MiB; default: one context, at least 512."
    )
    kv: KVDtype | None = Field(
        default=None, description="int8: keys and values rounded to eight bits; default: as the model computes them."
    )
    max_context_tokens: int | None = Field(
        default=None, gt=0, description="Longest prompt with its answer; default: the model's."
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    tls_cert: Path | None = Field(
        default=None, description="Certificate file (PEM); with --tls-key, the server speaks HTTPS."
    )
    tls_key: Path | None = Field(default=None, description="Private key file (PEM) of the certificate.")

    api_keys: tuple[Key, ...] = Field(
        default=(), description="Key that clients must send as a bearer token; repeatable."
    )
    admin_key: Key | None = Field(
        default=None, description="Key that may load and unload adapters; without one, nobody may."
    )
    adapter_dir: Path | None = Field(
        default=None, description="The only folder from which adapters are loaded while serving."
    )
    max_adapter_mib: int = Field(
        default=512, gt=0, description="Largest adapter folder that is loaded while serving, in MiB."
    )
    isolate_cache: bool = Field(default=False, description="Never reuse KV across API keys.")

    max_body_kib: int = Field(default=2048, gt=0, description="Largest request body, in KiB.")
    max_queued: int = Field(default=256, ge=1, description="Requests that may wait; more are refused with 429.")
    max_streams_per_key: int = Field(default=256, ge=1, description="Requests that one key may have open at a time.")
    default_max_tokens: int = Field(default=1024, ge=1, description="Longest answer where a request names none.")
    request_timeout_s: float = Field(default=300.0, gt=0, description="A request that takes longer ends with 504.")
    stall_timeout_s: float = Field(
        default=30.0, gt=0, description="A client that sends no whole body or reads nothing for so long is dropped."
    )
    shutdown_timeout_s: float = Field(
        default=30.0, gt=0, description="Running requests may finish for so long after SIGTERM."
    )

    log_file: Path | None = Field(default=None, description="Write logs (JSON lines) here; default: standard error.")
    log_text: bool = Field(
        default=False, description="Log prompts and answers too. Off: no log holds a conversation's text."
    )
    playground: bool = Field(default=True, description="Serve the playground page at /.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_backend()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.isolate_cache and not self.api_keys:
            raise ValueError("isolate_cache needs api_keys to tell callers apart")
        for name in ("tls_cert", "tls_key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        if self.docs is not None and not self.docs.exists():
            raise ValueError(f"docs: there is no file or folder {self.docs}")
        if self.adapter_dir is not None and not self.adapter_dir.is_dir():
            raise ValueError(f"adapter_dir: there is no folder {self.adapter_dir}")
        if self.log_file is not None and not self.log_file.parent.is_dir():
            raise ValueError(f"log_file: there is no folder {self.log_file.parent}")
        return self

    def _check_backend(self) -> None:
        """What the backend in use would not do anything with is refused, not ignored."""
        elsewhere = self.backend not in (None, "vllm")
        if self.backend is not None and elsewhere and not self.backend.startswith(("http://", "https://")):
            raise ValueError(f"backend is vllm or an address (http://...), not {self.backend!r}")
        useless = {
            "the server at --backend decides that itself": _ENGINE | _MODEL if elsewhere else set(),
            "vLLM has no such setting": _ENGINE if self.backend == "vllm" else set(),
            "it needs --backend with an address": set() if elsewhere else {"backend_key"},
            "it needs --backend vllm": {"vllm_python", "vllm_args"} if self.backend != "vllm" else set(),
        }
        for reason, names in useless.items():
            given = sorted(name for name in names if getattr(self, name) != type(self).model_fields[name].default)
            if given:
                raise ValueError(f"{', '.join(given)}: {reason}; leave it out")

    def engine(self) -> EngineConfig:
        """The engine's part of it."""
        return EngineConfig(
            kv_budget_bytes=None if self.kv_mib is None else self.kv_mib * 1024**2,
            kv_dtype=self.kv,
            max_context_tokens=self.max_context_tokens,
            max_queued_requests=self.max_queued,
        )
