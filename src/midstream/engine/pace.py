"""How much prefill a step may hold, for somebody may come and wait for its end: by time, from what steps have cost."""

from __future__ import annotations

# A forward of at least so many tokens counts as prefill; shorter ones measure something else.
_PREFILL_ROWS = 32
# Even where a token is slow, or the first forward was: fewer rows would leave the products idle.
_LEAST_TOKENS = 32
_WEIGHT = 0.2


class Pace:
    """`target_s`: how long a step with a long prefill may take."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self.seconds_per_token: float | None = None

    def note(self, rows: int, seconds: float) -> None:
        """A forward of `rows` tokens took so long. Kept as a moving mean: a token costs more the longer its context."""
        if rows < _PREFILL_ROWS:
            return
        share = seconds / rows
        mean = self.seconds_per_token
        self.seconds_per_token = share if mean is None else (1 - _WEIGHT) * mean + _WEIGHT * share

    def tokens(self, most: int) -> int:
        """Tokens of long prefills that fit a step, at most `most`."""
        if not self.seconds_per_token:
            return most
        return min(most, max(_LEAST_TOKENS, int(self._target_s / self.seconds_per_token)))
