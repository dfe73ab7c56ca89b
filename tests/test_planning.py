"""From counts per step to ranges per device: windows, refills, caps, delays, restoring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.accounting import EpochAccount
from coordinator.allocation import Policy
from coordinator.planning import (
    Member,
    PlannedSlot,
    PlannedStep,
    PolicySettings,
    WindowPlanner,
    permutation_seed,
)
from wire.errors import ConfigError
from wire.settings import parse_settings

BATCH = 12
MEMBERS = {
    "a": Member("a", (30, 0, 10)),
    "b": Member("b", (0, 25, 0)),
    "c": Member("c", (5, 5, 20)),
}


def _no_delays(ids: Sequence[str], counts: Sequence[int]) -> NDArray[np.float64]:
    return np.zeros(len(ids))


class Epoch:
    """A planner with the account and the members that it plans for."""

    def __init__(self, settings: PolicySettings, *, seed: int = 3) -> None:
        self.planner = WindowPlanner(settings, global_batch=BATCH, seed=seed)
        self.account = EpochAccount()
        self.members = dict(MEMBERS)
        self.next_step = 1
        self.delays_of = _no_delays
        for member in MEMBERS.values():
            self.account.add(member.device, member.samples)

    def refill(self, steps: int = 4) -> bool:
        if self.planner.window:
            self.next_step = self.planner.window[-1].step + 1
        return self.planner.refill(
            self.account,
            self.members,
            epoch=0,
            next_step=self.next_step,
            steps=steps,
            delays_of=self.delays_of,
        )

    def train(self) -> PlannedStep:
        """Take the next planned step and count it as trained."""
        step = self.planner.window.popleft()
        for slot in step.slots:
            self.account.mark_trained(slot.device, slot.spans)
        self.next_step = step.step + 1
        return step

    def train_all(self, steps: int = 4) -> list[PlannedStep]:
        done = []
        while self.planner.window or self.refill(steps):
            done.append(self.train())
        return done

    def copy(self, settings: PolicySettings, *, seed: int = 3) -> Epoch:
        """Another process that goes on from what this one writes down."""
        other = Epoch(settings, seed=seed)
        other.planner.restore(json.loads(json.dumps(self.planner.document())))
        other.account = EpochAccount.from_document(json.loads(json.dumps(self.account.document())))
        other.next_step = self.next_step
        return other


def _ugs(**settings: Any) -> PolicySettings:
    return PolicySettings(name=Policy.UGS, **settings)


def test_window_is_filled_to_its_size_and_no_further() -> None:
    epoch = Epoch(_ugs())
    assert epoch.refill(4)
    assert [step.step for step in epoch.planner.window] == [1, 2, 3, 4]
    assert not epoch.refill(4)
    epoch.train()
    assert epoch.refill(4)
    assert [step.step for step in epoch.planner.window] == [2, 3, 4, 5]


def test_epoch_trains_every_sample_once_in_full_batches() -> None:
    epoch = Epoch(_ugs())
    steps = epoch.train_all()
    assert epoch.account.untrained() == {}
    assert [step.samples for step in steps[:-1]] == [BATCH] * (len(steps) - 1)
    assert sum(step.samples for step in steps) == epoch.account.samples == 95
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert not epoch.refill()


def test_slots_of_a_step_are_in_device_order() -> None:
    for step in Epoch(_ugs()).train_all():
        assert list(step.slots) == sorted(step.slots)
        assert step.devices == {slot.device for slot in step.slots}


def test_cleared_window_gives_its_ranges_back_and_is_planned_anew() -> None:
    epoch = Epoch(_ugs())
    epoch.refill(4)
    epoch.train()
    epoch.planner.clear(epoch.account)
    assert not epoch.planner.window
    assert sum(account.free for account in epoch.account.devices.values()) == 95 - BATCH
    del epoch.members["b"]
    steps = epoch.train_all()
    assert steps[0].step == 2
    assert all(slot.device != "b" for step in steps for slot in step.slots)
    assert set(epoch.account.untrained()) <= {"b"}


def test_plan_counts_on_planned_devices_and_on_those_of_the_planner() -> None:
    epoch = Epoch(_ugs())
    assert epoch.planner.devices() == set()
    epoch.refill(1)
    assert epoch.planner.devices() == {"a", "b", "c"}
    epoch.planner.clear(epoch.account)
    assert epoch.planner.devices() == set()


def test_forgetting_keeps_what_is_planned_and_takes_newcomers_in_behind_it() -> None:
    epoch = Epoch(_ugs())
    epoch.refill(2)
    planned = list(epoch.planner.window)
    epoch.planner.forget()
    epoch.members["d"] = Member("d", (40, 0, 0))
    epoch.account.add("d", 40)
    epoch.refill(8)
    assert list(epoch.planner.window)[:2] == planned
    assert "d" in epoch.planner.devices()
    epoch.train_all()
    assert epoch.account.untrained() == {}


def test_empty_fleet_plans_nothing() -> None:
    epoch = Epoch(_ugs())
    epoch.members.clear()
    assert not epoch.refill()
    assert epoch.planner.builds == 0


@pytest.mark.parametrize(("common", "own", "expected"), [(5, None, 5), (None, 4, 4), (5, 3, 3)])
def test_caps_of_run_and_device_hold(common: int | None, own: int | None, expected: int) -> None:
    epoch = Epoch(_ugs(max_batch=common))
    epoch.members["b"] = Member("b", (0, 25, 0), max_batch=own)
    counts = [slot.count for step in epoch.train_all() for slot in step.slots if slot.device == "b"]
    assert max(counts) == expected
    assert sum(counts) == 25


def test_given_delays_are_used_and_unnamed_devices_get_their_median() -> None:
    epoch = Epoch(PolicySettings(name=Policy.LDS, delta=1.0, delays_s={"a": 0.1, "b": 9.0}))
    epoch.delays_of = _must_not_be_asked
    epoch.refill(1)
    assert epoch.planner.document()["planner"]["delays_s"] == [0.1, 9.0, 4.55]


def _must_not_be_asked(ids: Sequence[str], counts: Sequence[int]) -> NDArray[np.float64]:
    raise AssertionError("delays are given")


def test_measured_delays_are_asked_for_at_every_refill_with_typical_counts() -> None:
    epoch = Epoch(PolicySettings(name=Policy.LDS, delta=1.0))
    asked: list[tuple[list[str], list[int]]] = []

    def delays_of(ids: Sequence[str], counts: Sequence[int]) -> NDArray[np.float64]:
        asked.append((list(ids), list(counts)))
        return np.arange(1.0, 1.0 + len(ids)) * len(asked)

    epoch.delays_of = delays_of
    epoch.refill(1)
    epoch.train()
    epoch.refill(1)
    # 40, 25 and 30 of 95 samples, in a batch of 12.
    assert asked == [(["a", "b", "c"], [5, 3, 4])] * 2
    assert epoch.planner.document()["planner"]["delays_s"] == [2.0, 4.0, 6.0]


def test_slow_device_is_spent_in_fewer_steps_with_lds() -> None:
    def steps_of_b(delta: float) -> int:
        delays = {"a": 0.1, "b": 5.0, "c": 0.1}
        epoch = Epoch(PolicySettings(name=Policy.LDS, delta=delta, delays_s=delays))
        return sum("b" in step.devices for step in epoch.train_all())

    assert steps_of_b(2.0) < steps_of_b(0.0)


POLICIES = {
    "ugs": _ugs(),
    "fpls": PolicySettings(name=Policy.FPLS),
    "lds": PolicySettings(
        name=Policy.LDS, delta=0.7, refit_every=3, delays_s={"a": 0.2, "b": 3.0, "c": 0.5}
    ),
    "class-targeted": PolicySettings(name=Policy.CLASS_TARGETED, refit_every=3),
    "lds-budget": PolicySettings(
        name=Policy.LDS, deviation_budget=0.2, refit_every=3, delays_s={"a": 0.2, "b": 3.0}
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_restored_planner_goes_on_the_same_from_every_step(name: str) -> None:
    settings = POLICIES[name]
    whole = Epoch(settings).train_all(3)
    for done in range(len(whole)):
        epoch = Epoch(settings)
        for _ in range(done):
            if not epoch.planner.window:
                epoch.refill(3)
            epoch.train()
        assert epoch.copy(settings).train_all(3) == whole[done:]


def test_restored_planner_builds_with_the_seeds_that_would_have_come() -> None:
    def with_a_loss(epoch: Epoch) -> list[PlannedStep]:
        epoch.planner.clear(epoch.account)
        return epoch.train_all()

    one = Epoch(_ugs())
    one.refill(4)
    other = one.copy(_ugs())
    assert with_a_loss(one) == with_a_loss(other)
    assert one.planner.builds == other.planner.builds == 2


def _classes_of(member: Member, slot: PlannedSlot) -> list[int]:
    """Samples per class in a slot of the order by class."""
    labels = np.repeat(np.arange(len(member.label_counts)), member.label_counts)
    rows = [labels[offset : offset + count] for offset, count in slot.spans]
    return np.bincount(np.concatenate(rows), minlength=len(member.label_counts)).tolist()


CLASS_TARGETED = PolicySettings(
    name=Policy.CLASS_TARGETED, refit_every=3, delays_s={"a": 0.2, "b": 3.0, "c": 0.5}
)


def test_planned_classes_become_one_slot_per_device_with_ranges_by_class() -> None:
    epoch = Epoch(CLASS_TARGETED)
    steps = epoch.train_all()
    assert epoch.account.untrained() == {}
    total = np.zeros(3, dtype=np.int64)
    for step in steps:
        assert [slot.device for slot in step.slots] == sorted(step.devices)
        for slot in step.slots:
            assert slot.offset == slot.spans[0][0]
            assert slot.count == sum(count for _, count in slot.spans)
            total += _classes_of(MEMBERS[slot.device], slot)
    assert total.tolist() == [35, 30, 30]


def test_class_counts_of_planned_steps_are_those_of_uniform_sampling() -> None:
    steps = Epoch(CLASS_TARGETED).train_all()
    mixes = [
        np.sum([_classes_of(MEMBERS[slot.device], slot) for slot in step.slots], axis=0).tolist()
        for step in steps
    ]
    pooled = [[35, 0, 0], [0, 30, 0], [0, 0, 30]]
    epoch = Epoch(_ugs())
    epoch.members = {f"class-{m}": Member(f"class-{m}", tuple(row)) for m, row in enumerate(pooled)}
    epoch.account = EpochAccount()
    for member in epoch.members.values():
        epoch.account.add(member.device, member.samples)
    uniform = [
        [sum(s.count for s in step.slots if s.device == name) for name in sorted(epoch.members)]
        for step in epoch.train_all()
    ]
    assert mixes == uniform


def test_lost_ranges_by_class_are_planned_again_as_what_they_are() -> None:
    epoch = Epoch(CLASS_TARGETED)
    epoch.refill(4)
    first = epoch.train()
    epoch.planner.clear(epoch.account)
    rest = epoch.train_all()
    total = np.sum(
        [_classes_of(MEMBERS[slot.device], slot) for step in (first, *rest) for slot in step.slots],
        axis=0,
    )
    assert total.tolist() == [35, 30, 30]
    assert epoch.account.untrained() == {}


def test_measured_delays_reach_the_planner_of_classes_in_both_parts() -> None:
    epoch = Epoch(PolicySettings(name=Policy.CLASS_TARGETED))
    asked: list[list[int]] = []

    def measured(ids: Sequence[str], counts: Sequence[int]) -> NDArray[np.float64]:
        asked.append(list(counts))
        return np.array([0.5 + 0.1 * count for count in counts])

    epoch.delays_of = measured
    epoch.refill(2)
    assert asked == [[0, 0, 0], [1, 1, 1]]
    state = epoch.planner.document()["planner"]
    assert state["delays_s"] == [0.5] * 3
    assert state["per_sample_s"] == pytest.approx([0.1] * 3)


def test_each_build_draws_anew() -> None:
    one, other = Epoch(_ugs()), Epoch(_ugs())
    other.refill(4)
    other.planner.clear(other.account)
    assert one.train_all() != other.train_all()


def test_other_seed_gives_another_plan() -> None:
    assert Epoch(_ugs(), seed=1).train_all() != Epoch(_ugs(), seed=2).train_all()


def test_permutation_seeds_differ_by_run_epoch_and_device_and_fit_a_double() -> None:
    seeds = {
        permutation_seed(run, epoch, device)
        for run in (0, 1, 2**40)
        for epoch in range(20)
        for device in ("d1", "d10", "d01", "1d", "ü")
    }
    assert len(seeds) == 3 * 20 * 5
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_permutation_seed_is_the_same_in_every_version() -> None:
    """A run that is resumed by a later version must mean the same samples."""
    assert permutation_seed(5, 2, "gateway-07") == 5_897_130_041_235_115


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("refit_every: 0", "$"),
        ("max_batch: 0", "$"),
        ("delta: -1.0", "$"),
        ("deviation_budget: -0.1", "$"),
        ("{delta: 1.0, deviation_budget: 0.1}", "$"),
        ("delays_s: {a: 0.0}", "$"),
        ("delays_s: {a: .nan}", "$"),
        ("delays_s: {a: slow}", "$.delays_s[...]"),
        ("name: fastest", "$.name"),
    ],
)
def test_impossible_policy_settings_are_refused(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text.encode(), PolicySettings, source="run.yaml")
    assert caught.value.field == field
