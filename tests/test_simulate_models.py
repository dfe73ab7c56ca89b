"""Made-up populations and delay models: what they promise, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.simulation.delay_models import (
    BaseDelay,
    DeviceDelays,
    even_delays,
    lognormal_delays,
    straggler_delays,
)
from coordinator.simulation.populations import (
    PopulationSettings,
    Scheme,
    build_label_counts,
    even_class_totals,
    iid_label_counts,
)


def test_severe_population_has_two_classes_a_device_and_all_samples() -> None:
    counts_KM = build_label_counts(PopulationSettings(devices=128, samples=50_003), seed=1)
    assert counts_KM.shape == (128, 10)
    assert set((counts_KM > 0).sum(axis=1)) == {2}
    assert counts_KM.sum(axis=0).tolist() == [5001] * 3 + [5000] * 7


def test_iid_population_has_equal_sizes_and_class_mixes_near_the_pooled_one() -> None:
    settings = PopulationSettings(devices=7, samples=10_000, scheme=Scheme.IID)
    counts_KM = build_label_counts(settings, seed=3)
    assert sorted(counts_KM.sum(axis=1).tolist()) == [1428] * 3 + [1429] * 4
    assert counts_KM.sum(axis=0).tolist() == [1000] * 10
    # Standard deviation of a count is at most sqrt(1429 * 0.1 * 0.9) = 11.3.
    assert np.abs(counts_KM - 142.9).max() < 5 * 11.3


def test_populations_differ_between_seeds_and_repeat_with_one() -> None:
    for scheme in Scheme:
        settings = PopulationSettings(devices=16, samples=2000, scheme=scheme)
        first, again = build_label_counts(settings, 5), build_label_counts(settings, 5)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, build_label_counts(settings, 6))


def test_more_devices_than_samples_leaves_some_empty() -> None:
    counts_KM = iid_label_counts(even_class_totals(3, 2), 5, seed=0)
    assert sorted(counts_KM.sum(axis=1).tolist()) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (PopulationSettings(devices=0, samples=10, scheme=Scheme.IID), "1 device"),
        (PopulationSettings(devices=2, samples=0), "1 sample"),
        (PopulationSettings(devices=2, samples=10, classes=0), "1 class"),
        (PopulationSettings(devices=4, samples=10, classes_per_device=11), "from 1 to 10"),
        (PopulationSettings(devices=5, samples=100, alpha=0.0), "alpha above 0"),
    ],
)
def test_impossible_populations_are_refused(settings: PopulationSettings, named: str) -> None:
    with pytest.raises(ValueError, match=f"expected.*{named}"):
        build_label_counts(settings, seed=0)


def test_stragglers_take_the_factor_in_both_parts() -> None:
    delays = straggler_delays(20, BaseDelay(0.5, 0.01), stragglers=3, factor=10, seed=4)
    slow_K = delays.stragglers(np.ones(20), 20)
    assert slow_K.sum() == 3
    assert delays.seconds(np.full(20, 2))[slow_K] == pytest.approx([5.2] * 3)
    assert delays.seconds(np.full(20, 2))[~slow_K] == pytest.approx([0.52] * 17)


def test_lognormal_delays_have_the_base_as_their_median() -> None:
    delays = lognormal_delays(4001, BaseDelay(2.0, 0.1), sigma=0.5, seed=0)
    logs_K = np.log(delays.fixed_s_K / 2.0)
    assert abs(float(np.median(logs_K))) < 0.05
    assert float(logs_K.std()) == pytest.approx(0.5, rel=0.05)
    assert delays.per_sample_s_K == pytest.approx(delays.fixed_s_K / 20)


def test_step_lasts_as_long_as_its_slowest_device_with_samples() -> None:
    delays = DeviceDelays(np.array([1.0, 2.0, 9.0]), np.array([0.5, 0.0, 1.0]))
    assert delays.step_s([4, 3, 0]) == 3.0
    assert delays.step_s([1, 3, 0]) == 2.0
    assert delays.step_s([0, 0, 1]) == 10.0
    assert delays.step_s([0, 0, 0]) == 0.0


def test_typical_contribution_is_in_proportion_to_what_devices_hold() -> None:
    delays = DeviceDelays(np.zeros(3), np.ones(3))
    assert delays.typical_s([700, 300, 1], 10).tolist() == [7.0, 3.0, 1.0]


def test_unnamed_stragglers_take_more_than_twice_the_median_of_those_with_samples() -> None:
    delays = DeviceDelays(np.array([1.0, 1.0, 2.0, 2.1, 50.0]), np.zeros(5))
    held_K = [5, 5, 5, 5, 0]
    assert delays.stragglers(held_K, 4).tolist() == [False] * 5
    assert delays.stragglers([5, 5, 0, 5, 0], 4).tolist() == [False, False, False, True, False]
    assert not delays.stragglers([0] * 5, 4).any()


def test_even_delays_have_no_stragglers() -> None:
    assert not even_delays(5, BaseDelay()).stragglers(np.ones(5), 5).any()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: BaseDelay(-1.0), "fixed_s"),
        (lambda: BaseDelay(1.0, float("nan")), "per_sample_s"),
        (lambda: BaseDelay(0.0, 0.0), "fixed_s, per_sample_s"),
        (
            lambda: straggler_delays(4, BaseDelay(), stragglers=5, factor=2, seed=0),
            "stragglers: expected 0 to 4",
        ),
        (lambda: straggler_delays(4, BaseDelay(), stragglers=1, factor=0.5, seed=0), "factor"),
        (lambda: lognormal_delays(4, BaseDelay(), sigma=-1, seed=0), "sigma"),
    ],
)
def test_impossible_delays_are_refused(build: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        build()  # type: ignore[operator]
