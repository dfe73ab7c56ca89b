"""Tells a lasting change of a device's speed from outliers: Page's cumulative sums.

Each observation gives the logarithm of its seconds over those expected. What exceeds an allowance
is added up, in both directions; a sum that falls below 0 starts anew, and one that reaches a limit
means that the speed has changed since it started. A single observation counts no more than a
factor of 4, so that it takes three to reach the limit: one or two outliers, however large, never
do. A change by 10 is noticed after 3 observations, by 3 after 4, by 2 after about 8.

Source: Page, Biometrika 41 (1954), 100-115. Pure: no clock, no randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_ALLOWANCE = math.log(1.25)
_MOST_OF_ONE = math.log(4.0)
_LIMIT = 2.9 * (_MOST_OF_ONE - LEAST_ALLOWANCE)


@dataclass(frozen=True, slots=True)
class SpeedWatch:
    """Sums of evidence that the device has become slower or faster, and how old they are."""

    slower: float = 0.0
    slower_since: int = 0
    faster: float = 0.0
    faster_since: int = 0

    @property
    def is_suspicious(self) -> bool:
        """Whether a good part of the evidence for a change is there."""
        return max(self.slower, self.faster) > _LIMIT / 3

    def observe(self, above: float, below: float, allowance: float) -> SpeedWatch:
        """Take an observation: log of seconds over the most, and over the least, that is expected.

        allowance: of the logarithm, at least ``LEAST_ALLOWANCE``; larger for devices that vary.
        """
        slower = _add(self.slower, above - allowance, allowance)
        faster = _add(self.faster, -below - allowance, allowance)
        return SpeedWatch(
            max(slower, 0.0),
            self.slower_since + 1 if slower > 0 else 0,
            max(faster, 0.0),
            self.faster_since + 1 if faster > 0 else 0,
        )

    @property
    def changed_since(self) -> int:
        """How many of the last observations are of the new speed; 0 while nothing has changed."""
        if max(self.slower, self.faster) < _LIMIT:
            return 0
        return self.slower_since if self.slower >= self.faster else self.faster_since

    def state(self) -> list[float]:
        """As JSON values."""
        return [self.slower, self.slower_since, self.faster, self.faster_since]

    @classmethod
    def from_state(cls, state: list[float]) -> SpeedWatch:
        """What ``state`` was taken of."""
        slower, slower_since, faster, faster_since = state
        return cls(slower, int(slower_since), faster, int(faster_since))


def _add(total: float, excess: float, allowance: float) -> float:
    """An observation at the old speed halves what has been gathered: spikes are not for good."""
    if excess <= 0:
        return total / 2 + excess
    return total + min(excess, _MOST_OF_ONE - allowance)
