"""The adapters that requests may name: loading, pinning, and eviction by memory while running requests keep theirs."""

from __future__ import annotations

import difflib
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from midstream.errors import AdapterError, AdapterNotFound
from midstream.types import AdapterInfo

if TYPE_CHECKING:
    from midstream.adapters.weights import Adapter


class AdapterRegistry:
    """Named adapters within `budget_bytes`, least recently used first to go. Used by one thread alone.

    An adapter that is removed, replaced or evicted takes no new requests; its memory counts until the last request
    that uses it has released it. `on_evict` is told of each adapter that memory pressure put out.
    """

    def __init__(self, budget_bytes: int, on_evict: Callable[[Adapter], None] | None = None) -> None:
        self._budget = budget_bytes
        self._on_evict = on_evict
        self._named: OrderedDict[str, Adapter] = OrderedDict()
        self._pinned: set[str] = set()
        self._uses: Counter[Adapter] = Counter()

    @property
    def used_bytes(self) -> int:
        """Bytes of the named adapters and of the detached ones that are still in use."""
        return sum(adapter.size_bytes for adapter in {*self._named.values(), *self._uses})

    def add(self, adapter: Adapter, *, pin: bool = False) -> Adapter | None:
        """Register an adapter and return the one of the same name that it replaces, if any.

        Evicts unused ones where memory asks for it. One of the same content and origin is kept as it is, and the
        name stays pinned if it was. Raises AdapterError with the numbers, and changes nothing, when it cannot fit.
        """
        name = adapter.spec.name
        old = self._named.get(name)
        if old is not None and old.digest == adapter.digest and old.spec == adapter.spec:
            self._named.move_to_end(name)
            self.pin(name, pin or name in self._pinned)
            return None
        evicted = [self._drop(victim) for victim in self._victims(adapter, replaced=old)]
        self._named[name] = adapter
        self._named.move_to_end(name)
        self.pin(name, pin or name in self._pinned)
        if self._on_evict is not None:
            for victim in evicted:
                self._on_evict(victim)
        return old

    def remove(self, name: str) -> None:
        """Take an adapter out; requests that use it keep it. Raises AdapterNotFound."""
        self.get(name)
        self._drop(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter from eviction, or no longer. Raises AdapterNotFound."""
        self.get(name)
        (self._pinned.add if pinned else self._pinned.discard)(name)

    def get(self, name: str) -> Adapter:
        """The adapter of that name. Raises AdapterNotFound, which lists what there is."""
        adapter = self._named.get(name)
        if adapter is None:
            loaded = ", ".join(sorted(self._named)) or "none"
            close = difflib.get_close_matches(name, list(self._named), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise AdapterNotFound(f"no adapter {name!r} is loaded (loaded: {loaded}){hint}")
        return adapter

    def holds(self, adapter: Adapter) -> bool:
        """Whether this very adapter takes requests under its name."""
        return self._named.get(adapter.spec.name) is adapter

    def acquire(self, name: str) -> Adapter:
        """The adapter of that name, kept in memory until `release`."""
        adapter = self.get(name)
        self._named.move_to_end(name)
        self._uses[adapter] += 1
        return adapter

    def release(self, adapter: Adapter) -> None:
        """End one use."""
        if self._uses[adapter] <= 0:
            raise RuntimeError(f"adapter {adapter.spec.name} is released more often than acquired")
        self._uses[adapter] -= 1
        if not self._uses[adapter]:
            del self._uses[adapter]

    def infos(self) -> tuple[AdapterInfo, ...]:
        """The named adapters, by name. Safe in any thread: it looks at a copy."""
        return tuple(self._info(adapter) for _, adapter in sorted(self._named.copy().items()))

    def info(self, name: str) -> AdapterInfo | None:
        """One adapter, None where there is none of that name. Safe in any thread."""
        adapter = self._named.get(name)
        return None if adapter is None else self._info(adapter)

    def check_integrity(self) -> None:
        """Raise AssertionError where the counts do not add up."""
        if any(name != adapter.spec.name for name, adapter in self._named.items()):
            raise AssertionError("an adapter is kept under another's name")
        if self.used_bytes > self._budget:
            raise AssertionError(f"{self.used_bytes} bytes are used of {self._budget}")
        if any(count <= 0 for count in self._uses.values()):
            raise AssertionError("an adapter without uses is counted as used")
        if not self._pinned <= set(self._named):
            raise AssertionError("an adapter is pinned that is not there")

    def _victims(self, adapter: Adapter, *, replaced: Adapter | None) -> list[str]:
        """Names to evict so that `adapter` fits."""
        free = self._budget - self.used_bytes
        if self._uses[adapter]:  # it comes back while requests still use it: its memory counts already
            free += adapter.size_bytes
        if replaced is not None and not self._uses[replaced]:
            free += replaced.size_bytes
        victims: list[str] = []
        for name, other in self._named.items():
            if free >= adapter.size_bytes:
                break
            if other is replaced or name in self._pinned or self._uses[other]:
                continue
            victims.append(name)
            free += other.size_bytes
        if free < adapter.size_bytes:
            raise AdapterError(
                f"adapter {adapter.spec.name} needs {adapter.size_bytes} bytes; of the budget of {self._budget} only "
                f"{max(0, free)} can be freed (the rest is pinned or in use): unload one, or raise the budget"
            )
        return victims

    def _drop(self, name: str) -> Adapter:
        self._pinned.discard(name)
        return self._named.pop(name)

    def _info(self, adapter: Adapter) -> AdapterInfo:
        name = adapter.spec.name
        return AdapterInfo(
            name=name,
            kind=adapter.spec.kind,
            digest=adapter.digest,
            path=adapter.spec.path,
            invocation_tokens=adapter.spec.invocation_tokens,
            invocation_text=adapter.spec.invocation_text,
            rank=adapter.rank,
            size_bytes=adapter.size_bytes,
            pinned=name in self._pinned,
            contract=adapter.spec.contract,
            metadata={**adapter.spec.metadata, "reads": adapter.spec.reads},
        )
