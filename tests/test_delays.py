"""Delay estimates on synthetic series: constant, jump, drift, outliers, heavy tails."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from coordinator.delays import WINDOW, DelayEstimator, FleetDelays

FIXED_S, PER_SAMPLE_S = 0.2, 0.01


def _feed(estimator: DelayEstimator, counts: np.ndarray, seconds: np.ndarray) -> None:
    for count, value_s in zip(counts.tolist(), seconds.tolist(), strict=True):
        estimator.observe(count, value_s)


def _counts(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(4, 40, size)


def _line(counts: np.ndarray) -> np.ndarray:
    return FIXED_S + PER_SAMPLE_S * counts


def test_without_observations_nothing_takes_time() -> None:
    estimator = DelayEstimator()
    assert (estimator.estimate_s(100), estimator.n_observations) == (0.0, 0)


def test_exact_line_is_found_exactly() -> None:
    estimator = DelayEstimator()
    counts = _counts(np.random.default_rng(0), 20)
    _feed(estimator, counts, _line(counts))
    assert estimator.fixed_s == pytest.approx(FIXED_S)
    assert estimator.per_sample_s == pytest.approx(PER_SAMPLE_S)
    assert estimator.estimate_s(128) == pytest.approx(FIXED_S + PER_SAMPLE_S * 128)


def test_constant_count_is_taken_as_fixed_and_estimated_right() -> None:
    estimator = DelayEstimator()
    rng = np.random.default_rng(1)
    _feed(estimator, np.full(40, 16), 0.5 * rng.lognormal(0, 0.1, 40))
    assert estimator.per_sample_s == 0
    assert estimator.estimate_s(16) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_nearly_constant_count_never_extrapolates_beyond_proportional(seed: int) -> None:
    estimator = DelayEstimator()
    rng = np.random.default_rng(seed)
    _feed(estimator, 16 + (rng.random(30) < 0.1), 0.5 * rng.lognormal(0, 0.1, 30))
    assert 0.4 < estimator.estimate_s(16) < 0.6
    assert 0.4 < estimator.estimate_s(64) < 4 * 0.6


@pytest.mark.parametrize("outlier_s", [60.0, 0.0])
def test_single_outlier_hardly_moves_the_estimate(outlier_s: float) -> None:
    rng = np.random.default_rng(2)
    counts = _counts(rng, 20)
    seconds = _line(counts) * rng.lognormal(0, 0.05, 20)
    plain, struck = DelayEstimator(), DelayEstimator()
    _feed(plain, counts, seconds)
    _feed(struck, counts, seconds)
    plain.observe(20, 0.4)
    struck.observe(20, outlier_s)
    assert struck.estimate_s(20) == pytest.approx(plain.estimate_s(20), rel=0.1)


@pytest.mark.parametrize("factor", [0.2, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_lasting_jump_is_believed_within_ten_observations(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimator = DelayEstimator()
    before, after = _counts(rng, 40), _counts(rng, 10)
    _feed(estimator, before, _line(before) * rng.lognormal(0, 0.05, 40))
    _feed(estimator, after, factor * _line(after) * rng.lognormal(0, 0.05, 10))
    assert estimator.estimate_s(20) == pytest.approx(factor * 0.4, rel=0.35)


def test_jump_at_constant_count_is_believed_within_ten_observations() -> None:
    estimator = DelayEstimator()
    _feed(estimator, np.full(40, 16), np.full(40, 0.5))
    _feed(estimator, np.full(10, 16), np.full(10, 2.5))
    assert estimator.estimate_s(16) == 2.5


def test_drift_is_followed_with_a_lag_of_a_few_observations() -> None:
    estimator = DelayEstimator()
    rng = np.random.default_rng(3)
    counts = _counts(rng, 200)
    growth = 1 + 0.01 * np.arange(200)
    _feed(estimator, counts, _line(counts) * growth)
    lag = growth[-1] - estimator.estimate_s(20) / 0.4
    assert 0 < lag < 0.01 * 15


def test_heavy_tails_leave_the_estimate_near_the_typical_delay() -> None:
    rng = np.random.default_rng(4)
    errors = []
    for _ in range(40):
        estimator = DelayEstimator()
        counts = _counts(rng, 60)
        # Pareto with infinite variance on top of the line, median excess 1/5 of it.
        _feed(estimator, counts, _line(counts) * (1 + 0.1 * rng.pareto(1.0, 60) * 2))
        errors.append(estimator.estimate_s(20) / (0.4 * 1.2) - 1)
    assert np.median(np.abs(errors)) < 0.12
    assert np.max(np.abs(errors)) < 0.6


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_never_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimator = DelayEstimator()
    for _ in range(30):
        estimator.observe(int(rng.integers(1, 200)), float(rng.exponential(1.0)))
        assert estimator.fixed_s >= 0
        assert estimator.per_sample_s >= 0
        assert math.isfinite(estimator.estimate_s(10**6))


def test_time_that_is_all_per_sample_keeps_its_slope() -> None:
    estimator = DelayEstimator()
    counts = _counts(np.random.default_rng(5), 20)
    _feed(estimator, counts, 0.02 * counts - 1e-4)
    assert estimator.fixed_s == 0
    assert estimator.per_sample_s == pytest.approx(0.02, rel=0.01)


def test_memory_is_bounded_and_observations_counted() -> None:
    estimator = DelayEstimator()
    _feed(estimator, np.full(1000, 8), np.full(1000, 0.1))
    assert estimator.n_observations == 1000
    assert len(estimator.state()["observations"]) == WINDOW


def test_state_goes_through_json_and_continues_identically() -> None:
    rng = np.random.default_rng(6)
    estimator = DelayEstimator()
    counts = _counts(rng, 50)
    _feed(estimator, counts, _line(counts) * rng.lognormal(0, 0.3, 50))
    copy = DelayEstimator.from_state(json.loads(json.dumps(estimator.state())))
    for each in (estimator, copy):
        each.observe(11, 0.33)
    assert copy.state() == estimator.state()
    assert copy.estimate_s(17) == estimator.estimate_s(17)


@pytest.mark.parametrize(
    ("count", "seconds", "named"),
    [(0, 1.0, "count"), (4, -0.1, "seconds"), (4, math.nan, "seconds"), (4, math.inf, "seconds")],
)
def test_impossible_measurements_are_refused(count: int, seconds: float, named: str) -> None:
    estimator = DelayEstimator()
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        estimator.observe(count, seconds)
    assert estimator.n_observations == 0


def test_fleet_adds_both_phases_and_gives_the_median_to_unknown_devices() -> None:
    fleet = FleetDelays()
    for device_id, scale in (("a", 1.0), ("b", 2.0), ("c", 30.0)):
        for count in (4, 8, 16):
            fleet.observe_forward(device_id, count, scale * (0.1 + 0.01 * count))
            fleet.observe_backward(device_id, count, scale * 0.02 * count)
    delays = fleet.delays_s(["c", "new", "a"], [10, 10, 20])
    assert delays == pytest.approx([30 * 0.4, 2 * 0.4, 0.7])


def test_fleet_fills_a_missing_phase_from_the_others() -> None:
    fleet = FleetDelays()
    fleet.observe_forward("a", 10, 1.0)
    fleet.observe_forward("b", 10, 3.0)
    fleet.observe_backward("b", 10, 5.0)
    assert fleet.delays_s(["a", "b"], [10, 10]) == pytest.approx([6.0, 8.0])


def test_fleet_without_measurements_and_after_forgetting() -> None:
    fleet = FleetDelays()
    assert fleet.delays_s(["a", "b"], [1, 2]).tolist() == [0.0, 0.0]
    assert fleet.delays_s([], []).shape == (0,)
    fleet.observe_forward("a", 10, 1.0)
    fleet.observe_forward("b", 10, 3.0)
    fleet.forget("a")
    assert fleet.forward("a") is None
    assert fleet.delays_s(["a"], [10]) == pytest.approx([3.0])


def test_fleet_refuses_ids_and_counts_of_different_length() -> None:
    with pytest.raises(ValueError, match="one per device"):
        FleetDelays().delays_s(["a", "b"], [1])


def test_fleet_state_goes_through_json() -> None:
    fleet = FleetDelays()
    fleet.observe_forward("a", 10, 1.0)
    fleet.observe_backward("b", 3, 0.2)
    copy = FleetDelays.from_state(json.loads(json.dumps(fleet.state())))
    assert copy.state() == fleet.state()
    assert copy.delays_s(["a", "b"], [5, 5]).tolist() == fleet.delays_s(["a", "b"], [5, 5]).tolist()


# Lasting changes


def _watched(series: list[tuple[int, float]]) -> tuple[DelayEstimator, list[int]]:
    """An estimator that took the series, and the observations that it called a change."""
    estimator = DelayEstimator()
    return estimator, [i for i, each in enumerate(series) if estimator.observe(*each)]


def _series(rng: np.random.Generator, size: int, factor: float = 1.0) -> list[tuple[int, float]]:
    counts = _counts(rng, size)
    seconds = factor * _line(counts) * rng.lognormal(0, 0.1, size)
    return list(zip(counts.tolist(), seconds.tolist(), strict=True))


@pytest.mark.parametrize("factor", [0.1, 1 / 3, 3.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_large_jump_is_noticed_once_within_five_observations(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimator, noticed = _watched(_series(rng, 40) + _series(rng, 20, factor))
    assert len(noticed) == 1
    assert 42 <= noticed[0] < 45, "three observations at least, five at most"
    assert estimator.changes == 1
    assert estimator.estimate_s(20) == pytest.approx(factor * 0.4, rel=0.2)


def test_estimate_is_of_the_new_speed_as_soon_as_the_jump_is_noticed() -> None:
    rng = np.random.default_rng(7)
    series = _series(rng, 40) + _series(rng, 3, 10.0)
    estimator, noticed = _watched(series)
    assert noticed == [42]
    assert estimator.estimate_s(20) == pytest.approx(4.0, rel=0.35)


@pytest.mark.parametrize("outliers", [1, 2])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_one_or_two_outliers_are_no_change(outliers: int, factor: float) -> None:
    rng = np.random.default_rng(8)
    calm, wild = _series(rng, 40), _series(rng, outliers, factor)
    estimator, noticed = _watched(calm + wild + _series(rng, 20))
    assert noticed == []
    assert estimator.estimate_s(20) == pytest.approx(0.4, rel=0.1)


def test_drift_and_noise_are_no_change() -> None:
    rng = np.random.default_rng(9)
    drifting = [(count, s * 1.005**i) for i, (count, s) in enumerate(_series(rng, 300))]
    estimator, noticed = _watched(drifting)
    assert noticed == []
    assert estimator.estimate_s(20) == pytest.approx(0.4 * 1.005**300, rel=0.15)


def test_heavy_tails_are_called_a_change_less_than_once_in_a_thousand_observations() -> None:
    called = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        series = _series(rng, 250)
        tails = 1 + 0.2 * rng.pareto(1.0, 250)  # infinite mean
        called += len(_watched([(n, s * t) for (n, s), t in zip(series, tails, strict=True)])[1])
    assert called < 5


def test_larger_counts_than_ever_seen_are_not_taken_for_a_slower_device() -> None:
    """With one count the parts cannot be told apart: all counts as fixed, and proves to be not."""
    steady = [(4, 0.4)] * 40
    _, noticed = _watched(steady + [(40, 4.0)] * 10)
    assert noticed == []
    _, noticed = _watched(steady + [(40, 0.4)] * 10)
    assert noticed == []
    _, noticed = _watched(steady + [(40, 40.0)] * 10)
    assert noticed == [42]


def test_watch_for_changes_goes_through_json_and_reads_older_states() -> None:
    rng = np.random.default_rng(10)
    estimator, _ = _watched(_series(rng, 40) + _series(rng, 2, 10.0))
    copy = DelayEstimator.from_state(json.loads(json.dumps(estimator.state())))
    last = _series(rng, 1, 10.0)[0]
    assert copy.observe(*last)
    assert estimator.observe(*last)
    assert copy.state() == estimator.state()
    older = {key: estimator.state()[key] for key in ("n_observations", "observations")}
    assert DelayEstimator.from_state(older).estimate_s(9) == estimator.estimate_s(9)


def test_fleet_tells_whose_speed_has_changed() -> None:
    fleet = FleetDelays()
    for _ in range(20):
        assert not fleet.observe_forward("a", 8, 0.1)
        assert not fleet.observe_backward("a", 8, 0.2)
    assert [fleet.observe_backward("a", 8, 2.0) for _ in range(4)] == [False, False, True, False]
    assert fleet.delays_s(["a"], [8]) == pytest.approx([2.1])
