"""A run goes on from what it wrote down, with the steps that would have come."""

from __future__ import annotations

import json

import pytest

from coordinator.actions import Phase
from coordinator.allocation import Policy
from coordinator.planning import PlannedSlot, PolicySettings
from coordinator.rounds import Rounds
from tests.round_owner import SAMPLES, Owner, build_fleet, build_settings, slot_of

LDS = PolicySettings(
    name=Policy.LDS, delta=0.8, refit_every=2, delays_s={"a": 0.2, "b": 2.0, "c": 0.5}
)


def _steps(owner: Owner) -> list[tuple[int, tuple[PlannedSlot, ...]]]:
    return [(apply.step, apply.slots) for apply in owner.applied]


POLICIES = {
    "ugs": PolicySettings(name=Policy.UGS, refit_every=2),
    "lds": LDS,
    "fls": PolicySettings(name=Policy.FLS),
    "class-targeted": PolicySettings(name=Policy.CLASS_TARGETED, refit_every=2),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_resumed_run_has_the_same_steps_from_wherever_it_ended(policy: str, frozen: bool) -> None:
    def begin() -> Owner:
        return build_fleet(policy=POLICIES[policy], frozen=frozen, global_batch=7)

    whole = begin()
    whole.run_until(Phase.DONE)
    most = len(whole.applied)
    for answers in range(0, 3 * len(SAMPLES) * most, 2):
        owner = begin()
        for _ in range(answers):
            if owner.rounds.phase is Phase.DONE:
                break
            owner.answer(owner.owed()[:1])
        if owner.rounds.phase is Phase.DONE:
            break
        owner.restart()
        for device in ("c", "a", "b"):
            owner.ready(device, SAMPLES[device])
        owner.check()
        owner.run_until(Phase.DONE)
        assert _steps(owner) == _steps(whole)
        assert owner.rounds.trained == whole.rounds.trained


def _move(owner: Owner) -> None:
    """All that devices owe now, or the owner's own next word."""
    if owner.rounds.phase is Phase.APPLYING:
        owner.perform(owner.rounds.applied(owner.now_s))
    elif owner.rounds.phase is Phase.EPOCH_END:
        owner.perform(owner.rounds.evaluated(owner.now_s))
    else:
        owner.answer(owner.owed())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("policy", ["ugs", "lds"])
def test_run_resumed_between_two_steps_has_the_same_steps(policy: str, frozen: bool) -> None:
    """A checkpoint is written after a step or an epoch, before the next one begins."""

    def begin() -> Owner:
        return build_fleet(policy=POLICIES[policy], frozen=frozen, global_batch=7)

    whole = begin()
    whole.run_until(Phase.DONE)
    checkpoints = len(whole.applied) + len(whole.epochs)
    for number in range(checkpoints):
        owner = begin()
        owner.hold_applied = True
        for _ in range(number + 1):
            _move(owner)
            while owner.rounds.phase not in (Phase.APPLYING, Phase.EPOCH_END):
                _move(owner)
        owner.hold_applied = False
        owner.restart()
        if owner.rounds.phase is Phase.EPOCH_END:
            owner.perform(owner.rounds.evaluated(owner.now_s))
        if owner.rounds.phase is not Phase.DONE:
            for device, samples in SAMPLES.items():
                owner.ready(device, samples)
            owner.run_until(Phase.DONE)
        assert _steps(owner) == _steps(whole)
        assert [end.epoch for end in owner.epochs] == [0, 1]


def test_resumed_run_waits_for_its_devices_before_it_goes_on() -> None:
    owner = build_fleet()
    owner.run_until(Phase.BACKWARD, 2)
    owner.restart()
    owner.ready("a", 20)
    owner.ready("b", 16)
    assert (owner.rounds.phase, owner.rounds.waited_for) == (Phase.WAITING, ("c",))
    owner.ready("c", 12)
    assert (owner.rounds.phase, owner.rounds.step) == (Phase.FORWARD, 2)


def test_resumed_run_goes_on_without_a_device_that_does_not_return() -> None:
    owner = build_fleet()
    owner.run_until(Phase.BACKWARD, 2)
    owner.restart()
    owner.ready("a", 20)
    owner.ready("b", 16)
    owner.pass_deadline()
    assert owner.rounds.phase is Phase.FORWARD
    owner.run_until(Phase.DONE)
    assert set(owner.epochs[0].missed) == {"c"}


def test_resumed_run_takes_a_device_with_other_data_in_with_the_next_epoch() -> None:
    owner = build_fleet()
    owner.run_until(Phase.BACKWARD, 2)
    owner.restart()
    owner.ready("a", 20)
    owner.ready("b", 16)
    owner.ready("c", 13)
    assert owner.rounds.phase is Phase.FORWARD  # nothing to wait for
    owner.run_until(Phase.DONE)
    assert set(owner.epochs[0].missed) <= {"c"}
    assert owner.epochs[1].samples == 49


def test_resumed_device_with_other_limits_is_planned_by_them() -> None:
    owner = build_fleet({"a": 60, "b": 60})
    owner.run_until(Phase.BACKWARD)
    owner.restart()
    owner.ready("a", 60, max_batch=1)
    owner.ready("b", 60)
    window_end = max(step for step, _ in owner.rounds.slots_of("b"))
    owner.run_until(Phase.DONE)
    counts = [
        s.count for a in owner.applied if a.step > window_end for s in a.slots if s.device == "a"
    ]
    assert set(counts) == {1}


def test_run_that_ended_before_it_began_waits_for_enough_devices_again() -> None:
    owner = Owner(build_settings(min_devices=2))
    owner.ready("a", 20)
    owner.restart()
    owner.ready("a", 20)
    assert owner.rounds.phase is Phase.WAITING
    owner.ready("b", 16)
    assert owner.rounds.phase is Phase.FORWARD


def test_step_put_back_is_the_next_one_again_without_what_it_had_lost() -> None:
    owner = build_fleet()
    lost = slot_of(owner, "a")
    owner.answer(owner.owed("b"))
    owner.gone("a")
    plan = owner.plan
    owner.rounds.abandon_open_step()
    assert owner.rounds.phase is Phase.WAITING
    again = owner.rounds.planned(plan.step)
    assert set(again.slots) == set(plan.slots) - {lost}
    owner.rounds.abandon_open_step()  # nothing is open any more
    assert owner.rounds.planned(plan.step) == again


def test_state_is_json_and_survives_it() -> None:
    owner = build_fleet(policy=LDS)
    owner.run_until(Phase.BACKWARD, 3)
    owner.rounds.abandon_open_step()
    document = owner.rounds.document()
    other = Rounds(owner.settings)
    other.restore(json.loads(json.dumps(document)), now_s=0.0)
    assert other.document() == document  # before any device has come back
