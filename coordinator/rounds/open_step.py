"""The step that is under way: who still owes what, and what comes next in it.

    FORWARD ──► RunServer ──► BACKWARD ──► ApplyStep      (frozen: no BACKWARD)
       └─────── AbandonStep ─────┘  nobody contributed

After ``ApplyStep`` or ``AbandonStep`` the step is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from coordinator.actions import AbandonStep, Action, ApplyStep, Phase, RunServer
from coordinator.planning import PlannedSlot, PlannedStep
from coordinator.rounds.step_times import StepTimes


class StepUnderWay:
    """One step from its go until it is applied or abandoned."""

    def __init__(
        self,
        plan: PlannedStep,
        *,
        early: set[PlannedSlot],
        frozen: bool,
        times: StepTimes,
        now_s: float,
    ) -> None:
        self.plan = plan
        self.phase = Phase.FORWARD
        self.awaited = set(plan.slots) - early  # activations, in BACKWARD parameter gradients
        self.received = early  # whose activations are there
        self.lost: set[PlannedSlot] = set()  # that the step goes on without
        self._contributed: tuple[PlannedSlot, ...] = ()  # that the server segment ran on
        self._slowest: str | None = None  # device of the last answer
        self._frozen = frozen
        self._times = times
        self._opened_s = now_s
        self._phase_opened_s = now_s
        self.deadline_s = now_s + times.forward_allowance_s(plan.slots)  # of the phase
        times.step_opened(plan.step, now_s)

    # What may be asked

    @property
    def kept(self) -> tuple[PlannedSlot, ...]:
        """Slots that are not lost, in plan order."""
        return tuple(slot for slot in self.plan.slots if slot not in self.lost)

    @property
    def devices_awaited(self) -> set[str]:
        """Devices whose answer is missing."""
        return {slot.device for slot in self.awaited}

    def owes(self, device: str) -> bool:
        """Whether an answer of the device is awaited."""
        return any(slot.device == device for slot in self.awaited)

    def owed_by(self, devices: AbstractSet[str]) -> set[PlannedSlot]:
        """Slots that are awaited from these devices."""
        return {slot for slot in self.awaited if slot.device in devices}

    def useless_without(self, devices: AbstractSet[str]) -> set[PlannedSlot]:
        """Slots that cannot be used where these devices have left."""
        slots = self.owed_by(devices)
        if self.phase is Phase.FORWARD and not self._frozen:
            # What they sent is of no use either: nobody is there for its backward pass.
            slots |= {slot for slot in self.received if slot.device in devices} - self.lost
        return slots

    # Events

    def accept_activations(self, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid activations in."""
        self.received.add(slot)
        if self._take(slot):
            seconds = now_s - self._phase_opened_s
            self._times.activations_came(slot.device, self._count_of(slot.device), seconds)
        return self.go_on(now_s)

    def server_done(self, now_s: float) -> list[Action]:
        """The server segment ran; a frozen run needs no more than that."""
        if self._frozen:
            return self._apply(now_s)
        self.phase = Phase.BACKWARD
        self.awaited = set(self._contributed)
        self._phase_opened_s = now_s
        self.deadline_s = now_s + self._times.backward_allowance_s(self._contributed)
        return []

    def accept_gradients(self, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid parameter gradients in."""
        if self._take(slot):
            seconds = now_s - self._phase_opened_s
            self._times.gradients_came(slot.device, self._count_of(slot.device), seconds)
        return self.go_on(now_s)

    def lose(self, slots: Iterable[PlannedSlot], now_s: float) -> list[Action]:
        """Go on without these slots."""
        self.awaited.difference_update(slots)
        self.lost.update(slots)
        return self.go_on(now_s)

    def go_on(self, now_s: float) -> list[Action]:
        """What follows once nothing is awaited any more in this phase."""
        if self.awaited:
            return []
        is_forward = self.phase is Phase.FORWARD
        contributed = self.kept if is_forward else self._contributed
        if all(slot in self.lost for slot in contributed):
            return [AbandonStep(self.plan.step)]
        if not self.lost:
            took = self._times.forward_took if is_forward else self._times.backward_took
            took(now_s - self._phase_opened_s)
        if not is_forward:
            return self._apply(now_s)
        self._contributed = contributed
        return [RunServer(self.plan.step, contributed)]

    # Inside

    def _apply(self, now_s: float) -> list[Action]:
        kept = tuple(slot for slot in self._contributed if slot not in self.lost)
        lost = tuple(slot for slot in self._contributed if slot in self.lost)
        duration_s = now_s - self._opened_s
        return [ApplyStep(self.plan.step, kept, lost, duration_s, self._slowest)]

    def _take(self, slot: PlannedSlot) -> bool:
        """Count an answer in; tell whether its device owes nothing more in this phase."""
        self.awaited.discard(slot)
        self._slowest = slot.device
        return not self.owes(slot.device)

    def _count_of(self, device: str) -> int:
        """Samples that the device was to contribute."""
        return sum(slot.count for slot in self.plan.slots if slot.device == device)
