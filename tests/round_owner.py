"""An owner of the round state machine for tests: performs its actions and checks their sense.

It has no tensors, messages or clock: devices are names with a number of samples, time is a field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
from coordinator.allocation import Policy
from coordinator.patience import DeadlineSettings
from coordinator.planning import Member, PlannedSlot, PlannedStep, PolicySettings
from coordinator.rounds import Rounds, RoundSettings
from wire.errors import PeerProtocolError, Refusal
from wire.messages import RangeHeader


def member(device: str, samples: int, max_batch: int | None = None) -> Member:
    """A device with two classes, unequally."""
    return Member(device, (samples - samples // 3, samples // 3), max_batch)


def range_header(slot: PlannedSlot, step: int, epoch: int = 0) -> RangeHeader:
    return RangeHeader(run="", epoch=epoch, step=step, offset=slot.offset, count=slot.count)


@dataclass
class Owner:
    """Performs what the state machine asks for, in order, and asserts that it makes sense."""

    settings: RoundSettings
    now_s: float = 1000.0
    actions: list[Action] = field(default_factory=list)
    applied: list[ApplyStep] = field(default_factory=list)
    epochs: list[EndEpoch] = field(default_factory=list)
    told: dict[str, tuple[int, list[tuple[int, PlannedSlot]]]] = field(default_factory=dict)
    trained: dict[tuple[int, str], NDArray[np.int64]] = field(default_factory=dict)
    poisoned: set[str] = field(default_factory=set)
    hold_applied: bool = False  # stop between two steps, as for a checkpoint
    hold_epochs: bool = False  # stop between two epochs

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.settings)
        self._plan: PlannedStep | None = None
        self._server_slots: tuple[PlannedSlot, ...] | None = None
        self._activations: set[PlannedSlot] = set()
        self.early: set[tuple[int, PlannedSlot]] = set()
        self._gradients: set[PlannedSlot] = set()
        self._last_step = 0

    # What happens outside

    def ready(self, device: str, samples: int, max_batch: int | None = None) -> None:
        self.perform(self.rounds.device_ready(member(device, samples, max_batch), self.now_s))

    def gone(self, device: str) -> None:
        self.told.pop(device, None)
        self.perform(self.rounds.device_gone(device, self.now_s))

    def send_activations(
        self, step: int, slot: PlannedSlot, *, version: int | None = None, epoch: int | None = None
    ) -> None:
        """Activations as they come in; PeerProtocolError if they are refused."""
        rounds = self.rounds
        found = rounds.find_activations(
            slot.device,
            range_header(slot, step, rounds.epoch if epoch is None else epoch),
            rounds.version if version is None else version,
        )
        assert found == slot
        if self._plan is not None and step == self._plan.step:
            self._activations.add(slot)
        else:
            self.early.add((step, slot))
        self.perform(rounds.accept_activations(step, slot, self.now_s))

    def send_gradients(
        self, step: int, slot: PlannedSlot, *, version: int | None = None, epoch: int | None = None
    ) -> None:
        """Parameter gradients as they come in; PeerProtocolError if they are refused."""
        rounds = self.rounds
        found = rounds.find_gradients(
            slot.device,
            range_header(slot, step, rounds.epoch if epoch is None else epoch),
            rounds.version if version is None else version,
        )
        assert found == slot
        self._gradients.add(slot)
        self.perform(rounds.accept_gradients(slot, self.now_s))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.tick()

    def restart(self) -> None:
        """Another coordinator goes on from what this one writes down; no device is there yet."""
        self.rounds.abandon_open_step()
        document = json.loads(json.dumps(self.rounds.document()))
        self.rounds = Rounds(self.settings)
        self.rounds.restore(document, now_s=self.now_s)
        self.told.clear()
        self.early.clear()
        self._plan = None
        self._last_step = self.rounds.step

    def begin_held_epoch(self) -> None:
        """Go on from the stop between two epochs, and stop at no other."""
        self.hold_epochs = False
        self.perform(self.rounds.evaluated(self.now_s))

    def tick(self) -> None:
        deadline_s = self.rounds.deadline_s
        if deadline_s is not None and self.now_s >= deadline_s:
            self.perform(self.rounds.tick(self.now_s))

    def pass_deadline(self) -> None:
        deadline_s = self.rounds.deadline_s
        assert deadline_s is not None, "nothing would ever happen again"
        self.now_s = max(self.now_s, deadline_s)
        self.tick()

    # What devices see

    @property
    def step(self) -> int:
        return self.rounds.step

    @property
    def plan(self) -> PlannedStep:
        assert self._plan is not None
        return self._plan

    def owed(self, device: str | None = None) -> list[PlannedSlot]:
        """Ranges of the step under way whose answer is missing, as the devices know them."""
        if self._plan is None:
            return []
        had = self._gradients if self.rounds.phase is Phase.BACKWARD else self._activations
        names = self.rounds.waited_for if device is None else (device,)
        return [
            slot
            for name in names
            for step, slot in self.told.get(name, (0, []))[1]
            if step == self._plan.step and slot not in had
        ]

    def answer(self, slots: Iterable[PlannedSlot]) -> None:
        """Answer these ranges of the step under way properly."""
        step = self.plan.step
        for slot in slots:
            if self.rounds.phase is Phase.BACKWARD:
                self.send_gradients(step, slot)
            else:
                self.send_activations(step, slot)

    def run_until(self, phase: Phase, step: int | None = None, *, most: int = 5000) -> None:
        """Let all devices answer, and time pass where nobody owes anything, until then."""
        for _ in range(most):
            if self.rounds.phase is phase and (step is None or self.step == step):
                return
            owed = self.owed()
            if owed:
                self.answer(owed[:1])
            else:
                self.pass_deadline()
        raise AssertionError(f"not at {phase} after {most} answers: {self.rounds.phase}")

    # Actions

    def perform(self, actions: Iterable[Action]) -> None:
        queue = list(actions)
        while queue:
            action = queue.pop(0)
            self.actions.append(action)
            queue = [*self._perform(action), *queue]

    def _perform(self, action: Action) -> list[Action]:
        match action:
            case SendAllocations(devices=devices):
                for name in devices & self.rounds.members:
                    self.told[name] = (self.rounds.epoch, self.rounds.slots_of(name))
            case ResendCutGradients(device=device):
                assert self.rounds.phase is Phase.BACKWARD
                assert device in self.rounds.waited_for
            case OpenStep(step=plan):
                self._open(plan)
            case RunServer() as run:
                return self._run_server(run)
            case ApplyStep() as apply:
                return self._apply(apply)
            case AbandonStep(step=step):
                assert self._plan is not None
                assert self._plan.step == step
                self._plan = None
            case EndEpoch() as end:
                return self._end_epoch(end)
        return []

    def _open(self, plan: PlannedStep) -> None:
        assert self._plan is None, "a step was opened in the midst of another"
        assert plan.step > self._last_step, "step numbers grow"
        assert plan.slots, "a step without samples"
        assert plan.devices <= self.rounds.members
        assert list(plan.slots) == sorted(plan.slots)
        for name in plan.devices:
            held = {(s, slot) for s, slot in self.told[name][1] if s == plan.step}
            wanted = {(plan.step, slot) for slot in plan.slots if slot.device == name}
            assert held >= wanted, f"{name} was not told of step {plan.step}"
        self._last_step = plan.step
        self._plan = plan
        self._server_slots = None
        self._activations = {slot for step, slot in self.early if step == plan.step}
        self._activations &= plan.slot_set
        self._gradients = set()

    def _run_server(self, run: RunServer) -> list[Action]:
        plan = self.plan
        assert run.step == plan.step
        assert run.slots
        assert set(run.slots) <= self._activations, "the server ran without activations"
        assert list(run.slots) == [slot for slot in plan.slots if slot in set(run.slots)]
        assert self._server_slots is None, "the server ran twice on the same step"
        bad = [slot for slot in run.slots if slot.device in self.poisoned]
        if bad:
            return self.rounds.refuse_contributions(bad, self.now_s)
        self._server_slots = run.slots
        return self.rounds.server_done(self.now_s)

    def _apply(self, apply: ApplyStep) -> list[Action]:
        assert apply.step == self.plan.step
        assert self._server_slots is not None, "applied without a server pass"
        assert set(apply.slots) | set(apply.lost) == set(self._server_slots)
        assert not set(apply.slots) & set(apply.lost)
        assert apply.slots
        assert apply.duration_s >= 0
        if not self.settings.frozen:
            assert set(apply.slots) <= self._gradients, "applied without gradients"
        for slot in apply.slots:
            self._count_trained(slot)
        self.applied.append(apply)
        self._plan = None
        return [] if self.hold_applied else self.rounds.applied(self.now_s)

    def _count_trained(self, slot: PlannedSlot) -> None:
        key = (self.rounds.epoch, slot.device)
        held = self.rounds.account.devices[slot.device].samples
        seen = self.trained.setdefault(key, np.zeros(held, np.int64))
        assert sum(count for _, count in slot.spans) == slot.count
        for offset, count in slot.spans:
            assert offset + count <= held
            seen[offset : offset + count] += 1
        assert seen.max() == 1, f"{slot} was trained twice"

    def _end_epoch(self, end: EndEpoch) -> list[Action]:
        assert self._plan is None
        self.epochs.append(end)
        assert end.trained + sum(end.missed.values()) == end.samples
        for name, account in self.rounds.account.devices.items():
            seen = self.trained.get((end.epoch, name), np.zeros(account.samples, np.int64))
            assert seen.sum() + end.missed.get(name, 0) == account.samples
        held = self.hold_applied or self.hold_epochs
        return [] if held else self.rounds.evaluated(self.now_s)

    # What must hold at any moment

    def check(self) -> None:
        rounds = self.rounds
        assert rounds.version == len(self.applied)
        assert sum(rounds.trained.values()) == sum(int(a.sum()) for a in self.trained.values())
        for name, account in rounds.account.devices.items():
            document = account.document()
            outstanding = {tuple(span) for span in document["outstanding"]}
            planned = [span for _, slot in rounds.slots_of(name) for span in slot.spans]
            assert len(planned) == len(set(planned))
            assert set(planned) == outstanding
            spans = sorted([*document["free"], *document["outstanding"]])
            assert all(o + c <= p for (o, c), (p, _) in pairwise(spans))
            assert sum(c for _, c in spans) + account.trained == account.samples
        self._check_that_something_can_happen()

    def _check_that_something_can_happen(self) -> None:
        rounds = self.rounds
        if rounds.phase in (Phase.FORWARD, Phase.BACKWARD):
            assert rounds.waited_for
            assert set(rounds.waited_for) <= rounds.members
            assert rounds.deadline_s is not None
            for name in rounds.waited_for:
                assert self.owed(name), f"{name} does not know what it owes"
        elif rounds.phase is Phase.WAITING and rounds.account.samples and rounds.members:
            assert rounds.deadline_s is not None


def fingerprint(rounds: Rounds) -> tuple[object, ...]:
    """All that a refused message must not change."""
    devices = set(rounds.account.devices) | rounds.members
    return (
        rounds.phase,
        rounds.epoch,
        rounds.step,
        rounds.version,
        rounds.waited_for,
        rounds.deadline_s,
        rounds.account.document(),
        {name: rounds.slots_of(name) for name in devices},
        dict(rounds.trained),
        dict(rounds.missed),
        dict(rounds.attendance.missed),
        set(rounds.attendance.sitting_out),
        rounds.delays.state(),
    )


SAMPLES = {"a": 20, "b": 16, "c": 12}
DEADLINE = DeadlineSettings(first_s=60.0, min_s=2.0, factor=5.0, max_misses=2, return_grace_s=30.0)


def build_settings(**changes: Any) -> RoundSettings:
    arguments: dict[str, Any] = {
        "global_batch": 12,
        "epochs": 2,
        "policy": PolicySettings(name=Policy.UGS, refit_every=3),
        "deadline": DEADLINE,
        "min_devices": 3,
        "seed": 4,
    }
    return RoundSettings(**(arguments | changes))


def build_fleet(samples: dict[str, int] | None = None, **changes: Any) -> Owner:
    """A run in its first step, with all devices present."""
    held = SAMPLES if samples is None else samples
    owner = Owner(build_settings(**({"min_devices": len(held)} | changes)))
    for device, count in held.items():
        owner.ready(device, count)
    return owner


def in_backward(owner: Owner) -> Owner:
    owner.run_until(Phase.BACKWARD)
    return owner


def refusal_of(owner: Owner, send: Callable[..., None], *args: Any, **kwargs: Any) -> Refusal:
    """Why a message is refused; nothing may have changed by it."""
    before = fingerprint(owner.rounds)
    with pytest.raises(PeerProtocolError) as caught:
        send(*args, **kwargs)
    assert fingerprint(owner.rounds) == before
    owner.check()
    return caught.value.reason


def slot_of(owner: Owner, device: str) -> PlannedSlot:
    return next(slot for slot in owner.plan.slots if slot.device == device)
