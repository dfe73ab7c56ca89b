"""The lower bound for time: never above what the best schedule takes, and close to it."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.allocation import plan_epoch
from coordinator.simulation import bound
from coordinator.simulation.bound import time_lower_bound_s
from coordinator.simulation.delay_models import (
    BaseDelay,
    DeviceDelays,
    lognormal_delays,
    straggler_delays,
)

Device = tuple[int, float, float, int]  # samples, fixed_s, per_sample_s, cap


def _best_s(devices: list[Device], global_batch: int) -> float:
    """The least time of all schedules, by trying every step from every state."""
    fixed_s, per_sample_s = [d[1] for d in devices], [d[2] for d in devices]

    def step_s(counts: tuple[int, ...]) -> float:
        parts = zip(counts, fixed_s, per_sample_s, strict=True)
        return max(f + p * x for x, f, p in parts if x)

    @cache
    def best_from(left: tuple[int, ...]) -> float:
        if not any(left):
            return 0.0
        most = [min(n, d[3]) for n, d in zip(left, devices, strict=True)]
        steps = itertools.product(*(range(m + 1) for m in most))
        return min(
            step_s(x) + best_from(tuple(n - c for n, c in zip(left, x, strict=True)))
            for x in steps
            if 0 < sum(x) <= global_batch
        )

    return best_from(tuple(d[0] for d in devices))


def _bound_s(devices: list[Device], global_batch: int) -> float:
    held_K, fixed_s_K, per_sample_s_K, caps_K = (np.array(c) for c in zip(*devices, strict=True))
    delays = DeviceDelays(fixed_s_K.astype(float), per_sample_s_K.astype(float))
    return time_lower_bound_s(held_K, delays, global_batch, caps_K)


def _device(per_sample_s: st.SearchStrategy[float], caps: st.SearchStrategy[int]) -> object:
    return st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, 5.0]), per_sample_s, caps)


@settings(max_examples=60, deadline=None)
@given(
    devices=st.lists(
        _device(st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.integers(1, 5)), min_size=1, max_size=3
    ),
    global_batch=st.integers(1, 5),
)
def test_no_schedule_of_a_tiny_fleet_undercuts_the_bound(
    devices: list[Device], global_batch: int
) -> None:
    best_s = _best_s(devices, global_batch)
    assert _bound_s(devices, global_batch) <= best_s * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    devices=st.lists(_device(st.just(0.0), st.just(99)), min_size=1, max_size=3),
    global_batch=st.integers(1, 5),
)
def test_bound_is_the_best_schedule_where_only_the_fixed_part_counts(
    devices: list[Device], global_batch: int
) -> None:
    assert _bound_s(devices, global_batch) == pytest.approx(_best_s(devices, global_batch))


def test_bound_stays_within_a_few_per_cent_of_the_best_with_parts_per_sample_and_caps() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        devices = [
            (
                int(rng.integers(1, 6)),
                float(rng.choice([0.5, 1, 5])),
                float(rng.choice([0.1, 1])),
                3,
            )
            for _ in range(3)
        ]
        ratios.append(_bound_s(devices, 4) / _best_s(devices, 4))
    assert max(ratios) <= 1 + 1e-9
    assert float(np.mean(ratios)) > 0.95


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    devices=st.integers(1, 20),
    global_batch=st.integers(1, 40),
    cap=st.one_of(st.none(), st.integers(1, 10)),
    per_sample_s=st.sampled_from([0.0, 0.01, 0.5]),
    policy=st.sampled_from(["ugs", "lds"]),
    delta=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_no_policy_beats_the_bound(
    seed: int,
    devices: int,
    global_batch: int,
    cap: int | None,
    per_sample_s: float,
    policy: str,
    delta: float,
) -> None:
    rng = np.random.default_rng(seed)
    counts_KM = rng.integers(0, 30, (devices, 4))
    delays = lognormal_delays(devices, BaseDelay(1.0, per_sample_s), sigma=1.5, seed=seed)
    caps_K = None if cap is None else np.full(devices, cap)
    steps = plan_epoch(
        counts_KM,
        global_batch,
        policy=policy,
        delays_s=delays.fixed_s_K,
        delta=delta if policy == "lds" else None,
        max_batch=cap,
        seed=seed,
    )
    time_s = sum(delays.step_s(step_K) for step_K in steps)
    bound_s = time_lower_bound_s(counts_KM.sum(axis=1), delays, global_batch, caps_K)
    assert bound_s <= time_s * (1 + 1e-9)


def test_slow_devices_in_the_fewest_steps_that_batch_and_caps_permit() -> None:
    delays = DeviceDelays(np.array([10.0, 1.0]), np.zeros(2))
    held_K = np.array([100, 900])
    assert time_lower_bound_s(held_K, delays, 50) == 2 * 10 + 18 * 1
    # A cap of 20 keeps the slow device in 5 steps.
    assert time_lower_bound_s(held_K, delays, 50, np.array([20, 50])) == 5 * 10 + 15 * 1


def test_prices_see_what_caps_of_several_devices_do_together() -> None:
    # The slow device fills the first step, so the other one, capped at 1, needs two more; or it
    # takes part in both. Counting steps alone would say 15.
    assert _bound_s([(2, 10.0, 0.0, 2), (2, 5.0, 0.0, 1)], 2) == pytest.approx(20.0)


def test_part_per_sample_is_shared_out_and_not_counted_for_single_samples_only() -> None:
    # 4 devices x 100 samples, B = 4: best is one sample each, 100 steps of 0.1 + 1 s.
    delays = DeviceDelays(np.full(4, 0.1), np.ones(4))
    assert time_lower_bound_s(np.full(4, 100), delays, 4) == pytest.approx(110.0, rel=1e-3)


def test_devices_without_samples_or_delay_add_nothing() -> None:
    delays = DeviceDelays(np.array([0.0, 2.0, 9.0]), np.zeros(3))
    assert time_lower_bound_s(np.array([50, 10, 0]), delays, 10) == 2.0
    assert time_lower_bound_s(np.array([50, 0, 0]), delays, 10) == 0.0


def test_pooling_many_devices_and_a_grid_of_lengths_only_lower_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delays = straggler_delays(60, BaseDelay(0.2, 0.05), stragglers=6, factor=7, seed=1)
    held_K = np.random.default_rng(2).integers(0, 90, 60)
    caps_K = np.full(60, 10)
    exact_s = time_lower_bound_s(held_K, delays, 60, caps_K)
    monkeypatch.setattr(bound, "MOST_LENGTHS", 300)
    grid_s = time_lower_bound_s(held_K, delays, 60, caps_K)
    monkeypatch.setattr(bound, "MOST_GROUPS", 20)
    pooled_s = time_lower_bound_s(held_K, delays, 60, caps_K)
    assert 0.7 * exact_s < pooled_s <= exact_s * 1.001
    assert 0.95 * exact_s < grid_s <= exact_s * 1.001
