"""`/v1/models`, and loading and unloading adapters while serving (vLLM's endpoints)."""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse

from midstream.errors import AdapterError, Forbidden
from midstream.server.folders import check_folder
from midstream.server.schemas import LoadAdapterBody, UnloadAdapterBody
from midstream.server.service import Exchange, Service
from midstream.types import AdapterInfo


def routes(service: Service) -> APIRouter:
    """The endpoints of one service."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The base model and the adapters: each is a model name."""
        adapters = [_described(service, info) for info in service.engine.adapter_infos()]
        return {"object": "list", "data": [_base(service), *adapters]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """One model."""
        info = service.adapter_of(name)
        return _base(service) if info is None else _described(service, info)

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(body: LoadAdapterBody, http: HttpRequest) -> str:
        """Load a PEFT folder below the server's adapter folder. Needs the admin key."""
        _require_admin(service, http)
        if service.engine.adapter(body.lora_name) is not None and not body.load_inplace:
            raise AdapterError(f"adapter {body.lora_name} is loaded already: unload it, or send load_inplace=true")
        folder = await asyncio.to_thread(allowed_folder, service, body.lora_path)
        names = (service.model_name, service.engine.model_name)
        await asyncio.to_thread(check_folder, folder, body.lora_name, base_names=names)
        await service.engine.load_adapter(folder, name=body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(body: UnloadAdapterBody, http: HttpRequest) -> str:
        """Take an adapter out; requests that run on it keep it. Needs the admin key."""
        _require_admin(service, http)
        await service.engine.unload_adapter(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    return router


def allowed_folder(service: Service, path: str) -> Path:
    """The folder that `path` names below the adapter folder, with links followed and every file checked.

    Raises Forbidden for all that lies elsewhere, AdapterError for what is missing or too large.
    """
    root = service.config.adapter_dir
    if root is None:
        raise Forbidden("this server loads no adapters while it runs: start it with --adapter-dir")
    if "\0" in path:
        raise AdapterError("lora_path holds a null character")
    base = root.resolve()
    try:
        folder = (base / path).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"adapter folder {path!r} is not there") from error
    if not folder.is_relative_to(base):
        raise Forbidden(f"{path!r} lies outside of the server's adapter folder")
    if not folder.is_dir():
        raise AdapterError(f"{path!r} is no folder")
    size = 0
    for entry in folder.iterdir():
        if not entry.resolve().is_relative_to(base):
            raise Forbidden(f"{path!r} holds a link that leads out of the server's adapter folder: {entry.name}")
        size += entry.stat().st_size if entry.is_file() else 0
    limit = service.config.max_adapter_mib
    if size > limit * 1024**2:
        raise AdapterError(f"{path!r} is larger than the limit of {limit} MiB")
    return folder


def _require_admin(service: Service, http: HttpRequest) -> None:
    if service.config.admin_key is None:
        raise Forbidden("adapters cannot be changed while serving: start the server with --admin-key")
    if not Exchange.of(http).caller.admin:
        raise Forbidden("loading and unloading adapters needs the admin key")


def _base(service: Service) -> dict[str, Any]:
    return _model(service, service.model_name, parent=None, adapter=None)


def _described(service: Service, info: AdapterInfo) -> dict[str, Any]:
    adapter = {
        "kind": info.kind,
        "rank": info.rank,
        "digest": info.digest,
        "invocation_text": info.invocation_text,
        "invocation_tokens": list(info.invocation_tokens),
        "size_bytes": info.size_bytes,
        "pinned": info.pinned,
        "contract": info.contract,
        "metadata": {key: _without_path(value) for key, value in info.metadata.items()},
    }
    return _model(service, info.name, parent=service.model_name, adapter=adapter)


def _without_path(value: Any) -> Any:
    """A folder's name alone, where an adapter's configuration names a folder of the machine it was trained on."""
    named = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
    return PureWindowsPath(value).name if named else value


def _model(service: Service, name: str, *, parent: str | None, adapter: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "midstream",
        "root": name,
        "parent": parent,
        "max_model_len": service.engine.max_context_tokens,
        "adapter": adapter,
    }
