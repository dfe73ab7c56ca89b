"""The devices of a campaign, counted by wave and phase as they change. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from coordinator.rollout.records import (
    FAILED_PHASES,
    TERMINAL_PHASES,
    UPDATED_PHASES,
    DeviceEntry,
    DevicePhase,
)


class Ledger:
    """Entries by device. Counting is done when an entry changes, so that asking costs nothing."""

    def __init__(self, entries: Iterable[DeviceEntry]) -> None:
        self._entries: dict[str, DeviceEntry] = {}
        self._members: dict[DevicePhase, set[str]] = {phase: set() for phase in DevicePhase}
        self._counts: Counter[tuple[int, DevicePhase]] = Counter()
        self._changed: set[str] = set()
        for entry in entries:
            self.put(entry)
        self._changed.clear()

    def __getitem__(self, device: str) -> DeviceEntry:
        return self._entries[device]

    def __contains__(self, device: object) -> bool:
        return device in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[DeviceEntry]:
        return iter(self._entries.values())

    def get(self, device: str) -> DeviceEntry | None:
        """The entry, if the device belongs to the campaign."""
        return self._entries.get(device)

    def put(self, entry: DeviceEntry) -> None:
        """Add or replace an entry."""
        old = self._entries.get(entry.device)
        if old is not None:
            self._members[old.phase].discard(old.device)
            self._counts[old.wave, old.phase] -= 1
        self._entries[entry.device] = entry
        self._members[entry.phase].add(entry.device)
        self._counts[entry.wave, entry.phase] += 1
        self._changed.add(entry.device)

    def take_changed(self) -> list[DeviceEntry]:
        """Entries that changed since the last call, to be written down."""
        changed = [self._entries[device] for device in sorted(self._changed)]
        self._changed.clear()
        return changed

    def in_phases(self, phases: Iterable[DevicePhase]) -> list[DeviceEntry]:
        """Entries in one of these phases, in the campaign's order."""
        found = [self._entries[name] for phase in phases for name in self._members[phase]]
        return sorted(found, key=lambda entry: (entry.wave, entry.rank))

    def count(self, phases: Iterable[DevicePhase], wave: int | None = None) -> int:
        """How many are in one of these phases, in one wave or in all."""
        if wave is None:
            return sum(len(self._members[phase]) for phase in phases)
        return sum(self._counts[wave, phase] for phase in phases)

    def counts(self) -> dict[str, int]:
        """How many are in each phase that anybody is in."""
        return {phase.value: len(names) for phase, names in self._members.items() if names}

    def size(self, wave: int) -> int:
        """Devices of one wave."""
        return self.count(DevicePhase, wave)

    def failed(self, wave: int) -> int:
        return self.count(FAILED_PHASES, wave)

    def reached(self, wave: int) -> int:
        """Devices of one wave that are not known to be out of reach."""
        return self.size(wave) - self.count([DevicePhase.UNREACHABLE], wave)

    def is_over(self, up_to_wave: int) -> bool:
        """Whether every device up to this wave has come to an end."""
        going_on = frozenset(DevicePhase) - TERMINAL_PHASES
        return not any(self.count(going_on, wave) for wave in range(up_to_wave + 1))

    def updated(self) -> int:
        """Devices that use the bundle, on trial or for good."""
        return self.count(UPDATED_PHASES)

    def uses_bundle(self, device: str) -> bool:
        """Whether the device runs the campaign's bundle, as far as it has said."""
        entry = self._entries.get(device)
        return entry is not None and entry.phase in UPDATED_PHASES
