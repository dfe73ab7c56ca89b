"""The boot counter: a number that grows with every connection of the device."""

from __future__ import annotations

import time
from pathlib import Path

from edge_agent.files import write_atomically

COUNTER_MARGIN = 3600  # connections by which a counter may have overtaken the clock


class BootCounter:
    """A number that grows with every connection, across restarts.

    Without a usable state directory it cannot: the caller is told at the start.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "boot"
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._value = int(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            # A device set up anew must count on from where it was: one connection a second at
            # the most keeps the clock ahead of any counter.
            self._value = int(time.time())
        except ValueError:
            # An unreadable counter must not stop the device: go on above what it may have been.
            self._value = int(time.time()) + COUNTER_MARGIN

    def next(self) -> int:
        self._value += 1
        write_atomically(self._path, str(self._value).encode())
        return self._value
