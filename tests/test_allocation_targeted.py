"""Class-targeted sampling: UGS's class counts, supplied so that steps are over soon."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.allocation import EpochPlanner, plan_epoch
from coordinator.allocation.pace import plan_pace
from coordinator.allocation.supply import (
    Demand,
    Speeds,
    fill_exactly,
    fill_greedily,
    smallest_supply,
)
from coordinator.allocation.targeted import ClassTargetedSampling

pytestmark = pytest.mark.filterwarnings("error")

Times = list[float]


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a planner with both parts of delays, zeros among them."""
    devices, classes = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    row = st.lists(st.one_of(st.just(0), st.integers(0, 20)), min_size=classes, max_size=classes)
    part = st.lists(
        st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=devices, max_size=devices
    )
    caps = st.lists(st.integers(1, 30), min_size=devices, max_size=devices)
    return {
        "label_counts": draw(st.lists(row, min_size=devices, max_size=devices)),
        "global_batch": draw(st.integers(1, 40)),
        "delays_s": draw(part),
        "per_sample_s": draw(part),
        "max_batch": draw(st.one_of(st.none(), caps)),
        "refit_every": draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 2**32)),
    }


def _drain(planner: EpochPlanner) -> list[list[list[int]]]:
    """Class counts of every step; they must be those of the counts."""
    steps = []
    while (counts := planner.next_step()) is not None:
        class_counts = planner.class_counts
        assert class_counts is not None
        assert class_counts.sum(axis=1).tolist() == counts.tolist()
        steps.append(class_counts.tolist())
    return steps


@settings(deadline=None, max_examples=150)
@given(arguments=fleets())
def test_every_sample_of_every_class_is_allocated_once(arguments: dict[str, Any]) -> None:
    held = np.array(arguments["label_counts"])
    left = held.copy()
    caps = np.array(arguments["max_batch"] or [2**40] * len(held))
    for step in _drain(EpochPlanner(policy="class-targeted", **arguments)):
        counts = np.array(step)
        room = int(np.minimum(left.sum(axis=1), caps).sum())
        assert (counts >= 0).all()
        assert (counts.sum(axis=1) <= caps).all()
        assert counts.sum() == min(arguments["global_batch"], room)
        left -= counts
    assert not left.any()


@settings(deadline=None, max_examples=100)
@given(arguments=fleets())
def test_class_counts_are_those_of_uniform_sampling_with_the_same_seed(
    arguments: dict[str, Any],
) -> None:
    """As many devices as classes, each with one class: there UGS's counts are its class counts."""
    arguments = arguments | {"max_batch": None}
    steps = _drain(EpochPlanner(policy="class-targeted", **arguments))
    pooled = np.diag(np.sum(arguments["label_counts"], axis=0))
    uniform = plan_epoch(pooled, arguments["global_batch"], policy="ugs", seed=arguments["seed"])
    assert [np.sum(step, axis=0).tolist() for step in steps] == [c.tolist() for c in uniform]


@settings(deadline=None, max_examples=100)
@given(arguments=fleets(), data=st.data())
def test_restored_planner_continues_identically(
    arguments: dict[str, Any], data: st.DataObject
) -> None:
    steps = _drain(EpochPlanner(policy="class-targeted", **arguments))
    broken_off = EpochPlanner(policy="class-targeted", **arguments)
    at = data.draw(st.integers(0, len(steps)))
    for _ in range(at):
        broken_off.next_step()
    state = json.loads(json.dumps(broken_off.state(), allow_nan=False))
    assert _drain(EpochPlanner.from_state(arguments["label_counts"], state)) == steps[at:]


def test_planner_restored_after_a_device_ran_out_continues_identically() -> None:
    """Its lists of who holds what are made anew, without the device."""
    arguments: dict[str, Any] = {
        "label_counts": [[0, 0, 9, 8], [0, 13, 0, 0], [0, 0, 0, 1], [4, 0, 0, 0], [1, 1, 0, 0]],
        "global_batch": 13,
        "delays_s": [0.0, 0.0, 0.0, 2.0, 0.25],
        "per_sample_s": [1.0, 0.0, 0.0, 0.0, 1.5],
        "refit_every": 2,
    }
    steps = _drain(EpochPlanner(policy="class-targeted", **arguments))
    for at in range(len(steps) + 1):
        broken_off = EpochPlanner(policy="class-targeted", **arguments)
        for _ in range(at):
            broken_off.next_step()
        state = json.loads(json.dumps(broken_off.state()))
        assert _drain(EpochPlanner.from_state(arguments["label_counts"], state)) == steps[at:]


def _epoch_s(counts: np.ndarray, batch: int, policy: str, fixed: Times, each: Times) -> float:
    steps = plan_epoch(counts, batch, policy=policy, delays_s=fixed, per_sample_s=each, seed=2)
    speeds = Speeds(fixed_K=np.array(fixed), per_sample_K=np.array(each))
    return sum(speeds.seconds(step) for step in steps)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["fixed", "per sample", "both"])
def test_epochs_are_shorter_than_uniform_ones_where_classes_have_two_suppliers(
    seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 2, (20, 5)) * rng.integers(10, 60, (20, 5))
    slow = np.where(rng.random(20) < 0.2, 8.0, 1.0)
    fixed = slow if kind != "per sample" else np.full(20, 0.01)
    each = 0.05 * slow if kind != "fixed" else np.zeros(20)
    times = [
        _epoch_s(counts, 40, policy, fixed.tolist(), each.tolist())
        for policy in ("class-targeted", "ugs")
    ]
    assert times[0] < 0.9 * times[1]


def test_slow_devices_share_the_fewest_steps_that_their_classes_permit() -> None:
    """Three speeds, each class counted out evenly: the bound of every speed is met at once."""
    counts = np.array([[40, 0], [0, 40], [40, 20], [20, 40]])
    fixed = [9.0, 3.0, 1.0, 1.0]
    held = counts.sum(axis=0)
    steps = list(plan_epoch(counts, 20, policy="class-targeted", delays_s=fixed, seed=0))
    slowest, slower = (sum(step[k] > 0 for step in steps) for k in (0, 1))
    per_step = 20 * held / held.sum()
    assert slowest <= 40 / per_step[0] + 1
    assert slower <= 40 / per_step[1] + 1
    together = sum((step[0] > 0) and (step[1] > 0) for step in steps)
    assert together >= min(slowest, slower) - 1


def test_two_devices_with_the_same_class_take_turns_by_speed() -> None:
    planner = EpochPlanner([[30], [30]], 10, policy="class-targeted", delays_s=[1.0, 5.0], seed=0)
    steps = []
    while (counts := planner.next_step()) is not None:
        steps.append(counts.tolist())
    assert steps == [[10, 0]] * 3 + [[0, 10]] * 3


def test_pace_shortens_epochs_of_slow_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were each step over as soon as it could be, slow devices would be waited for at the end."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (40, 10)) * rng.integers(5, 60, (40, 10))
    delays = [0.001] * 40, (0.01 * np.exp(rng.standard_normal(40))).tolist()
    paced_s = _epoch_s(counts, 64, "class-targeted", *delays)
    monkeypatch.setattr(ClassTargetedSampling, "_pace", lambda *_: 0.0)
    assert paced_s < 0.95 * _epoch_s(counts, 64, "class-targeted", *delays)


def test_pace_is_that_of_the_only_possible_plan() -> None:
    speeds = Speeds(fixed_K=np.array([1.0, 1.0]), per_sample_K=np.array([0.1, 0.1]))
    room = np.full(2, 2**40)
    pace = plan_pace(np.array([[50, 0], [0, 50]]), room, speeds, global_batch=20)
    assert pace.least_s == pytest.approx(2.0)
    assert pace.epoch_s == pytest.approx(10.0)


def _best_s(demand: Demand, speeds: Speeds) -> float:
    """Smallest time over all supplies, by trying them all."""
    classes, devices = demand.shape
    best = np.inf
    ranges = [
        range(int(min(demand.remaining_MK[m, k], demand.wanted_M[m])) + 1)
        for m, k in product(range(classes), range(devices))
    ]
    for flat in product(*ranges):
        counts = np.array(flat).reshape(classes, devices)
        fits = (counts.sum(axis=1) == demand.wanted_M).all()
        if fits and (counts.sum(axis=0) <= demand.room_K).all():
            best = min(best, speeds.seconds(counts.sum(axis=0)))
    return best


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_solver_finds_the_smallest_time_of_a_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    remaining = rng.integers(0, 4, (2, 3))
    speeds = Speeds(fixed_K=rng.integers(0, 4, 3) / 2, per_sample_K=rng.integers(0, 3, 3) / 2)
    wanted = np.minimum(rng.integers(0, 4, 2), remaining.sum(axis=1))
    order = np.lexsort((-remaining.sum(axis=0), -speeds.fixed_K))
    demand = Demand(
        wanted_M=wanted,
        remaining_MK=remaining,
        room_K=rng.integers(1, 5, 3),
        holders=tuple(order[row[order] > 0] for row in remaining),
    )
    found = smallest_supply(demand, speeds, least_s=0.0, exactly=True)
    best = _best_s(demand, speeds)
    if found is None:
        assert best == np.inf
        return
    assert found.sum(axis=1).tolist() == wanted.tolist()
    assert (found <= remaining).all()
    assert (found.sum(axis=0) <= demand.room_K).all()
    assert speeds.seconds(found.sum(axis=0)) <= best * 1.011 + 1e-9


def test_solver_meets_what_the_greedy_rule_misses() -> None:
    """Class 1 takes all of device 0, the slowest, and leaves class 0 one sample short."""
    demand = Demand(
        wanted_M=np.array([2, 3]),
        remaining_MK=np.array([[2, 2, 0], [4, 0, 2]]),
        room_K=np.array([2, 1, 2]),
        holders=(np.array([0, 1]), np.array([0, 2])),
    )
    speeds = Speeds(fixed_K=np.array([3.0, 2.0, 1.0]), per_sample_K=np.zeros(3))
    assert fill_greedily(demand, speeds, 3.0) is None
    exact = fill_exactly(demand, speeds, 3.0)
    assert exact is not None
    assert exact.tolist() == [[1, 1, 0], [1, 0, 2]]
    assert fill_exactly(demand, speeds, 1.5) is None


def test_caps_that_forbid_the_drawn_classes_are_filled_with_others() -> None:
    counts = np.array([[50, 0], [0, 50]])
    steps = _drain(EpochPlanner(counts, 20, policy="class-targeted", max_batch=[5, 100], seed=3))
    assert [int(np.sum(step)) for step in steps[:3]] == [20, 20, 20]
    assert all(step[0][0] <= 5 for step in steps)


def test_remainder_of_class_targeted_sampling_is_counted_by_class() -> None:
    counts = [[4, 2], [0, 6]]
    planner = EpochPlanner(counts, 4, policy="class-targeted", remaining=[[1, 0], [0, 3]])
    assert planner.step_class_mix_expected.tolist() == [0.25, 0.75]
    assert np.sum(_drain(planner), axis=0).tolist() == [[1, 0], [0, 3]]
    planner.set_remaining([[0, 2], [0, 0]])
    assert np.sum(_drain(planner), axis=0).tolist() == [[0, 2], [0, 0]]
    with pytest.raises(ValueError, match=r"remaining\[0\]\[0\]: expected at most the 4 samples"):
        planner.set_remaining([[5, 0], [0, 0]])
    with pytest.raises(ValueError, match="remaining: expected 2 axes"):
        planner.set_remaining([1, 3])
    with pytest.raises(ValueError, match=r"remaining: expected shape \(2, 2\)"):
        planner.set_remaining([[1, 3]])


def test_policies_that_leave_classes_to_the_devices_name_no_class_counts() -> None:
    planner = EpochPlanner([[4, 2], [0, 6]], 4, policy="ugs")
    planner.next_step()
    assert planner.class_counts is None


def test_time_per_sample_counts_for_lds_as_that_of_a_typical_contribution() -> None:
    counts = np.random.default_rng(2).integers(10, 90, (20, 5))
    held = counts.sum(axis=1)
    each = np.where(np.arange(20) < 2, 0.9, 0.1)
    total = 1.0 + each * np.maximum(1, np.rint(64 * held / held.sum()))
    plans = [
        [step.tolist() for step in plan_epoch(counts, 64, policy="lds", **delays)]
        for delays in (
            {"delays_s": np.ones(20), "per_sample_s": each},
            {"delays_s": total},
        )
    ]
    assert plans[0] == plans[1]


def test_new_times_per_sample_are_planned_with() -> None:
    planner = EpochPlanner([[40], [40]], 10, policy="class-targeted", delays_s=[1.0, 2.0])
    first = planner.next_step()
    planner.set_delays([2.0, 1.0], [0.0, 0.0])
    second = planner.next_step()
    assert first is not None
    assert second is not None
    assert (first.tolist(), second.tolist()) == ([10, 0], [0, 10])
    with pytest.raises(ValueError, match=r"per_sample_s\[1\]: expected finite seconds"):
        planner.set_delays([1.0, 1.0], [0.0, -1.0])


def test_large_fleets_are_planned_too() -> None:
    rng = np.random.default_rng(4)
    counts = np.zeros((20_000, 10), dtype=np.int64)
    counts[np.arange(20_000), rng.integers(0, 10, 20_000)] = rng.integers(1, 60, 20_000)
    fixed, each = rng.lognormal(0, 1, 20_000), 0.01 * rng.lognormal(0, 1, 20_000)
    planner = EpochPlanner(counts, 4096, policy="class-targeted", delays_s=fixed, per_sample_s=each)
    speeds = Speeds(fixed_K=fixed, per_sample_K=each)
    uniform = plan_epoch(counts, 4096, policy="ugs")
    for _ in range(3):
        step = planner.next_step()
        assert step is not None
        assert step.sum() == 4096
        assert speeds.seconds(step) < 0.2 * speeds.seconds(next(uniform))
