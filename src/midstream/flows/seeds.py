"""Seeds of a flow's requests: each has its own, found from the run's."""

from __future__ import annotations

import hashlib
import json


def derive(seed: int, *path: int | str) -> int:
    """The seed of the request that `path` names, below 2**63 and the same in every process."""
    told = json.dumps([seed, *path]).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1
