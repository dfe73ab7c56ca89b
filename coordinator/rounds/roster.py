"""Who takes part in a run: who is there, who comes in later, who is waited for after a resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from coordinator.patience import Attendance, DeadlineSettings
from coordinator.planning import Member


class Roster:
    """The devices of a run, by id."""

    def __init__(self, settings: DeadlineSettings) -> None:
        self.attendance = Attendance(settings)
        self.members: dict[str, Member] = {}  # ready, those that sit out too
        self._later: dict[str, Member] = {}  # back with other data: from the next epoch on
        self._resumed: dict[str, Member] = {}  # whom a restored plan counts on
        self.expected: frozenset[str] = frozenset()  # after a resume: who to wait for first

    @property
    def active(self) -> dict[str, Member]:
        """Devices that can be planned for."""
        out = self.attendance.out
        return {name: member for name, member in self.members.items() if name not in out}

    @property
    def is_everybody_silent(self) -> bool:
        """Whether nothing can be planned because devices sit out."""
        return bool(self.attendance.sitting_out) and not self.active

    @property
    def is_deserted(self) -> bool:
        """Whether no device is there, now or from the next epoch on."""
        return not self.members and not self._later

    @property
    def is_expecting(self) -> bool:
        """Whether a device that the run resumes with has not come yet."""
        return bool(self.expected - set(self.members) - set(self._later))

    def absent(self, holders: Iterable[str]) -> set[str]:
        """Those that hold untrained samples, or that a resumed run counts on, and are away."""
        return (set(holders) | self.expected) - set(self.active)

    def may_return(self, holders: Iterable[str]) -> set[str]:
        """Those of the holders of untrained samples that may still give them in this epoch."""
        return set(holders) - self.attendance.excluded - set(self._later)

    def admit(self, member: Member) -> bool:
        """A device is there; tell whether a plan would now come out otherwise.

        It does not for a device that a restored plan was made with: that plan goes on as it is.
        """
        name = member.device
        known = self.members.get(name, self._resumed.pop(name, None))
        self.members[name] = member
        self._later.pop(name, None)
        return self.attendance.heard(name) or known != member

    def postpone(self, member: Member) -> None:
        """A device is there with other data than this epoch counts on: let it in with the next."""
        self._later[member.device] = member
        self.members.pop(member.device, None)

    def leave(self, device: str) -> bool:
        """A device is gone; tell whether it took part."""
        self._later.pop(device, None)
        return self.members.pop(device, None) is not None

    def begin_epoch(self) -> None:
        """Let in who waited for it; forget who was silent or useless."""
        self.attendance.begin_epoch()
        self.members |= self._later
        self._later.clear()

    def stop_expecting(self) -> set[str]:
        """A resumed run's devices are there, or their time is over: returns those that are not."""
        gone = set(self.expected) - set(self.members)
        self.expected = frozenset()
        self._resumed.clear()
        return gone

    # Checkpoints

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        known = self._resumed | self.members
        return {
            "members": [
                [name, list(member.label_counts), member.max_batch]
                for name, member in sorted(known.items())
            ],
            "missed_deadlines": dict(self.attendance.missed),
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Take up the state that ``document`` gave; none of its devices is there yet."""
        self.attendance.missed = Counter(document["missed_deadlines"])
        self._resumed = {
            name: Member(name, tuple(label_counts), max_batch)
            for name, label_counts, max_batch in document["members"]
        }
        self.expected = frozenset(document["expected"])
