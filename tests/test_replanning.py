"""A device changes speed for good in the middle of an epoch: the plan is made anew.

The real state machine, planner and estimators; devices answer after the time that they take.
"""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.actions import Phase
from coordinator.allocation import Policy
from coordinator.planning import PolicySettings
from tests.round_owner import Owner, build_fleet

DEVICES = [f"d{k:02d}" for k in range(16)]
CHANGED = "d03"
JUMP_AT = 31


class _Fleet:
    """Answers every range after its device's time, and writes down who took part."""

    def __init__(self, policy: PolicySettings, slow: set[str], *, frozen: bool = False) -> None:
        self.seconds = {name: 1.0 if name in slow else 0.1 for name in DEVICES}
        self.owner: Owner = build_fleet(
            dict.fromkeys(DEVICES, 300), policy=policy, global_batch=48, epochs=1, frozen=frozen
        )
        self.rng = np.random.default_rng(1)
        self.plans_made: list[int] = []  # the steps before which the rest was planned anew

    def run_step(self) -> dict[str, int]:
        """Counts of one step; the step that was planned behind it is noted when it changes."""
        owner = self.owner
        counts = {slot.device: slot.count for slot in owner.plan.slots}
        step = owner.step
        expected = owner.rounds.slots_by_device()
        while owner.step == step and owner.rounds.phase is not Phase.DONE:
            self._answer_phase()
        if self._is_planned_anew(expected, step):
            self.plans_made.append(owner.step)
        return counts

    def _answer_phase(self) -> None:
        owner = self.owner
        opened_s, step, phase = owner.now_s, owner.step, owner.rounds.phase
        for slot in sorted(owner.owed(), key=lambda slot: self.seconds[slot.device]):
            if (owner.step, owner.rounds.phase) != (step, phase):
                break
            owner.now_s = opened_s + self.seconds[slot.device] * self.rng.lognormal(0, 0.05)
            owner.answer([slot])

    def _is_planned_anew(self, before: dict[str, list[tuple[int, object]]], step: int) -> bool:
        """Whether a step that had been planned already is another one now."""
        after = self.owner.rounds.slots_by_device()
        planned = {number for slots in before.values() for number, _ in slots if number > step}
        return any(
            {e for e in before.get(d, []) if e[0] > step}
            != {e for e in after.get(d, []) if e[0] in planned}
            for d in DEVICES
        )


@pytest.mark.parametrize(("before_s", "after_s"), [(0.1, 1.0), (0.1, 0.4), (1.0, 0.1)])
def test_plan_is_redone_within_twenty_steps_of_a_lasting_change(
    before_s: float, after_s: float
) -> None:
    # A small delta: the slow devices have samples left when the change comes.
    fleet = _Fleet(PolicySettings(name=Policy.LDS, delta=0.3), slow={"d00", "d01"})
    fleet.seconds[CHANGED] = before_s
    while fleet.owner.step < JUMP_AT:
        fleet.run_step()
    unrest = list(fleet.plans_made)
    fleet.seconds[CHANGED] = after_s
    before = fleet.owner.rounds.delays.delays_s([CHANGED], [3])[0]
    while fleet.owner.step < JUMP_AT + 20:
        fleet.run_step()
    believed_s = fleet.owner.rounds.delays.delays_s([CHANGED], [3])[0]
    assert before == pytest.approx(2 * before_s, rel=0.2)
    assert believed_s == pytest.approx(2 * after_s, rel=0.2)
    redone = [step for step in fleet.plans_made if step not in unrest]
    assert redone, "nothing was planned anew"
    assert redone[0] <= JUMP_AT + 20
    fleet.owner.check()


def test_device_that_became_slow_gives_the_rest_in_fewer_and_larger_portions() -> None:
    fleet = _Fleet(PolicySettings(name=Policy.LDS, delta=1.5), slow={"d00", "d01"})
    portions: dict[bool, list[int]] = {False: [], True: []}
    while fleet.owner.rounds.phase is not Phase.DONE and fleet.owner.step < 75:
        if fleet.owner.step == JUMP_AT:
            fleet.seconds[CHANGED] = 1.0
        step = fleet.owner.step
        count = fleet.run_step().get(CHANGED, 0)
        if count and not JUMP_AT <= step < JUMP_AT + 20:
            portions[step > JUMP_AT].append(count)
    assert np.mean(portions[True] or [99]) > 2 * np.mean(portions[False])


@pytest.mark.parametrize(
    "policy",
    [
        PolicySettings(name=Policy.UGS),
        PolicySettings(name=Policy.LDS, delays_s=dict.fromkeys(DEVICES, 1.0)),
    ],
)
def test_plan_that_does_not_depend_on_measured_delays_stays(policy: PolicySettings) -> None:
    fleet = _Fleet(policy, slow=set())
    while fleet.owner.step < 60:
        if fleet.owner.step == JUMP_AT:
            fleet.seconds[CHANGED] = 1.0
        fleet.run_step()
    assert fleet.owner.rounds.delays.forward(CHANGED).changes == 1  # type: ignore[union-attr]
    assert fleet.plans_made == []


def test_fleet_that_keeps_jumping_is_planned_anew_every_fifth_step_at_most() -> None:
    fleet = _Fleet(PolicySettings(name=Policy.LDS, deviation_budget=0.5), slow=set())
    while fleet.owner.rounds.phase is not Phase.DONE:
        block = fleet.owner.step // 4
        for k, name in enumerate(DEVICES):
            fleet.seconds[name] = 1.0 if (block + k) % 3 == 0 else 0.1
        fleet.run_step()
    gaps = np.diff(fleet.plans_made)
    assert len(gaps) > 3
    assert gaps.min() >= 5
    assert fleet.owner.epochs[0].trained == 16 * 300


def test_plan_by_class_is_made_anew_too_and_trains_every_sample_once() -> None:
    fleet = _Fleet(PolicySettings(name=Policy.CLASS_TARGETED), slow={"d00"})
    while fleet.owner.rounds.phase is not Phase.DONE:
        if fleet.owner.step == JUMP_AT:
            for name in DEVICES[8:]:
                fleet.seconds[name] = 1.0
        fleet.run_step()
    # Whole steps go to single devices here, so it takes a while until the slow ones are seen.
    assert fleet.plans_made
    assert fleet.plans_made[0] > JUMP_AT
    assert fleet.owner.epochs[0].trained == 16 * 300


def test_frozen_run_is_planned_anew_and_trains_every_sample_once() -> None:
    policy = PolicySettings(name=Policy.LDS, deviation_budget=0.5)
    fleet = _Fleet(policy, slow={"d00"}, frozen=True)
    while fleet.owner.rounds.phase is not Phase.DONE:
        if fleet.owner.step >= JUMP_AT:
            fleet.seconds[CHANGED] = 2.0
        fleet.run_step()
    assert any(JUMP_AT < step <= JUMP_AT + 20 for step in fleet.plans_made)
    assert fleet.owner.epochs[0].trained == 16 * 300
