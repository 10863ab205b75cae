"""What a server serves: its base model and adapters, as `/v1/models` and local folders describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from midstream.errors import AdapterNotFound, BackendError
from midstream.remote.reply import checked
from midstream.types import AdapterInfo


class _Adapter(BaseModel):
    kind: Literal["lora", "alora"]
    rank: int
    digest: str
    invocation_text: str
    invocation_tokens: tuple[int, ...]
    size_bytes: int = 0
    pinned: bool = False
    contract: str | None = None
    metadata: dict[str, Any] = {}

    def info(self, name: str) -> AdapterInfo:
        """Of the server's folders nothing is known, so the adapter's name stands for its path."""
        return AdapterInfo(name=name, path=name, **dict(self))


class _Entry(BaseModel):
    id: str
    parent: str | None = None
    owned_by: str | None = None
    max_model_len: int | None = None
    adapter: _Adapter | None = None


class _Models(BaseModel):
    data: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """`undescribed` adapters are served, but how they are called is not known; `unserved` ones have a folder here, but
    the server has them not. `ours`: a midstream server. `max_context_tokens`: None where it does not say."""

    base: str
    ours: bool
    adapters: tuple[AdapterInfo, ...]
    undescribed: tuple[str, ...]
    unserved: tuple[str, ...]
    max_context_tokens: int | None

    def find(self, name: str) -> AdapterInfo:
        """The adapter of that name. Raises AdapterNotFound, which says what there is or what is lacking."""
        found = next((info for info in self.adapters if info.name == name), None)
        if found is not None:
            return found
        if name in self.undescribed:
            raise AdapterNotFound(
                f"the server does not say how adapter {name!r} is called: give its PEFT folder to the backend "
                "(adapters=[folder])"
            )
        if name in self.unserved:
            raise AdapterNotFound(
                f"adapter {name!r} has a folder here, but the server does not serve it: load it there"
            )
        known = ", ".join(info.name for info in self.adapters) or "none"
        raise AdapterNotFound(f"no adapter {name!r} is loaded (loaded: {known})")


def read_catalogue(reply: Any, url: str, *, base: str | None, local: Mapping[str, AdapterInfo]) -> Catalogue:
    """The catalogue of a reply to `/v1/models`; `local` describes what the server itself does not."""
    entries = checked(_Models, reply, url).data
    parents = [entry for entry in entries if entry.parent is None]
    if not parents and base is None:
        raise BackendError(f"{url} lists no base model: name one with model=")
    served = [entry for entry in entries if entry.parent is not None]
    infos = {e.id: e.adapter.info(e.id) if e.adapter is not None else local.get(e.id) for e in served}
    return Catalogue(
        base=base or parents[0].id,
        ours=any(entry.owned_by == "midstream" for entry in parents),
        adapters=tuple(info for _, info in sorted(infos.items()) if info is not None),
        undescribed=tuple(sorted(name for name, info in infos.items() if info is None)),
        unserved=tuple(sorted(local.keys() - infos.keys())),
        max_context_tokens=next((entry.max_model_len for entry in parents if entry.max_model_len), None),
    )
