"""Who owns which token: the rules that do not depend on vLLM.

The KV at a position depends on the tokens up to it and on who computed each of them: the base model before the
activation index, the adapter, known by its digest, from it on. A plain LoRA's activation index is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# Where a request's activation index travels, from the front to the engine core and to the workers.
INDEX_FIELD = "midstream_activation_index"
BASE = 0  # the adapter number that vLLM gives to tokens of the base model
_KINDS = ("alora", "lora")


class Owner(NamedTuple):
    """The adapter of a request, and the first position that it owns."""

    digest: str
    start: int


class HasPath(Protocol):
    lora_path: str


class HasExtra(Protocol):
    extra_args: dict[str, Any] | None


def kept_name(kind: str, digest: str) -> str:
    """The folder name of a kept adapter; that of an engine's adapter says all that needs to be known of it."""
    return f"{kind}-{digest}"


def read_kept(path: str) -> tuple[str, str] | None:
    """Kind and digest of a kept adapter's folder; None for any other."""
    kind, _, digest = PurePath(path).name.partition("-")
    return (kind, digest) if kind in _KINDS and len(digest) == 64 else None


def owner_of(lora_request: HasPath | None, params: HasExtra | None) -> Owner | None:
    """The owner of a request as the engine has it: None for the base model, and for adapters that were never resolved.

    Raises RuntimeError for an aLoRA without an activation index, which the front of this plugin always gives.
    """
    kept = None if lora_request is None else read_kept(lora_request.lora_path)
    if kept is None:
        return None
    kind, digest = kept
    if kind == "lora":
        return Owner(digest, 0)
    index = ((params.extra_args if params is not None else None) or {}).get(INDEX_FIELD)
    if index is None:
        raise RuntimeError("an activated LoRA's request came without its activation index; is the plugin in the front?")
    return Owner(digest, index)


def block_keys(keys: tuple[Any, ...] | None, stock: list[Any], owner: Owner | None, end: int) -> tuple[Any, ...] | None:
    """The extra keys of a block of KV that ends before position `end`.

    `keys` are vLLM's, `stock` those among them that stand for the adapter: its name, where ours is the digest. A block
    that ends at the activation index or before is the base model's, whoever asks for it.
    """
    if owner is None:
        return keys
    others = tuple(key for key in keys or () if key not in stock)
    if end <= owner.start:
        return others or None
    return (_like(stock, owner.digest), *others)


def owned_tokens(
    token_map: tuple[int, ...], scheduled: NDArray[Any], computed: NDArray[Any], starts: Mapping[int, int]
) -> tuple[int, ...]:
    """vLLM's adapter number of each token of a step, with those before the activation index given to the base model.

    `scheduled`: tokens of each row in this step; `computed`: the position of its first one; `starts`: activation
    indices by row, of the rows that have one.
    """
    early = {row: min(int(scheduled[row]), start - int(computed[row])) for row, start in starts.items()}
    if not any(count > 0 for count in early.values()):
        return token_map
    owned = np.array(token_map)
    ends = np.cumsum(scheduled)
    for row, count in early.items():
        first = int(ends[row]) - int(scheduled[row])
        owned[first : first + max(count, 0)] = BASE
    return tuple(owned.tolist())


def split_prompt(length: int, cached: int, start: int | None) -> dict[tuple[str, str], int]:
    """Tokens of a prompt by (owner, what): owner "base" or "adapter", what "prompt" or "cached"."""
    base = length if start is None else min(start, length)
    base_cached = min(cached, base)
    return {
        ("base", "prompt"): base,
        ("adapter", "prompt"): length - base,
        ("base", "cached"): base_cached,
        ("adapter", "cached"): cached - base_cached,
    }


def _like(stock: list[Any], digest: str) -> Any:
    """The digest in the form in which this vLLM writes an adapter's key, so that what reads its events still can."""
    return ("lora", digest) if stock and isinstance(stock[0], tuple) else digest
