"""The step protocol of the coordinator as a state machine: events in, actions out.

No sockets, clock, files, threads or tensors: time is an argument, tensors stay with the caller.

    WAITING ──► FORWARD ──► BACKWARD ──► applied ──► FORWARD … ──► EPOCH_END ──► WAITING …
       ▲            │ nobody answered   │ nobody answered     (frozen: no BACKWARD)
       └────────────┴───────────────────┘

A range counts as trained when the step that contains it was applied (``ApplyStep``); a device
that is lost or late costs its range, which goes back to the pool and is planned again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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
    RunServer,
    SendAllocations,
)
from coordinator.delays import DelayEstimator, FleetDelays
from coordinator.patience import Attendance, DeadlineSettings, PhaseClock
from coordinator.planning import Member, PlannedSlot, PlannedStep, PolicySettings, WindowPlanner
from wire.errors import LocalProtocolError, PeerProtocolError, Refusal
from wire.messages import RangeHeader

EstimatorOf = Callable[[str], DelayEstimator | None]

# A fleet that keeps changing must not be planned anew at every step: a plan costs as much as many
# of its steps where there are thousands of devices.
REPLAN_PAUSE_STEPS = 5
REMEMBERED_STEPS = 64  # how far back a late message still tells how slow its device is


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What the state machine needs to know of a run's settings."""

    global_batch: int
    epochs: int
    policy: PolicySettings = field(default_factory=PolicySettings)
    deadline: DeadlineSettings = field(default_factory=DeadlineSettings)
    min_devices: int = 1
    frozen: bool = False
    ahead: int = 4
    seed: int = 0

    @property
    def window_steps(self) -> int:
        """Steps planned at a time: until the next refit, and enough to run ahead on."""
        return max(self.policy.refit_every, 2 * self.ahead if self.frozen else 1)


@dataclass(slots=True)
class _OpenStep:
    """The step that is under way: who still owes what."""

    plan: PlannedStep
    opened_s: float
    deadline_s: float
    awaited: set[PlannedSlot]  # activations in FORWARD, parameter gradients in BACKWARD
    received: set[PlannedSlot] = field(default_factory=set)
    lost: set[PlannedSlot] = field(default_factory=set)
    contributed: tuple[PlannedSlot, ...] = ()
    phase_opened_s: float = 0.0
    slowest: str | None = None

    def owes(self, device: str) -> bool:
        return any(slot.device == device for slot in self.awaited)

    def owed_by(self, devices: set[str]) -> set[PlannedSlot]:
        return {slot for slot in self.awaited if slot.device in devices}

    def count_of(self, device: str) -> int:
        return sum(slot.count for slot in self.plan.slots if slot.device == device)


class Rounds:
    """Run state; one owner calls it, with monotonic ``now_s``, and performs the actions."""

    def __init__(self, settings: RoundSettings, delays: FleetDelays | None = None) -> None:
        self.settings = settings
        self.delays = delays or FleetDelays()
        self.phase = Phase.WAITING
        self.epoch = 0
        self.step = 0  # the step under way, or the last one
        self.version = 0  # applied steps
        self.account = EpochAccount()
        self.attendance = Attendance(settings.deadline)
        self.missed: Counter[str] = Counter()  # samples, over all epochs
        self.trained: Counter[str] = Counter()
        self._planner = WindowPlanner(
            settings.policy, global_batch=settings.global_batch, seed=settings.seed
        )
        self._members: dict[str, Member] = {}
        self._later: dict[str, Member] = {}  # back with other data: from the next epoch on
        self._resumed: dict[str, Member] = {}  # whom a restored plan counts on
        self._skipped_to = 0  # step numbers that a dropped plan of a frozen run has used
        self._open: _OpenStep | None = None
        self._early: set[tuple[int, PlannedSlot]] = set()
        self._started = False
        self._expected: frozenset[str] = frozenset()  # after a resume: who to wait for first
        self._wait_until_s: float | None = None
        self._forward = PhaseClock(settings.deadline, self._expected_forward_s)
        self._backward = PhaseClock(settings.deadline, self._expected_backward_s)
        self._opened_at: dict[int, float] = {}
        self._beliefs: dict[tuple[str, str], tuple[float, float]] = {}
        self._speed_changed = False  # of some device, for good, since the plan was made
        self._replan_from_step = 0

    # What the owner may ask

    @property
    def last_delta(self) -> float | None:
        """The delay weight that LDS used last."""
        return self._planner.last_delta

    @property
    def members(self) -> frozenset[str]:
        """Devices that are ready, those that sit out too."""
        return frozenset(self._members)

    @property
    def is_everybody_excluded(self) -> bool:
        """Whether each device that is there was useless too often: weights rather than devices."""
        return bool(self._members) and set(self._members) <= self.attendance.excluded

    @property
    def waited_for(self) -> tuple[str, ...]:
        """Devices that the run waits for now, by id."""
        if self._open is None:
            return tuple(sorted(self._absent())) if self._wait_until_s is not None else ()
        return tuple(sorted({slot.device for slot in self._open.awaited}))

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
        plans = list(self._planner.window)
        if self._open is not None:
            plans.insert(0, self._open.plan)
        for plan in plans:
            for slot in plan.slots:
                if self._open is None or plan is not self._open.plan or slot not in self._open.lost:
                    slots.setdefault(slot.device, []).append((plan.step, slot))
        return slots

    def planned(self, step: int) -> PlannedStep:
        """The plan of the step under way or of one in the window."""
        if self._open is not None and self._open.plan.step == step:
            return self._open.plan
        for plan in self._planner.window:
            if plan.step == step:
                return plan
        raise LocalProtocolError(f"step {step} is not planned")

    # Events: devices come and go

    def device_ready(self, member: Member, now_s: float) -> list[Action]:
        """A device is there with the run's bundle: new, returned or connected again."""
        name = member.device
        if self._started and not self.account.holds(name, member.samples):
            # Its data is not what this epoch counts on: it comes in again with the next one.
            self._later[name] = member
            self._members.pop(name, None)
            return self._without({name}, now_s)
        known = self._members.get(name, self._resumed.pop(name, None))
        self._members[name] = member
        self._later.pop(name, None)
        if self.attendance.heard(name) or known != member:
            # Not for a device that a restored plan was made with: that plan goes on as it is.
            self._planner.forget()
        actions: list[Action] = []
        if self._started:
            self.account.add(name, member.samples)
            actions.append(SendAllocations(frozenset({name})))
            if self._open and self.phase is Phase.BACKWARD and self._open.owes(name):
                actions.append(ResendCutGradients(name))
        return actions + self._advance(now_s)

    def device_gone(self, device: str, now_s: float) -> list[Action]:
        """A device left; what it was to contribute goes back and is planned for others."""
        self._later.pop(device, None)
        if self._members.pop(device, None) is None:
            return []
        return self._without({device}, now_s)

    # Events: activations

    def find_activations(
        self, device: str, header: RangeHeader, weights_version: int
    ) -> PlannedSlot:
        """The slot that activations belong to; raises PeerProtocolError if they fit none."""
        self._check_epoch(header)
        opened = self._open
        if opened is None or header.step != opened.plan.step:
            return self._find_elsewhere(device, header)
        slot = _find_slot(opened.plan, device, header)
        if slot in opened.lost:
            raise PeerProtocolError(Refusal.LATE, f"step {header.step} goes on without this range")
        if slot in opened.received:
            raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has this range")
        if not self.settings.frozen:
            self._check_version(weights_version)
        return slot

    def accept_activations(self, step: int, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid activations in (``now_s``: their arrival)."""
        opened = self._open
        if opened is None or step != opened.plan.step:
            self._early.add((step, slot))
            return []
        self.attendance.heard(slot.device)
        opened.awaited.discard(slot)
        opened.received.add(slot)
        opened.slowest = slot.device
        if not opened.owes(slot.device):
            seconds = max(0.0, now_s - opened.opened_s)
            count = opened.count_of(slot.device)
            self._speed_changed |= self.delays.observe_forward(slot.device, count, seconds)
        return self._maybe_run_server(now_s)

    def observe_late(self, device: str, header: RangeHeader, now_s: float) -> list[Action]:
        """A device answered too late: learn how slow it is and count on it again."""
        opened_s = self._opened_at.get(header.step)
        # It may have come while the owner was at work, before the step was opened: no measure.
        if opened_s is not None and now_s >= opened_s:
            late_s = now_s - opened_s
            self._speed_changed |= self.delays.observe_forward(device, header.count, late_s)
            self._beliefs.pop((self.delays.forward.__name__, device), None)
        if not self.attendance.heard(device):
            return []
        self._planner.forget()
        return self._advance(now_s)

    def server_done(self, now_s: float) -> list[Action]:
        """The server segment ran and cut gradients were sent; frozen runs apply at once."""
        opened = self._require_open(Phase.FORWARD)
        if self.settings.frozen:
            return self._apply(now_s)
        self.phase = Phase.BACKWARD
        opened.awaited = set(opened.contributed)
        opened.phase_opened_s = now_s
        opened.deadline_s = now_s + self._backward.allowance_s(opened.contributed)
        return []

    def refuse_contributions(self, slots: Iterable[PlannedSlot], now_s: float) -> list[Action]:
        """These slots' activations turned out useless: go on without them, for now."""
        opened = self._require_open(Phase.FORWARD)
        useless = set(slots)
        excluded = {d for d in {s.device for s in useless} if self.attendance.refuse(d)}
        actions = self._replan_without(excluded)
        opened.contributed = ()
        return actions + self._lose(useless, now_s)

    # Events: parameter gradients

    def find_gradients(self, device: str, header: RangeHeader, weights_version: int) -> PlannedSlot:
        """The slot that gradients belong to; raises PeerProtocolError if they fit none."""
        self._check_epoch(header)
        opened = self._open
        if header.step < self.step or opened is None:
            raise PeerProtocolError(Refusal.LATE, f"step {header.step} is over")
        if header.step > self.step or self.phase is not Phase.BACKWARD:
            raise PeerProtocolError(Refusal.EARLY, f"step {header.step} awaits no gradients")
        slot = _find_slot(opened.plan, device, header)
        if slot in opened.lost:
            raise PeerProtocolError(Refusal.LATE, f"step {header.step} goes on without this range")
        if slot not in opened.awaited:
            raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has this range")
        self._check_version(weights_version)
        return slot

    def accept_gradients(self, slot: PlannedSlot, now_s: float) -> list[Action]:
        """Count valid parameter gradients in (``now_s``: their arrival)."""
        opened = self._require_open(Phase.BACKWARD)
        self.attendance.heard(slot.device)
        opened.awaited.discard(slot)
        opened.slowest = slot.device
        if not opened.owes(slot.device):
            seconds = max(0.0, now_s - opened.phase_opened_s)
            count = opened.count_of(slot.device)
            self._speed_changed |= self.delays.observe_backward(slot.device, count, seconds)
        return self._maybe_apply(now_s)

    # Events: the owner's own work, and time

    def applied(self, now_s: float) -> list[Action]:
        """The optimisers stepped; go on with the next step."""
        assert self.phase is Phase.APPLYING
        self.phase = Phase.WAITING
        return self._advance(now_s)

    def evaluated(self, now_s: float) -> list[Action]:
        """The epoch's evaluation is done; begin the next epoch or end the run."""
        assert self.phase is Phase.EPOCH_END
        ended, self.account = self.account, EpochAccount()
        self.epoch += 1
        if self.epoch >= self.settings.epochs:
            self.phase = Phase.DONE
            return []
        self.phase = Phase.WAITING
        self._begin_epoch()
        self._count_on_devices_of(ended)
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Act on a deadline that has passed."""
        opened = self._open
        if opened is None:
            return self._advance(now_s)
        if now_s < opened.deadline_s or not opened.awaited:
            return []
        late = {slot.device for slot in opened.awaited}
        silent = {device for device in late if self.attendance.miss(device)}
        actions = self._replan_without(silent)
        return actions + self._lose(opened.owed_by(late), now_s)

    def abandon_open_step(self) -> None:
        """Put the step under way back in front of the window, before a checkpoint."""
        opened = self._open
        if opened is None:
            return
        kept = tuple(slot for slot in opened.plan.slots if slot not in opened.lost)
        self._planner.window.appendleft(PlannedStep(opened.plan.step, kept))
        self.step = opened.plan.step - 1
        self._early.clear()
        self._close()

    # Checkpoints

    def document(self) -> dict[str, Any]:
        """State between two steps as JSON-able data."""
        if self._open is not None:
            raise LocalProtocolError(f"step {self.step} is under way: nothing to write down")
        return {
            "started": self._started,
            "epoch": self.epoch,
            "step": self.step,
            "skipped_to": self._skipped_to,
            "version": self.version,
            "at_epoch_end": self.phase is Phase.EPOCH_END,
            "account": self.account.document(),
            "planner": self._planner.document(),
            "members": [
                [name, list(member.label_counts), member.max_batch]
                for name, member in sorted((self._resumed | self._members).items())
            ],
            "expected": sorted(self.account.devices),
            "trained": dict(self.trained),
            "missed": dict(self.missed),
            "missed_deadlines": dict(self.attendance.missed),
            "forward_s": list(self._forward.durations_s),
            "backward_s": list(self._backward.durations_s),
            "delays": self.delays.state(),
        }

    def restore(self, document: dict[str, Any], *, now_s: float) -> None:
        """Go on from ``document``; waits for the devices that it counted on, for a while."""
        self.epoch = document["epoch"]
        self.step = document["step"]
        self._skipped_to = document["skipped_to"]
        self.version = document["version"]
        self.account = EpochAccount.from_document(document["account"])
        self._planner.restore(document["planner"])
        self.trained = Counter(document["trained"])
        self.missed = Counter(document["missed"])
        self.attendance.missed = Counter(document["missed_deadlines"])
        self._forward.durations_s.extend(document["forward_s"])
        self._backward.durations_s.extend(document["backward_s"])
        self.delays = FleetDelays.from_state(document["delays"])
        self._started = document["started"]
        self._resumed = {
            name: Member(name, tuple(label_counts), max_batch)
            for name, label_counts, max_batch in document["members"]
        }
        self.phase = Phase.EPOCH_END if document["at_epoch_end"] else Phase.WAITING
        self._expected = frozenset(document["expected"])
        deadline = self.settings.deadline
        self._wait_until_s = now_s + max(deadline.first_s, deadline.return_grace_s)

    # Inside: checks

    def _check_epoch(self, header: RangeHeader) -> None:
        if header.epoch != self.epoch:
            reason = Refusal.LATE if header.epoch < self.epoch else Refusal.EARLY
            raise PeerProtocolError(reason, f"epoch {self.epoch} is on, not {header.epoch}")

    def _check_version(self, weights_version: int) -> None:
        if weights_version != self.version:
            raise PeerProtocolError(
                Refusal.STALE_WEIGHTS,
                f"expected weights version {self.version}, received {weights_version}",
            )

    def _find_elsewhere(self, device: str, header: RangeHeader) -> PlannedSlot:
        """Activations for a step that is not open: late, or ahead of it in a frozen run."""
        if header.step <= self.step:
            raise PeerProtocolError(Refusal.LATE, f"step {header.step} is over")
        if not self.settings.frozen or header.step > self.step + self.settings.ahead:
            raise PeerProtocolError(Refusal.EARLY, f"step {self.step} is on, not {header.step}")
        for plan in self._planner.window:
            if plan.step == header.step:
                slot = _find_slot(plan, device, header)
                if (header.step, slot) in self._early:
                    raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has it")
                return slot
        raise PeerProtocolError(Refusal.NOT_ALLOCATED, f"step {header.step} is not planned")

    def _require_open(self, phase: Phase) -> _OpenStep:
        if self._open is None or self.phase is not phase:
            raise LocalProtocolError(f"expected phase {phase.name}, the run is in {self.phase}")
        return self._open

    # Inside: who is there

    def _active(self) -> dict[str, Member]:
        out = self.attendance.out
        return {name: member for name, member in self._members.items() if name not in out}

    def _absent(self) -> set[str]:
        """Devices that hold untrained samples, or that a resumed run counts on, and are away."""
        return (set(self.account.untrained()) | self._expected) - set(self._active())

    def _expected_forward_s(self, device: str, count: int) -> float | None:
        return self._believed_s(self.delays.forward, device, count)

    def _expected_backward_s(self, device: str, count: int) -> float | None:
        return self._believed_s(self.delays.backward, device, count)

    def _believed_s(self, phase: EstimatorOf, device: str, count: int) -> float | None:
        """What is known of a device, looked up once a window: a fit costs as much as a message."""
        key = (phase.__name__, device)
        if key not in self._beliefs:
            estimator = phase(device)
            if estimator is None:
                return None
            self._beliefs[key] = (estimator.fixed_s, estimator.per_sample_s)
        fixed_s, per_sample_s = self._beliefs[key]
        return fixed_s + per_sample_s * count

    # Inside: between two steps

    def _begin_epoch(self) -> None:
        self.attendance.begin_epoch()
        self._planner.forget()
        self._members |= self._later
        self._later.clear()
        for member in self._members.values():
            self.account.add(member.device, member.samples)

    def _count_on_devices_of(self, ended: EpochAccount) -> None:
        """Expect those that are away, and were not missed, as if they had left a moment later.

        A device that is lost or started again just between two epochs holds nothing of the one
        and would be forgotten in the other.
        """
        stayed_away = ended.untrained()
        for name, account in ended.devices.items():
            if name not in stayed_away:
                self.account.add(name, account.samples)

    def _advance(self, now_s: float) -> list[Action]:
        """Between two steps: open the next one, end the epoch, or wait."""
        if self._open is not None or self.phase is not Phase.WAITING:
            return []
        if not self._started:
            if len(self._members) < self.settings.min_devices:
                return []
            self._started = True
            self._begin_epoch()
        if self._expected:
            away = self._expected - set(self._members) - set(self._later)
            if away and not self._wait_is_over(now_s):
                return []
            return self._take_up(now_s)
        actions = self._plan()
        if not self._planner.window:
            return actions + self._end_or_wait(now_s)
        self._wait_until_s = None
        return actions + self._open_next(now_s)

    def _take_up(self, now_s: float) -> list[Action]:
        """A resumed run's devices are there, or their time is over."""
        gone = set(self._expected) - set(self._members)
        self._expected = frozenset()
        self._resumed.clear()
        self._wait_until_s = None
        for member in self._members.values():
            self.account.add(member.device, member.samples)
        actions = self._replan_without(gone)
        return [SendAllocations(frozenset(self._members)), *actions, *self._advance(now_s)]

    def _wait_is_over(self, now_s: float) -> bool:
        return self._wait_until_s is not None and now_s >= self._wait_until_s

    def _plan(self) -> list[Action]:
        """Fill the window again where it runs low, or plan anew where a device changed speed."""
        outdated = self._drop_outdated_plan()
        window = self._planner.window
        if len(window) > (self.settings.ahead if self.settings.frozen else 0):
            return []
        added = self._planner.refill(
            self.account,
            self._active(),
            epoch=self.epoch,
            next_step=max(window[-1].step if window else self.step, self._skipped_to) + 1,
            steps=self.settings.window_steps,
            delays_of=self.delays.delays_s,
        )
        if not added:
            return [SendAllocations(outdated)] if outdated else []
        self._beliefs.clear()
        return [SendAllocations(outdated.union(*(step.devices for step in window)))]

    def _drop_outdated_plan(self) -> frozenset[str]:
        """Take the plan back after a lasting change of speed; tell whose allocations that voids."""
        if not self._speed_changed or self.step < self._replan_from_step:
            return frozenset()
        self._speed_changed = False
        self._replan_from_step = self.step + REPLAN_PAUSE_STEPS
        return self._drop_plan() if self._planner.heeds_measured_delays else frozenset()

    def _end_or_wait(self, now_s: float) -> list[Action]:
        """Nothing can be planned: the epoch is over, or what is left belongs to absent devices."""
        missed = self.account.untrained()
        if not self.account.samples or (missed and not self._members and not self._later):
            self._wait_until_s = None  # without any device there is nothing to end
            return []
        if set(missed) - self.attendance.excluded - set(self._later):
            if self._wait_until_s is None:
                self._wait_until_s = now_s + self.settings.deadline.return_grace_s
            if not self._wait_is_over(now_s):
                return []
            if self.attendance.sitting_out and not self._active():
                self._wait_until_s = None
                self.attendance.recall_all()
                return self._advance(now_s)
        self._wait_until_s = None
        self.phase = Phase.EPOCH_END
        self.missed.update(missed)
        return [EndEpoch(self.epoch, self.account.samples, self.account.trained, missed)]

    def _open_next(self, now_s: float) -> list[Action]:
        plan = self._planner.window.popleft()
        self.step = plan.step
        self.phase = Phase.FORWARD
        self._opened_at[plan.step] = now_s
        self._opened_at.pop(plan.step - REMEMBERED_STEPS, None)
        early = {slot for step, slot in self._early if step == plan.step} & plan.slot_set
        self._early = {(step, slot) for step, slot in self._early if step > plan.step}
        self._open = _OpenStep(
            plan,
            opened_s=now_s,
            deadline_s=now_s + self._forward.allowance_s(plan.slots),
            awaited=set(plan.slots) - early,
            received=early,
        )
        return [OpenStep(plan), *self._maybe_run_server(now_s)]

    # Inside: the step under way

    def _maybe_run_server(self, now_s: float) -> list[Action]:
        opened = self._require_open(Phase.FORWARD)
        if opened.awaited:
            return []
        kept = tuple(slot for slot in opened.plan.slots if slot not in opened.lost)
        if not kept:
            return self._abandon(now_s)
        opened.contributed = kept
        if not opened.lost:
            self._forward.durations_s.append(now_s - opened.opened_s)
        return [RunServer(opened.plan.step, kept)]

    def _maybe_apply(self, now_s: float) -> list[Action]:
        opened = self._require_open(Phase.BACKWARD)
        if opened.awaited:
            return []
        if all(slot in opened.lost for slot in opened.contributed):
            return self._abandon(now_s)
        if not opened.lost:
            self._backward.durations_s.append(now_s - opened.phase_opened_s)
        return self._apply(now_s)

    def _apply(self, now_s: float) -> list[Action]:
        opened = self._open
        assert opened is not None
        kept = tuple(slot for slot in opened.contributed if slot not in opened.lost)
        lost = tuple(slot for slot in opened.contributed if slot in opened.lost)
        for slot in kept:
            self.account.mark_trained(slot.device, slot.spans)
            self.trained[slot.device] += slot.count
            self.attendance.useful(slot.device)
        self.version += 1
        self._open = None
        self.phase = Phase.APPLYING  # the owner may write a checkpoint before it goes on
        duration_s = now_s - opened.opened_s
        return [ApplyStep(opened.plan.step, kept, lost, duration_s, opened.slowest)]

    def _abandon(self, now_s: float) -> list[Action]:
        opened = self._open
        assert opened is not None
        self._close()
        return [AbandonStep(opened.plan.step), *self._advance(now_s)]

    def _close(self) -> None:
        self._open = None
        self.phase = Phase.WAITING

    def _lose(self, slots: Iterable[PlannedSlot], now_s: float) -> list[Action]:
        """The step under way goes on without these slots, which go back to the pool."""
        opened = self._open
        assert opened is not None
        for slot in slots:
            opened.awaited.discard(slot)
            opened.lost.add(slot)
            self.account.give_back(slot.device, slot.spans)
        self._planner.forget()
        if self.phase is Phase.FORWARD:
            return self._maybe_run_server(now_s)
        return self._maybe_apply(now_s)

    def _without(self, devices: set[str], now_s: float) -> list[Action]:
        """These devices left: replan, and go on without what they owe the step under way."""
        actions = self._replan_without(devices)
        if self._open is not None:
            slots = self._open.owed_by(devices)
            if self.phase is Phase.FORWARD and not self.settings.frozen:
                # What they sent is of no use either: nobody is there for its backward pass.
                slots |= {slot for slot in self._open.received if slot.device in devices}
                slots -= self._open.lost
            if slots:
                actions += self._lose(slots, now_s)
        return actions + self._advance(now_s)

    def _replan_without(self, devices: set[str]) -> list[Action]:
        """Take planned steps back if they count on these devices."""
        if not devices & self._planner.devices():
            return []
        return [SendAllocations(self._drop_plan() - devices)]

    def _drop_plan(self) -> frozenset[str]:
        """Take all planned steps back; returns the devices whose allocations have held them."""
        window = self._planner.window
        told: frozenset[str] = frozenset().union(*(step.devices for step in window))
        if window and self.settings.frozen:
            # Devices that ran ahead have sent some of these ranges and would not send them again:
            # the numbers are not used for other ranges, and what came early is of no use.
            self._skipped_to = window[-1].step
            self._early.clear()
        self._planner.clear(self.account)
        return told


def _find_slot(plan: PlannedStep, device: str, header: RangeHeader) -> PlannedSlot:
    slot = plan.slots_by_name.get((device, header.offset, header.count))
    if slot is None:
        raise PeerProtocolError(
            Refusal.NOT_ALLOCATED,
            f"step {header.step} holds no range [{header.offset}, {header.count}] of {device}",
        )
    return slot
