"""The step protocol of the coordinator as a state machine: events in, actions out.

    WAITING ──► FORWARD ──► BACKWARD ──► applied ──► FORWARD … ──► EPOCH_END ──► WAITING …
       ▲            │ nobody answered   │ nobody answered     (frozen: no BACKWARD)
       └────────────┴───────────────────┘

A range counts as trained when the step that contains it was applied (``ApplyStep``); a device
that is lost or late costs its range, which goes back to the pool and is planned again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from coordinator.accounting import EpochAccount
from coordinator.actions import (
    AbandonStep,
    Action,
    ApplyStep,
    EndEpoch,
    OpenStep,
    Phase,
    ResendCutGradients,
    SendAllocations,
)
from coordinator.planning import Member, PlannedSlot, PlannedStep
from coordinator.rounds import judging
from coordinator.rounds.open_step import StepUnderWay
from coordinator.rounds.roster import Roster
from coordinator.rounds.settings import RoundSettings
from coordinator.rounds.step_times import StepTimes
from coordinator.rounds.upcoming import UpcomingSteps
from wire.errors import LocalProtocolError
from wire.messages import RangeHeader


class Rounds:
    """Run state; one owner calls it, with monotonic ``now_s``, and performs the actions."""

    def __init__(self, settings: RoundSettings) -> None:
        self.settings = settings
        self.epoch = 0
        self.step = 0  # the step under way, or the last one
        self.version = 0  # applied steps
        self.account = EpochAccount()
        self.missed: Counter[str] = Counter()  # samples, over all epochs
        self.trained: Counter[str] = Counter()
        self._started = False
        self._phase = Phase.WAITING  # while no step is under way
        self._wait_until_s: float | None = None  # for devices, between two steps
        self._roster = Roster(settings.deadline)
        self._times = StepTimes(settings.deadline)
        self._upcoming = UpcomingSteps(settings)
        self.attendance = self._roster.attendance
        self.delays = self._times.delays
        self._open: StepUnderWay | None = None

    # What the owner may ask

    @property
    def phase(self) -> Phase:
        """What the run waits for."""
        return self._phase if self._open is None else self._open.phase

    @property
    def last_delta(self) -> float | None:
        """The delay weight that LDS used last."""
        return self._upcoming.last_delta

    @property
    def members(self) -> frozenset[str]:
        """Devices that are ready, those that sit out too."""
        return frozenset(self._roster.members)

    @property
    def waited_for(self) -> tuple[str, ...]:
        """Devices that the run waits for now, by id."""
        if self._open is not None:
            return tuple(sorted(self._open.devices_awaited))
        if self._wait_until_s is None:
            return ()
        return tuple(sorted(self._roster.absent(self.account.untrained())))

    @property
    def deadline_s(self) -> float | None:
        """When ``tick`` has something to do, or None."""
        return self._wait_until_s if self._open is None else self._open.deadline_s

    def slots_of(self, device: str) -> list[tuple[int, PlannedSlot]]:
        """(step, slot) of all that the device is to contribute from now on, in step order."""
        return self.slots_by_device().get(device, [])

    def slots_by_device(self) -> dict[str, list[tuple[int, PlannedSlot]]]:
        """``slots_of`` for every device that has any, in one pass."""
        slots: dict[str, list[tuple[int, PlannedSlot]]] = {}
        held = [(plan.step, plan.slots) for plan in self._upcoming]
        if self._open is not None:
            held.insert(0, (self._open.plan.step, self._open.kept))
        for step, planned in held:
            for slot in planned:
                slots.setdefault(slot.device, []).append((step, slot))
        return slots

    def planned(self, step: int) -> PlannedStep:
        """The plan of the step under way or of one in the window."""
        if self._open is not None and self._open.plan.step == step:
            return self._open.plan
        if (plan := self._upcoming.find(step)) is None:
            raise LocalProtocolError(f"step {step} is not planned")
        return plan

    def find_activations(self, device: str, header: RangeHeader, version: int) -> PlannedSlot:
        """The slot that activations belong to; raises PeerProtocolError if they fit none."""
        return judging.find_activations(self._standing(), device, header, version)

    def find_gradients(self, device: str, header: RangeHeader, version: int) -> PlannedSlot:
        """The slot that gradients belong to; raises PeerProtocolError if they fit none."""
        return judging.find_gradients(self._standing(), device, header, version)

    def _standing(self) -> judging.Standing:
        return judging.Standing(
            phase=self.phase,
            epoch=self.epoch,
            step=self.step,
            version=self.version,
            settings=self.settings,
            opened=self._open,
            upcoming=self._upcoming,
        )

    # Events: devices come and go

    def device_ready(self, member: Member, now_s: float) -> list[Action]:
        """A device is there with the run's bundle: new, returned or connected again."""
        name = member.device
        if self._started and not self.account.holds(name, member.samples):
            self._roster.postpone(member)
            return self._without({name}, now_s)
        if self._roster.admit(member):
            self._upcoming.forget()
        actions: list[Action] = []
        if self._started:
            self.account.add(name, member.samples)
            actions.append(SendAllocations(frozenset({name})))
            if self._open and self.phase is Phase.BACKWARD and self._open.owes(name):
                actions.append(ResendCutGradients(name))
        return actions + self._advance(now_s)

    def device_gone(self, device: str, now_s: float) -> list[Action]:
        """A device left; what it was to contribute goes back and is planned for others."""
        return self._without({device}, now_s) if self._roster.leave(device) else []

    # Events: a step

    def accept_activations(self, step: int, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid activations in (``now_s``: their arrival)."""
        opened = self._open
        if opened is None or step != opened.plan.step:
            self._upcoming.came(step, slot)
            return []
        self.attendance.heard(slot.device)
        return self._follow(opened.accept_activations(slot, now_s), now_s)

    def observe_late(self, device: str, header: RangeHeader, now_s: float) -> list[Action]:
        """A device answered too late: learn how slow it is and count on it again."""
        self._times.activations_came_late(device, header, now_s)
        if not self.attendance.heard(device):
            return []
        self._upcoming.forget()
        return self._advance(now_s)

    def server_done(self, now_s: float) -> list[Action]:
        """The server segment ran and cut gradients were sent; frozen runs apply at once."""
        opened = self._require_open(Phase.FORWARD)
        return self._follow(opened.server_done(now_s), now_s)

    def refuse_contributions(self, slots: Iterable[PlannedSlot], now_s: float) -> list[Action]:
        """These slots' activations turned out useless: go on without them, for now."""
        opened = self._require_open(Phase.FORWARD)
        useless = set(slots)
        excluded = {d for d in {s.device for s in useless} if self.attendance.refuse(d)}
        return self._replan_without(excluded) + self._lose(opened, useless, now_s)

    def accept_gradients(self, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid parameter gradients in (``now_s``: their arrival)."""
        opened = self._require_open(Phase.BACKWARD)
        self.attendance.heard(slot.device)
        return self._follow(opened.accept_gradients(slot, now_s), now_s)

    def applied(self, now_s: float) -> list[Action]:
        """The optimisers stepped; go on with the next step."""
        assert self.phase is Phase.APPLYING
        self._phase = Phase.WAITING
        return self._advance(now_s)

    def evaluated(self, now_s: float) -> list[Action]:
        """The epoch's evaluation is done; begin the next epoch or end the run."""
        assert self.phase is Phase.EPOCH_END
        ended, self.account = self.account, EpochAccount()
        self.epoch += 1
        if self.epoch >= self.settings.epochs:
            self._phase = Phase.DONE
            return []
        self._phase = Phase.WAITING
        self._begin_epoch()
        # Those that are away and were not missed count as if they had left a moment later: lost
        # just between two epochs they hold nothing of the one, and would be forgotten in the other.
        for name, samples in ended.finished().items():
            self.account.add(name, samples)
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Act on a deadline that has passed."""
        if (opened := self._open) is None:
            return self._advance(now_s)
        if now_s < opened.deadline_s or not opened.awaited:
            return []
        late = opened.devices_awaited
        silent = {device for device in late if self.attendance.miss(device)}
        return self._replan_without(silent) + self._lose(opened, opened.owed_by(late), now_s)

    # Between two steps

    def _begin_epoch(self) -> None:
        self._upcoming.forget()
        self._roster.begin_epoch()
        self._take_members_in()

    def _take_members_in(self) -> None:
        for member in self._roster.members.values():
            self.account.add(member.device, member.samples)

    def _advance(self, now_s: float) -> list[Action]:
        """Between two steps: open the next one, end the epoch, or wait."""
        if self._open is not None or self.phase is not Phase.WAITING:
            return []
        if not self._started:
            if len(self._roster.members) < self.settings.min_devices:
                return []
            self._started = True
            self._begin_epoch()
        if self._roster.expected:
            if self._roster.is_expecting and not self._wait_is_over(now_s):
                return []
            return self._take_up(now_s)
        actions = self._plan()
        if not self._upcoming:
            return actions + self._end_or_wait(now_s)
        self._wait_until_s = None
        return actions + self._open_next(now_s)

    def _take_up(self, now_s: float) -> list[Action]:
        """A resumed run's devices are there, or their time is over."""
        gone = self._roster.stop_expecting()
        self._wait_until_s = None
        self._take_members_in()
        actions = self._replan_without(gone)
        return [SendAllocations(self.members), *actions, *self._advance(now_s)]

    def _wait_is_over(self, now_s: float) -> bool:
        return self._wait_until_s is not None and now_s >= self._wait_until_s

    def _plan(self) -> list[Action]:
        """Plan more steps where they run low, or plan anew where a device changed speed."""
        changed: frozenset[str] = frozenset()
        if self._times.take_speed_change(self.step) and self._upcoming.heeds_measured_delays:
            changed = self._upcoming.drop(self.account)
        added = self._upcoming.refill(
            self.account,
            self._roster.active,
            epoch=self.epoch,
            last_step=self.step,
            delays_of=self.delays.delays_s,
        )
        if added:
            self._times.plan_made()
        return [SendAllocations(changed | added)] if changed or added else []

    def _end_or_wait(self, now_s: float) -> list[Action]:
        """Nothing can be planned: the epoch is over, or what is left belongs to absent devices."""
        missed = self.account.untrained()
        if not self.account.samples or (missed and self._roster.is_deserted):
            self._wait_until_s = None  # without any device there is nothing to end
            return []
        if self._roster.may_return(missed):
            if self._wait_until_s is None:
                self._wait_until_s = now_s + self.settings.deadline.return_grace_s
            if not self._wait_is_over(now_s):
                return []
            if self._roster.is_everybody_silent:
                self._wait_until_s = None
                self.attendance.recall_all()
                return self._advance(now_s)
        self._wait_until_s = None
        self._phase = Phase.EPOCH_END
        self.missed.update(missed)
        return [EndEpoch(self.epoch, self.account.samples, self.account.trained, missed)]

    # The step under way

    def _open_next(self, now_s: float) -> list[Action]:
        plan, early = self._upcoming.take_first()
        self.step = plan.step
        self._open = StepUnderWay(
            plan, early=early, frozen=self.settings.frozen, times=self._times, now_s=now_s
        )
        return [OpenStep(plan), *self._follow(self._open.go_on(now_s), now_s)]

    def _follow(self, actions: list[Action], now_s: float) -> list[Action]:
        """What the step under way asks for; where that ends it, the run goes on."""
        match actions:
            case [ApplyStep(slots=slots)]:
                for slot in slots:
                    self.account.mark_trained(slot.device, slot.spans)
                    self.trained[slot.device] += slot.count
                    self.attendance.useful(slot.device)
                self.version += 1
                self._open = None
                self._phase = Phase.APPLYING  # the owner may write a checkpoint first
            case [AbandonStep()]:
                self._open = None
                return actions + self._advance(now_s)
        return actions

    def _require_open(self, phase: Phase) -> StepUnderWay:
        if self._open is None or self.phase is not phase:
            raise LocalProtocolError(f"expected phase {phase.name}, the run is in {self.phase}")
        return self._open

    # Losses

    def _lose(self, opened: StepUnderWay, slots: set[PlannedSlot], now_s: float) -> list[Action]:
        """The step under way goes on without these slots, which go back to the pool."""
        for slot in slots:
            self.account.give_back(slot.device, slot.spans)
        self._upcoming.forget()
        return self._follow(opened.lose(slots, now_s), now_s)

    def _without(self, devices: set[str], now_s: float) -> list[Action]:
        """These devices left: replan, and go on without what they owe the step under way."""
        actions = self._replan_without(devices)
        if self._open is not None and (slots := self._open.useless_without(devices)):
            actions += self._lose(self._open, slots, now_s)
        return actions + self._advance(now_s)

    def _replan_without(self, devices: set[str]) -> list[Action]:
        """Take planned steps back if they count on these devices."""
        if not self._upcoming.counts_on(devices):
            return []
        return [SendAllocations(self._upcoming.drop(self.account) - devices)]

    # Checkpoints

    def abandon_open_step(self) -> None:
        """Put the step under way back in front of the window, before a checkpoint."""
        if (opened := self._open) is None:
            return
        self._upcoming.put_back(PlannedStep(opened.plan.step, opened.kept))
        self.step = opened.plan.step - 1
        self._open = None

    def document(self) -> dict[str, Any]:
        """State between two steps as JSON-able data."""
        if self._open is not None:
            raise LocalProtocolError(f"step {self.step} is under way: nothing to write down")
        return {
            "started": self._started,
            "epoch": self.epoch,
            "step": self.step,
            "version": self.version,
            "at_epoch_end": self.phase is Phase.EPOCH_END,
            "account": self.account.document(),
            "expected": sorted(self.account.devices),
            "trained": dict(self.trained),
            "missed": dict(self.missed),
            **self._upcoming.document(),
            **self._roster.document(),
            **self._times.document(),
        }

    def restore(self, document: dict[str, Any], *, now_s: float) -> None:
        """Go on from ``document``; waits for the devices that it counted on, for a while."""
        self.epoch = document["epoch"]
        self.step = document["step"]
        self.version = document["version"]
        self.account = EpochAccount.from_document(document["account"])
        self.trained = Counter(document["trained"])
        self.missed = Counter(document["missed"])
        self._started = document["started"]
        self._phase = Phase.EPOCH_END if document["at_epoch_end"] else Phase.WAITING
        self._upcoming.restore(document)
        self._roster.restore(document)
        self._times.restore(document)
        self.delays = self._times.delays
        deadline = self.settings.deadline
        self._wait_until_s = now_s + max(deadline.first_s, deadline.return_grace_s)
