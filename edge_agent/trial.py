"""When a bundle on trial is committed or given up: no clock, time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from wire.messages import RolloutOffer


class Verdict(Enum):
    """How a trial stands."""

    OPEN = "open"
    PASSED = "passed"
    EXPIRED = "expired"


@dataclass(slots=True)
class TrialWatch:
    """Counts good steps and connected seconds; times are monotonic seconds."""

    offer: RolloutOffer
    began_s: float
    good_steps: int = 0
    soaked_s: float = 0.0
    _connected_since_s: float | None = None

    def connected(self, now_s: float) -> None:
        """The device can be reached: the soak goes on."""
        if self._connected_since_s is None:
            self._connected_since_s = now_s

    def disconnected(self, now_s: float) -> None:
        """The soak waits."""
        if self._connected_since_s is not None:
            self.soaked_s += now_s - self._connected_since_s
            self._connected_since_s = None

    def verdict(self, now_s: float) -> Verdict:
        """Committed after the good steps or the soak, whichever the offer names and is first."""
        offer = self.offer
        soaked_s = self.soaked_s
        if self._connected_since_s is not None:
            soaked_s += now_s - self._connected_since_s
        by_steps = offer.good_steps > 0 and self.good_steps >= offer.good_steps
        by_soak = offer.soak_s > 0 and soaked_s >= offer.soak_s
        if by_steps or by_soak or not (offer.good_steps or offer.soak_s):
            return Verdict.PASSED
        if offer.campaign and now_s - self.began_s >= offer.commit_limit_s:
            return Verdict.EXPIRED
        return Verdict.OPEN
