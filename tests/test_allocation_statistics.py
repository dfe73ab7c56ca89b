"""What the draws are distributed like, and what LDS does to time and class mix over an epoch.

Seeds are fixed, so each test gives the same answer every time; bounds lie at 4 standard errors.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import comb

import numpy as np
import pytest

from coordinator.allocation import EpochPlanner, batch_deviation, plan_epoch
from coordinator.allocation.draws import draw_categorical, draw_hypergeometric

# An overflow or a division by zero is a fault even where the plan comes out right.
pytestmark = pytest.mark.filterwarnings("error")

TRIALS = 4000


def _mean_is(samples: np.ndarray, expected: np.ndarray) -> None:
    error = np.maximum(samples.std(axis=0), 1e-9) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - expected) <= 4 * error + 1e-12)


def test_uniform_counts_have_hypergeometric_mean_and_variance() -> None:
    held, batch = np.array([40, 10, 0, 25, 5]), 20
    rng = np.random.default_rng(0)
    draws = np.array([draw_hypergeometric(rng, held, held, batch) for _ in range(TRIALS)])
    share, total = held / held.sum(), held.sum()
    _mean_is(draws, batch * share)
    variance = batch * share * (1 - share) * (total - batch) / (total - 1)
    assert draws.var(axis=0) == pytest.approx(variance, rel=4 * np.sqrt(2 / TRIALS))


def test_uniform_counts_keep_their_distribution_over_the_epoch() -> None:
    """Every step of the epoch, not the first alone, is distributed like the first."""
    counts = np.array([[30, 0], [0, 20], [7, 3]])
    held = counts.sum(axis=1)
    plans = np.array([list(plan_epoch(counts, 12, policy="ugs", seed=s)) for s in range(1500)])
    share, total = held / held.sum(), held.sum()
    variance = 12 * share * (1 - share) * (total - 12) / (total - 1)
    for step in range(5):
        _mean_is(plans[:, step], 12 * share)
        assert plans[:, step].var(axis=0) == pytest.approx(variance, rel=0.2)


def _sequential(weights: tuple[float, ...], room: tuple[int, ...], total: int) -> dict:
    """Exact distribution of counts drawn one by one, by adding up the probability of each path."""
    states = {tuple(0 for _ in room): 1.0}
    for _ in range(total):
        following: dict = {}
        for counts, chance in states.items():
            open_ = [k for k in range(len(room)) if counts[k] < room[k]]
            mass = sum(weights[k] for k in open_)
            for k in open_:
                new = tuple(c + (i == k) for i, c in enumerate(counts))
                following[new] = following.get(new, 0.0) + chance * weights[k] / mass
        states = following
    return states


def test_categorical_counts_are_those_of_draws_one_by_one() -> None:
    weights, room, total = (0.6, 0.3, 0.1), (2, 3, 4), 5
    exact = _sequential(weights, room, total)
    rng = np.random.default_rng(1)
    edges = np.cumsum(weights)
    seen: dict = {}
    for _ in range(20_000):
        counts = tuple(draw_categorical(rng, edges, np.array(room), total).tolist())
        seen[counts] = seen.get(counts, 0) + 1
    assert set(seen) <= set(exact)
    for counts, chance in exact.items():
        error = np.sqrt(chance * (1 - chance) / 20_000)
        assert seen.get(counts, 0) / 20_000 == pytest.approx(chance, abs=4 * error)


def test_capped_uniform_counts_are_those_of_draws_one_by_one() -> None:
    """The first B samples of a random order, passing over devices at their cap."""
    held, room, total = (4, 3, 2), (1, 2, 2), 4
    order = [device for device, samples in enumerate(held) for _ in range(samples)]
    rng = np.random.default_rng(2)
    naive, ours = [], []
    for _ in range(TRIALS):
        counts = [0, 0, 0]
        for device in rng.permutation(order):
            if counts[device] < room[device] and sum(counts) < total:
                counts[device] += 1
        naive.append(counts)
        ours.append(draw_hypergeometric(rng, np.array(held), np.array(room), total))
    naive_, ours_ = np.array(naive), np.array(ours)
    error = np.sqrt((naive_.var(axis=0) + ours_.var(axis=0)) / TRIALS)
    assert np.all(np.abs(naive_.mean(axis=0) - ours_.mean(axis=0)) <= 4 * error)


def test_small_uniform_draw_has_the_exact_probability_of_every_outcome() -> None:
    held, total = (3, 2, 2), 3
    rng = np.random.default_rng(3)
    draws = [tuple(draw_hypergeometric(rng, *[np.array(held)] * 2, total)) for _ in range(TRIALS)]
    for counts in product(*(range(h + 1) for h in held)):
        if sum(counts) == total:
            chance = np.prod([comb(h, c) for h, c in zip(held, counts, strict=True)]) / comb(7, 3)
            error = np.sqrt(chance * (1 - chance) / TRIALS)
            assert draws.count(counts) / TRIALS == pytest.approx(chance, abs=4 * error)


def test_delta_zero_has_the_expectation_of_uniform_sampling() -> None:
    counts = np.array([[30, 0, 5], [0, 40, 0], [10, 10, 10], [0, 0, 15]])
    held = counts.sum(axis=1)
    delays = [1.0, 50.0, 2.0, 3.0]
    first = np.array(
        [
            next(plan_epoch(counts, 16, policy="lds", delta=0.0, delays_s=delays, seed=s))
            for s in range(TRIALS)
        ]
    )
    _mean_is(first, 16 * held / held.sum())


@cache
def _severe_fleet() -> tuple[np.ndarray, np.ndarray]:
    """128 devices with two of ten classes each, 50,000 samples, 10 % stragglers of 10 times."""
    rng = np.random.default_rng(0)
    holds = np.zeros((128, 10), dtype=bool)
    for row in holds:
        row[rng.choice(10, 2, replace=False)] = True
    weight = holds * rng.dirichlet(np.full(128, 3.0), 10).T
    counts = np.round(5000 * weight / weight.sum(axis=0)).astype(np.int64)
    delays = np.full(128, 0.1)
    delays[rng.choice(128, 12, replace=False)] = 1.0
    return counts, delays


def _play(**choice: object) -> tuple[float, int, np.ndarray]:
    """(seconds, steps with a straggler, deviation of each step) of an epoch played with labels."""
    label_counts, delays = _severe_fleet()
    rng = np.random.default_rng(7)
    labels = [rng.permutation(np.repeat(np.arange(10), row)) for row in label_counts]
    start = np.zeros(128, dtype=np.int64)
    time_s, slow_steps, deviations = 0.0, 0, []
    pooled = label_counts.sum(axis=0)
    for counts in plan_epoch(label_counts, 128, delays_s=delays, seed=1, **choice):  # type: ignore[arg-type]
        taken = [labels[k][start[k] : start[k] + counts[k]] for k in np.flatnonzero(counts)]
        start += counts
        longest_s = delays[counts > 0].max()
        time_s += longest_s
        slow_steps += longest_s > 0.5
        class_counts = np.bincount(np.concatenate(taken), minlength=10)
        deviations.append(batch_deviation(class_counts, pooled))
    return time_s, slow_steps, np.array(deviations)


def test_lds_spends_the_stragglers_in_few_steps_at_bounded_deviation() -> None:
    uniform_s, uniform_slow, uniform_deviation = _play(policy="ugs")
    lds_s, lds_slow, lds_deviation = _play(policy="lds", delta=2.0)
    assert uniform_slow > 350
    assert lds_slow < 45
    assert lds_s < 0.25 * uniform_s
    assert lds_deviation.mean() < 1.25 * uniform_deviation.mean()


def test_refits_keep_the_class_mix_to_the_end_of_the_epoch() -> None:
    """Fitted once, the last steps hold whatever classes remain."""
    _, _, uniform = _play(policy="ugs")
    _, _, refitted = _play(policy="lds", delta=1.0)
    assert refitted[-20:].mean() < 1.3 * uniform[-20:].mean()
    assert refitted.max() < 2.5 * uniform.max()


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_measured_deviation_stays_within_the_budget_and_time_is_saved(budget: float) -> None:
    uniform_s, _, uniform_deviation = _play(policy="ugs")
    lds_s, _, lds_deviation = _play(policy="lds", deviation_budget=budget)
    assert lds_deviation.mean() < (1 + budget) * uniform_deviation.mean() * 1.03
    assert lds_s < {0.05: 0.5, 0.1: 0.4, 0.3: 0.3}[budget] * uniform_s


def test_delta_is_chosen_again_as_the_stragglers_run_out() -> None:
    label_counts, delays = _severe_fleet()
    planner = EpochPlanner(label_counts, 128, policy="lds", delays_s=delays)
    deltas = []
    while planner.next_step() is not None:
        deltas.append(planner.last_delta)
    assert len(set(deltas)) > 5
    assert deltas[-1] == 0.0
    assert min(deltas[:40]) > 0.2  # type: ignore[type-var]


def test_new_delays_change_who_is_spent_first() -> None:
    label_counts = np.full((10, 4), 50)
    delays = np.where(np.arange(10) == 0, 5.0, 1.0)
    planner = EpochPlanner(label_counts, 32, policy="lds", delta=2.0, delays_s=delays)
    first = planner.next_step()
    planner.set_delays(delays[::-1])
    second = planner.next_step()
    assert first is not None
    assert second is not None
    assert first[0] > 25
    assert second[9] > 25


def test_hundred_thousand_devices_get_full_batches_from_what_they_hold() -> None:
    rng = np.random.default_rng(4)
    counts = np.zeros((100_000, 10), dtype=np.int64)
    counts[np.arange(100_000), rng.integers(0, 10, 100_000)] = rng.integers(1, 60, 100_000)
    delays = rng.lognormal(0, 1, 100_000)
    for policy in ("ugs", "lds"):
        steps = plan_epoch(counts, 4096, policy=policy, delays_s=delays)
        left = counts.sum(axis=1)
        for _ in range(3):
            step = next(steps)
            assert step.sum() == 4096
            left -= step
        assert left.min() >= 0


def test_batch_deviation_is_the_l1_distance_of_the_mixes() -> None:
    assert batch_deviation([2, 2], [50, 50]) == 0
    assert batch_deviation([4, 0], [0, 50]) == 2
    assert batch_deviation([3, 1], [10, 10]) == pytest.approx(0.5)
    for step, pooled in (([0, 0], [1, 1]), ([1, 1], [0, 0]), ([1], [1, 1]), ([-1, 2], [1, 1])):
        with pytest.raises(ValueError, match="expected"):
            batch_deviation(step, pooled)
