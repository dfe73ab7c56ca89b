"""The LDS posterior: reference values, its fixed point, extremes, and the deviation budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.allocation import expected_deviation, lds_posterior
from coordinator.allocation.budget import LARGEST_DELTA, Account, fit_within_budget
from coordinator.allocation.posterior import build_label_mix, build_population, fit_posterior

# An overflow or a division by zero is a fault even where the plan comes out right.
pytestmark = pytest.mark.filterwarnings("error")

VECTORS = Path(__file__).parent / "vectors" / "lds_posterior.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text())["cases"]


def _by_em(counts: np.ndarray, left: np.ndarray, delays: np.ndarray, delta: float) -> np.ndarray:
    """The formulas as they stand in docs/allocation.md, iterated without any thought of speed."""
    present = left > 0
    beta = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    total = left.sum()
    pseudo = min(1000, total - 1)
    strength = max(1.0, pseudo * (total - 1) / (total - pseudo) - 1)
    spread = delays[present].std()
    sigma = (delays - delays[present].mean()) / spread if spread > 0 else np.zeros(left.size)
    share = left / total
    alpha = np.where(present, strength * share * np.exp(delta * sigma), 0.0)
    mix = share @ beta
    pi = alpha / alpha.sum()
    for _ in range(20_000):
        weight = np.divide(mix, pi @ beta, out=np.zeros_like(mix), where=mix > 0)
        new = (pseudo * pi * (beta @ weight) + alpha) / (pseudo + alpha.sum())
        if np.abs(new - pi).max() < 1e-15:
            break
        pi = new
    return new


def _two_class_fleet(
    seed: int, devices: int = 128, classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = np.zeros((devices, classes), dtype=np.int64)
    for k in range(devices):
        counts[k, rng.choice(classes, 2, replace=False)] = rng.integers(50, 350, 2)
    delays = np.full(devices, 0.1)
    delays[rng.choice(devices, max(1, devices // 10), replace=False)] = 1.0
    return counts, delays


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_reference_values(case: dict[str, Any]) -> None:
    pi = lds_posterior(
        case["label_counts"],
        case["remaining"],
        case["delays_s"],
        delta=case["delta"],
        concentration=case["c"],
        sample_size=case["sample_size"],
    )
    assert pi == pytest.approx(case["pi"], abs=1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_equals_plain_em_on_random_fleets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, classes = int(rng.integers(1, 30)), int(rng.integers(1, 7))
    counts = rng.integers(0, 60, (devices, classes)) * (rng.random((devices, classes)) < 0.5)
    counts[0, 0] += 2
    left = rng.binomial(counts.sum(axis=1), rng.random())
    left[0] = max(2, left[0])
    delays = rng.lognormal(0, 1, devices)
    delta = float(rng.choice([0.3, 1, 2, 4]))
    expected = _by_em(counts, left, delays, delta)
    assert lds_posterior(counts, left, delays, delta=delta) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("delta", [0.5, 8.0, 50.0, 1e4])
@pytest.mark.parametrize("slow", [1, 500, 999])
def test_extreme_scores_and_deltas_stay_finite(slow: int, delta: float) -> None:
    rng = np.random.default_rng(slow)
    counts, _ = _two_class_fleet(slow, devices=1000)
    delays = np.where(np.arange(1000) < slow, 1e9, 1e-3) * rng.lognormal(0, 0.01, 1000)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        pi = lds_posterior(counts, counts.sum(axis=1), delays, delta=delta)
    assert np.isfinite(pi).all()
    assert pi.sum() == pytest.approx(1)
    assert pi.min() >= 0


def test_score_of_ten_is_the_fixed_point() -> None:
    """1 % stragglers have a z-score of about 10, so their prior weighs exp(20) times as much."""
    counts, _ = _two_class_fleet(3, devices=100)
    delays = np.where(np.arange(100) == 7, 10.0, 1.0)
    pi = lds_posterior(counts, counts.sum(axis=1), delays, delta=2.0)
    assert pi == pytest.approx(_by_em(counts, counts.sum(axis=1), delays, 2.0), abs=1e-12)
    assert pi[7] > 0.99


def test_more_devices_than_pseudo_samples_at_delta_zero_is_uniform_sampling() -> None:
    counts, delays = _two_class_fleet(4, devices=5000)
    left = counts.sum(axis=1)
    pi = lds_posterior(counts, left, delays, delta=0.0)
    assert pi == pytest.approx(left / left.sum(), abs=1e-12)


def test_nothing_left_and_one_sample_left() -> None:
    assert lds_posterior([[3], [4]], [0, 0], [1, 2], delta=1.0).tolist() == [0.0, 0.0]
    assert lds_posterior([[3], [4]], [0, 1], [1, 2], delta=1.0).tolist() == [0.0, 1.0]


def test_equal_delays_up_to_rounding_have_no_slow_device() -> None:
    delays = np.array([0.1, 0.3 - 0.2, 0.1])
    pi = lds_posterior([[4, 0], [0, 6], [5, 5]], [4, 6, 10], delays, delta=3.0)
    assert pi == pytest.approx([0.2, 0.3, 0.5], abs=1e-12)
    assert len(set(delays)) == 2


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fit_started_from_another_fit_ends_at_the_same_place(data: st.DataObject) -> None:
    counts, delays = _two_class_fleet(data.draw(st.integers(0, 20)), devices=40)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    left = rng.binomial(counts.sum(axis=1), rng.choice([0.0, 0.3, 1.0], 40))
    left[0] = 5
    delta = data.draw(st.floats(0, 6))
    beta_MK = build_label_mix(counts)
    earlier = fit_posterior(build_population(beta_MK, counts.sum(axis=1), delays), delta=1.0)
    population = build_population(beta_MK, left, delays)
    cold = fit_posterior(population, delta=delta, tolerance=1e-12)
    warm = fit_posterior(population, delta=delta, tolerance=1e-12, start_M=earlier.duals_M)
    assert warm.pi_K == pytest.approx(cold.pi_K, abs=1e-10)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("guess", [None, 0.01, 7.0])
@pytest.mark.parametrize("seed", range(4))
def test_budget_gives_the_largest_delta_inside(
    seed: int, guess: float | None, budget: float
) -> None:
    counts, delays = _two_class_fleet(seed)
    population = build_population(build_label_mix(counts), counts.sum(axis=1), delays)
    mix = population.mix_M
    chance = np.sqrt(2 * mix * (1 - mix) / (math.pi * 128)).sum()

    def excess(delta: float) -> tuple[float, float]:
        """Of a step, and of the mean step until the epoch's end."""
        fit = fit_posterior(population, delta=delta, tolerance=1e-12)
        offset = np.abs(fit.mix_M - mix).sum()
        preferred = fit.pi_K > population.share_K
        part = population.share_K[preferred].sum() / fit.pi_K[preferred].sum()
        tilted, rest = (
            math.hypot(off, chance) / chance - 1 for off in (offset, offset * part / (1 - part))
        )
        return tilted, part * tilted + (1 - part) * rest

    steps = population.left / 128
    for spent in (0.0, 0.4 * budget * steps):
        left = budget - spent / steps
        account = Account(deviation_budget=budget, steps=steps, spent=spent)
        delta, fit, each = fit_within_budget(
            population, account=account, global_batch=128, guess=guess
        )
        step, mean = excess(delta)
        assert step <= 5 * budget * (1 + 1e-6)
        assert mean <= left * (1 + 1e-6)
        used = max(step / (5 * budget), mean / left)
        assert used >= 0.96 or delta == LARGEST_DELTA
        assert each == pytest.approx(step, rel=1e-4)
        assert expected_deviation(fit.mix_M, mix, 128) == pytest.approx((1 + step) * chance)


def test_budget_with_equal_label_mixes_goes_to_the_largest_delta() -> None:
    population = build_population(
        build_label_mix(np.full((4, 3), 20)), np.full(4, 60), np.array([1.0, 1.0, 1.0, 9.0])
    )
    account = Account(deviation_budget=0.1, steps=30)
    delta, _, excess = fit_within_budget(population, account=account, global_batch=8)
    assert excess == 0
    assert delta == LARGEST_DELTA


def test_budget_of_zero_and_delays_that_hardly_differ_give_uniform_proportions() -> None:
    counts, delays = _two_class_fleet(0)
    left = counts.sum(axis=1)
    nearly_equal = 1.0 + 0.05 * (delays > 0.5)
    for budget, seconds in ((0.0, delays), (0.5, nearly_equal)):
        population = build_population(build_label_mix(counts), left, seconds)
        account = Account(deviation_budget=budget, steps=left.sum() / 128)
        _, fit, _ = fit_within_budget(population, account=account, global_batch=128)
        assert fit.pi_K == pytest.approx(left / left.sum(), abs=1e-7)


def test_rare_extreme_stragglers_stay_inside_the_budget() -> None:
    counts, _ = _two_class_fleet(5, devices=200)
    delays = np.where(np.arange(200) < 2, 100.0, 0.1)
    population = build_population(build_label_mix(counts), counts.sum(axis=1), delays)
    account = Account(deviation_budget=0.1, steps=population.left / 128)
    delta, fit, _ = fit_within_budget(population, account=account, global_batch=128)
    uniform = expected_deviation(population.mix_M, population.mix_M, 128)
    assert 0 < delta < 1
    assert expected_deviation(fit.mix_M, population.mix_M, 128) <= 1.5 * uniform * (1 + 1e-6)
    assert fit.pi_K[:2].sum() > 2 * population.share_K[:2].sum()


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"label_counts": [[1, -2], [3, 4]]}, "label_counts: expected whole numbers from 0.*-2"),
    ({"label_counts": [[1.5, 2], [3, 4]]}, "label_counts: expected whole numbers, received 1.5"),
    ({"label_counts": [[math.nan, 2], [3, 4]]}, "label_counts: expected whole numbers.*nan"),
    ({"label_counts": [1, 2]}, r"label_counts: expected 2 axes, received shape \(2,\)"),
    ({"label_counts": [[1, 2], [3]]}, "label_counts: .*unequal length"),
    ({"label_counts": [["a", "b"], ["c", "d"]]}, "label_counts: .*type <U1"),
    ({"label_counts": np.zeros((0, 2))}, "label_counts: expected at least one device"),
    ({"remaining": [1, 2, 3]}, r"remaining: expected shape \(2,\), received \(3,\)"),
    ({"label_counts": [[0, 0], [3, 4]]}, r"remaining\[0\]: expected at most the 0 samples"),
    ({"delays_s": [1.0, math.nan]}, r"delays_s\[1\]: expected finite seconds from 0.*nan"),
    ({"delays_s": [1.0, -1.0]}, r"delays_s\[1\]: expected finite seconds from 0"),
    ({"delays_s": [1.0]}, r"delays_s: expected shape \(2,\)"),
    ({"delta": -0.1}, "delta: expected a finite number from 0, received -0.1"),
    ({"delta": math.inf}, "delta: expected a finite number from 0, received inf"),
    ({"concentration": 0}, "concentration: expected a finite number above 0, received 0"),
    ({"sample_size": 0}, "sample_size: expected a whole number from 1, received 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "label_counts": [[1, 2], [3, 4]],
        "remaining": [3, 7],
        "delays_s": [1.0, 2.0],
        "delta": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        lds_posterior(**(arguments | change))
