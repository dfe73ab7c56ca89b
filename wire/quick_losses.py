"""Connections that end soon after they were accepted: what two clients with one id look like.

Mosquitto 2.0.11 and rumqttd close the older one without MQTT 5's reason (session taken over), so
that a pattern is all that a client has to go by. Pure: time is an argument.
"""

from __future__ import annotations

QUICK_S = 10.0  # two that push each other off come back within seconds
SUSPICIOUS_LOSSES = 3


class QuickLosses:
    """Counts them, as long as they come in a row."""

    def __init__(self) -> None:
        self._accepted_s: float | None = None
        self._in_a_row = 0

    def accepted(self, now_s: float) -> None:
        """The broker accepted us."""
        self._accepted_s = now_s

    def lost(self, now_s: float) -> bool:
        """An accepted connection ended; tell whether it looks as if another client had our id."""
        accepted_s, self._accepted_s = self._accepted_s, None
        if accepted_s is None:
            return False
        self._in_a_row = self._in_a_row + 1 if now_s - accepted_s < QUICK_S else 0
        return self._in_a_row >= SUSPICIOUS_LOSSES
