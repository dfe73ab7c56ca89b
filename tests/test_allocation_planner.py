"""Properties that hold for every plan, whatever the fleet: sums, caps, the end, and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.allocation import EpochPlanner, Policy, plan_epoch

# An overflow or a division by zero is a fault even where the plan comes out right.
pytestmark = pytest.mark.filterwarnings("error")

SAMPLING = (Policy.UGS, Policy.LDS)


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a planner: from one device and one class, empty devices, any cap and delay."""
    devices, classes = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    row = st.lists(st.one_of(st.just(0), st.integers(0, 30)), min_size=classes, max_size=classes)
    counts = draw(st.lists(row, min_size=devices, max_size=devices))
    caps = st.one_of(
        st.none(),
        st.integers(1, 40),
        st.lists(st.integers(1, 40), min_size=devices, max_size=devices),
    )
    delay = st.floats(0, 1e6, allow_subnormal=False)
    delays = st.lists(delay, min_size=devices, max_size=devices)
    arguments: dict[str, Any] = {
        "label_counts": counts,
        "global_batch": draw(st.one_of(st.integers(1, 64), st.just(10_000))),
        "delays_s": draw(st.one_of(st.none(), delays)),
        "max_batch": draw(caps),
        "refit_every": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 2**32)),
    }
    choice = draw(st.sampled_from(["delta", "deviation_budget", None]))
    if choice is not None:
        arguments[choice] = draw(st.floats(0, 12))
    return arguments


def _caps(arguments: dict[str, Any], devices: int) -> np.ndarray:
    cap = arguments["max_batch"]
    return np.broadcast_to(2**40 if cap is None else cap, (devices,))


@settings(deadline=None, max_examples=200)
@given(arguments=fleets(), policy=st.sampled_from(list(Policy)))
def test_every_sample_is_allocated_once_and_caps_hold(
    arguments: dict[str, Any], policy: Policy
) -> None:
    held = np.sum(arguments["label_counts"], axis=1)
    caps = _caps(arguments, held.size)
    total = np.zeros_like(held)
    for counts in plan_epoch(policy=policy, **arguments):
        assert counts.shape == held.shape
        assert counts.dtype == np.int64
        assert counts.sum() > 0
        assert (counts >= 0).all()
        assert (counts <= caps).all()
        total += counts
    assert total.tolist() == held.tolist()


@settings(deadline=None, max_examples=200)
@given(arguments=fleets(), policy=st.sampled_from(SAMPLING))
def test_every_step_is_as_large_as_batch_rest_and_caps_permit(
    arguments: dict[str, Any], policy: Policy
) -> None:
    left = np.sum(arguments["label_counts"], axis=1)
    caps = _caps(arguments, left.size)
    for counts in plan_epoch(policy=policy, **arguments):
        room = int(np.minimum(left, caps).sum())
        assert counts.sum() == min(arguments["global_batch"], room)
        left = left - counts


@settings(deadline=None, max_examples=100)
@given(arguments=fleets(), policy=st.sampled_from(SAMPLING))
def test_without_caps_every_step_but_the_last_is_the_global_batch(
    arguments: dict[str, Any], policy: Policy
) -> None:
    steps = [
        int(step.sum()) for step in plan_epoch(policy=policy, **arguments | {"max_batch": None})
    ]
    total, batch = int(np.sum(arguments["label_counts"])), arguments["global_batch"]
    rest = total % batch
    assert steps == [batch] * (total // batch) + ([rest] if rest else [])


@settings(deadline=None, max_examples=150)
@given(arguments=fleets(), policy=st.sampled_from(list(Policy)), data=st.data())
def test_restored_planner_continues_identically_from_any_step(
    arguments: dict[str, Any], policy: Policy, data: st.DataObject
) -> None:
    whole = EpochPlanner(policy=policy, **arguments)
    steps = _drain(whole)
    at = data.draw(st.integers(0, len(steps)))
    broken_off = EpochPlanner(policy=policy, **arguments)
    for _ in range(at):
        broken_off.next_step()
    state = json.loads(json.dumps(broken_off.state(), allow_nan=False))
    fresh = EpochPlanner(policy=policy, **arguments | {"seed": 99})
    fresh.restore(state)
    for resumed in (EpochPlanner.from_state(arguments["label_counts"], state), fresh):
        assert _drain(resumed) == steps[at:]
        assert resumed.steps_planned == len(steps)
        assert resumed.last_delta == whole.last_delta


@settings(deadline=None, max_examples=100)
@given(arguments=fleets(), data=st.data())
def test_new_delays_and_corrected_remainder_survive_a_restore(
    arguments: dict[str, Any], data: st.DataObject
) -> None:
    planner = EpochPlanner(policy="lds", **arguments)
    held = planner.remaining
    planner.next_step()
    delays = data.draw(st.lists(st.floats(0, 9), min_size=held.size, max_size=held.size))
    planner.set_delays(delays)
    planner.set_remaining(held)
    state = json.loads(json.dumps(planner.state()))
    resumed = EpochPlanner.from_state(arguments["label_counts"], state)
    steps = _drain(planner)
    assert _drain(resumed) == steps
    assert np.sum(steps, axis=0, dtype=np.int64).tolist() == (held.tolist() if steps else 0)


def _drain(planner: EpochPlanner) -> list[list[int]]:
    steps = []
    while (counts := planner.next_step()) is not None:
        steps.append(counts.tolist())
    assert not planner.remaining.any()
    return steps


@pytest.mark.parametrize("policy", list(Policy))
def test_same_seed_same_plan_and_nothing_else_changes_it(policy: Policy) -> None:
    counts = np.random.default_rng(0).integers(0, 40, (9, 4))
    plans = [
        [step.tolist() for step in plan_epoch(counts, 16, policy=policy, seed=seed)]
        for seed in (5, 5, 6)
    ]
    assert plans[0] == plans[1]
    assert (plans[0] == plans[2]) == (policy in (Policy.FLS, Policy.FPLS))


def test_equal_local_batches_until_a_device_runs_out() -> None:
    steps = [step.tolist() for step in plan_epoch([[10], [4], [0]], 9, policy="fls")]
    assert steps == [[3, 3, 0], [3, 1, 0], [3, 0, 0], [1, 0, 0]]


def test_local_batch_is_at_least_one_when_the_batch_is_smaller_than_the_fleet() -> None:
    for policy in ("fls", "fpls"):
        first = next(plan_epoch([[5], [5], [5]], 1, policy=policy))
        assert first.tolist() == [1, 1, 1]


def test_proportional_local_batches_follow_the_samples_held() -> None:
    steps = [step.tolist() for step in plan_epoch([[60, 0], [0, 30], [5, 5]], 10, policy="fpls")]
    assert steps == [[6, 3, 1]] * 10


def test_what_a_cap_takes_from_a_local_batch_goes_to_the_others() -> None:
    steps = plan_epoch([[40], [40], [40]], 30, policy="fls", max_batch=[4, 100, 100])
    assert next(steps).tolist() == [4, 13, 13]


def test_one_small_cap_does_not_shrink_the_steps_while_others_have_room() -> None:
    counts = [[50, 50]] * 4
    steps = list(plan_epoch(counts, 40, policy="ugs", max_batch=[2, 100, 100, 100]))
    # 3 devices fill 7 steps; what the small device still holds takes steps of its own.
    assert [int(step.sum()) for step in steps[:7]] == [40] * 7
    assert {int(step.sum()) for step in steps[9:]} <= {2}


def test_largest_integers_stand_for_no_cap() -> None:
    most = np.iinfo(np.int64).max
    for cap in ([3, most], np.array([3, most]), most):
        step = next(plan_epoch([[9], [9]], 12, policy="ugs", max_batch=cap))
        assert step.sum() == 12


def test_repeating_the_same_delays_changes_nothing() -> None:
    counts = np.random.default_rng(3).integers(0, 30, (8, 3))
    delays = np.arange(8.0)
    told, plain = (EpochPlanner(counts, 16, policy="lds", delays_s=delays) for _ in range(2))
    steps = []
    while (step := told.next_step()) is not None:
        steps.append(step.tolist())
        told.set_delays(delays)
    assert steps == _drain(plain)


def test_a_step_is_planned_only_over_what_remains() -> None:
    planner = EpochPlanner([[8, 0], [0, 8]], 4, policy="ugs", remaining=[0, 6])
    assert _drain(planner) == [[0, 4], [0, 2]]


def test_returned_samples_are_planned_again() -> None:
    planner = EpochPlanner([[8], [8]], 16, policy="lds", delta=1.0)
    planner.next_step()
    assert planner.next_step() is None
    planner.set_remaining([3, 0])
    assert _drain(planner) == [[3, 0]]


def test_expected_class_mix_is_that_of_what_is_left() -> None:
    planner = EpochPlanner([[30, 0], [0, 10]], 8, policy="ugs", remaining=[10, 10])
    assert planner.step_class_mix_expected.tolist() == [0.5, 0.5]
    tilted = EpochPlanner(
        [[30, 0], [0, 30]], 8, policy="lds", delta=3.0, delays_s=[1.0, 9.0], remaining=[30, 30]
    )
    mix = tilted.step_class_mix_expected
    assert mix.sum() == pytest.approx(1)
    assert mix[1] > 0.6
    empty = EpochPlanner([[3, 4]], 8, policy="lds", remaining=[0])
    assert empty.step_class_mix_expected.tolist() == [0.0, 0.0]


def test_asking_for_the_expected_mix_does_not_change_the_plan() -> None:
    counts = np.random.default_rng(1).integers(0, 30, (8, 3))
    asked, plain = (
        EpochPlanner(counts, 16, policy="lds", delays_s=np.arange(8.0), seed=3) for _ in range(2)
    )
    steps = []
    while (step := asked.next_step()) is not None:
        _ = asked.step_class_mix_expected
        steps.append(step.tolist())
    assert steps == _drain(plain)


def test_default_of_lds_is_a_budget_of_ten_percent() -> None:
    counts = np.random.default_rng(2).integers(0, 90, (20, 5))
    delays = np.where(np.arange(20) < 2, 9.0, 1.0)
    default, given_budget = (
        EpochPlanner(counts, 64, policy="lds", delays_s=delays, **choice)
        for choice in ({}, {"deviation_budget": 0.10})
    )
    assert _drain(default) == _drain(given_budget)


def test_returned_arrays_are_the_callers_own() -> None:
    planner = EpochPlanner([[5], [7]], 100, policy="ugs")
    planner.remaining[:] = 0
    step = planner.next_step()
    assert step is not None
    assert step.tolist() == [5, 7]
    step[:] = -1
    assert planner.remaining.tolist() == [0, 0]


def test_state_of_another_fleet_or_version_is_refused() -> None:
    planner = EpochPlanner([[5], [7]], 4, policy="ugs")
    state = planner.state()
    with pytest.raises(ValueError, match="fingerprint"):
        EpochPlanner([[7], [5]], 4, policy="ugs").restore(state)
    with pytest.raises(ValueError, match="policy 'lds', received 'ugs'"):
        EpochPlanner([[5], [7]], 4, policy="lds").restore(state)
    with pytest.raises(ValueError, match="version 1, received 2"):
        planner.restore(state | {"version": 2})
    with pytest.raises(ValueError, match="section 'settings'"):
        EpochPlanner.from_state([[5], [7]], {"version": 1})


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"label_counts": [[-1, 2]]}, "label_counts: expected whole numbers from 0"),
    ({"label_counts": [[0.5, 2]]}, "label_counts: expected whole numbers, received 0.5"),
    ({"global_batch": 0}, "global_batch: expected a whole number from 1, received 0"),
    ({"global_batch": 2.5}, "global_batch: expected a whole number from 1, received 2.5"),
    (
        {"policy": "best"},
        "policy: expected one of fls, fpls, ugs, lds, class-targeted, received 'best'",
    ),
    ({"delays_s": [1.0, float("nan")]}, r"delays_s\[1\]: expected finite"),
    ({"delays_s": [1.0]}, r"delays_s: expected shape \(2,\), received \(1,\)"),
    ({"delta": -1}, "delta: expected a finite number from 0, received -1"),
    ({"delta": "big"}, "delta: expected a finite number from 0, received 'big'"),
    ({"deviation_budget": -0.1}, "deviation_budget: expected a finite number from 0"),
    ({"delta": 1.0, "deviation_budget": 0.1}, "delta, deviation_budget: expected at most one"),
    ({"max_batch": 0}, "max_batch: expected a whole number from 1, received 0"),
    ({"max_batch": [4, 0]}, "max_batch: expected whole numbers from 1"),
    ({"max_batch": [4]}, r"max_batch: expected shape \(2,\), received \(1,\)"),
    ({"refit_every": 0}, "refit_every: expected a whole number from 1, received 0"),
    ({"seed": -3}, "seed: expected a whole number from 0, received -3"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_the_first_step(
    change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "label_counts": [[1, 2], [3, 4]],
        "global_batch": 4,
        "policy": "lds",
    }
    with pytest.raises(ValueError, match=message):
        plan_epoch(**arguments | change)


@pytest.mark.parametrize("remaining", [[1, 8], [-1, 2], [1]])
def test_remainder_that_the_devices_cannot_have_is_refused(remaining: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^remaining"):
        EpochPlanner([[1, 2], [3, 4]], 4, policy="ugs", remaining=remaining)


def test_allocation_needs_neither_torch_nor_a_broker_client() -> None:
    program = (
        "import sys; import coordinator.allocation, coordinator.delays; "
        "sys.exit(bool({'torch', 'paho', 'onnxruntime', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
