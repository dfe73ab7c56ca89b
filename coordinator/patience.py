"""How long to wait for devices: deadlines from what was measured, and who sits out. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from statistics import median

from coordinator.planning import PlannedSlot
from wire.settings import Settings

MEDIAN_OVER_STEPS = 50

ExpectedSeconds = Callable[[str, int], float | None]


class DeadlineSettings(Settings, frozen=True, kw_only=True):
    """How long a phase of a step may take.

    ``fixed_s``, or ``factor`` times the running median of the phase or, if that is longer, times
    what the slowest device of the step is known to take; never under ``min_s``; ``first_s``
    while nothing is known. After ``max_misses`` in a row a device sits out until it is heard.
    ``return_grace_s`` is how long an epoch waits at its end for devices that stay away.
    """

    fixed_s: float | None = None
    factor: float = 5.0
    min_s: float = 2.0
    first_s: float = 60.0
    max_misses: int = 3
    return_grace_s: float = 30.0

    def __post_init__(self) -> None:
        if self.fixed_s is not None and not self.fixed_s > 0:
            raise ValueError(f"expected fixed_s > 0, received {self.fixed_s}")
        if not self.factor > 1 or not self.min_s > 0 or not self.first_s > 0:
            raise ValueError("expected factor > 1, min_s > 0 and first_s > 0")
        if self.max_misses < 1 or not self.return_grace_s >= 0:
            raise ValueError("expected max_misses >= 1 and return_grace_s >= 0")


class PhaseClock:
    """Durations of one phase of past steps, and the allowance for the next."""

    def __init__(self, settings: DeadlineSettings, expected_s: ExpectedSeconds) -> None:
        self._settings = settings
        self._expected_s = expected_s
        self.durations_s: deque[float] = deque(maxlen=MEDIAN_OVER_STEPS)

    def allowance_s(self, slots: Iterable[PlannedSlot]) -> float:
        """Seconds that a step with these slots may take in this phase."""
        settings = self._settings
        if settings.fixed_s is not None:
            return settings.fixed_s
        counts: Counter[str] = Counter()
        for slot in slots:
            counts[slot.device] += slot.count
        known_s: list[float] = []
        for device, count in counts.items():
            seconds = self._expected_s(device, count)
            if seconds is None:  # never met: it gets the time of a first step
                return max(settings.first_s, settings.min_s)
            known_s.append(seconds)
        if not self.durations_s:
            return max(settings.first_s, settings.min_s)
        return max(settings.min_s, settings.factor * max(median(self.durations_s), *known_s))


class Attendance:
    """Missed deadlines by device; after too many in a row a device sits out until it is heard.

    A device whose contributions were useless as many times is excluded for the rest of the epoch.
    """

    def __init__(self, settings: DeadlineSettings) -> None:
        self._settings = settings
        self._in_a_row: Counter[str] = Counter()
        self._useless: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.sitting_out: set[str] = set()
        self.excluded: set[str] = set()

    @property
    def out(self) -> set[str]:
        """Devices that nothing is to be planned for."""
        return self.sitting_out | self.excluded

    def miss(self, device: str) -> bool:
        """Count a missed deadline; tell whether the device sits out from now on."""
        self.missed[device] += 1
        self._in_a_row[device] += 1
        if self._in_a_row[device] >= self._settings.max_misses:
            self.sitting_out.add(device)
        return device in self.sitting_out

    def heard(self, device: str) -> bool:
        """The device showed life; tell whether it sat out until now."""
        self._in_a_row[device] = 0
        sat_out = device in self.sitting_out
        self.sitting_out.discard(device)
        return sat_out

    def refuse(self, device: str) -> bool:
        """Count a contribution that came in time and was useless; tell whether it is excluded.

        Being heard does not help here: only a useful contribution or the next epoch does.
        """
        self._useless[device] += 1
        if self._useless[device] >= self._settings.max_misses:
            self.excluded.add(device)
        return device in self.excluded

    def excludes_all(self, devices: AbstractSet[str]) -> bool:
        """Whether each of these devices is excluded: the weights are at fault rather than they."""
        return bool(devices) and devices <= self.excluded

    def useful(self, device: str) -> None:
        """The device's contribution was trained on."""
        self._useless.pop(device, None)

    def recall_all(self) -> None:
        """Give every device that was silent another chance."""
        self.sitting_out.clear()
        self._in_a_row.clear()

    def begin_epoch(self) -> None:
        """Forget who was silent or useless."""
        self.recall_all()
        self.excluded.clear()
        self._useless.clear()
