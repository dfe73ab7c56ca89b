"""The largest delta whose expected batch deviation stays within a budget over UGS's.

A step of B samples drawn uniformly deviates from the class mix q by chance; the expected L1
distance is about nu = sum_m sqrt(2 q_m (1 - q_m) / (pi B)), pi the circle's number: the mean of |x|
for a normal x with the binomial's variance. A posterior whose mix is off by d adds to that. Taken
as independent, the whole is sqrt(d^2 + nu^2), and its excess e = sqrt(d^2 + nu^2) / nu - 1.

A budget eps is for the mean over an epoch. A tilt lasts only until the devices that it prefers are
spent: with r their share of what is left and p their share of the draws, for the part f = r / p of
the steps left. The other steps then lack what these had too much of, and are off by d f / (1 - f).
A delta is admitted if what its tilt is going to cost fits what is left of the budget,

    (f e(d) + (1 - f) e(d f / (1 - f))) steps_left <= eps steps - (sum of e over the steps so far),

and if no single step strays too far: e(d) <= 5 eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coordinator.allocation.posterior import Fit, Population, fit_posterior
from coordinator.allocation.validation import FloatArray

DEFAULT_DEVIATION_BUDGET = 0.10

# Where even this stays inside (devices with like labels), nearly all weight lies on the slowest
# devices already, and a larger delta saves no more time.
LARGEST_DELTA = 8.0

# z-scores blow the smallest difference up to 1. Delays that differ by less than this part of the
# longest are alike: a plan that serves them in turn could save no more than that part of the time,
# and would lose more by giving whole steps to single devices.
LEAST_DELAY_RANGE = 0.10

# Of the budget, in a single step: a mean of 10 % shall not hide steps of three times UGS's.
MOST_EXCESS = 5.0

_FIRST_GUESS = 1.0
# The part of the budget that is enough: between 0.97 and 1 of it delta changes by about 1 %.
_USED_ENOUGH = 0.97
_AIM = 0.985
_MOST_FITS = 40
_NARROW = 1e-3


@dataclass(frozen=True, slots=True)
class _Trial:
    """One fitted delta; ``used`` is its share of the budget, at most 1 where it stays inside.

    ``excess`` is e of the module's head, of each step drawn from it.
    """

    delta: float
    used: float
    fit: Fit
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The budget of an epoch: eps, its steps in all, and what those drawn have cost."""

    deviation_budget: float
    steps: float
    spent: float = 0.0

    def used(self, cost: float, excess: float) -> float:
        """Part of what is left that ``cost`` takes, or of the limit that a step's excess takes."""
        left = self.deviation_budget * self.steps - self.spent
        if left <= 0:
            return math.inf
        return max(cost / left, excess / (MOST_EXCESS * self.deviation_budget))


def chance_deviation(mix_M: FloatArray, global_batch: int) -> float:
    """Expected L1 deviation nu of a uniform batch from the class mix q it is drawn from."""
    # A single class can have a share of 1 and a rounding error.
    variance_M = np.maximum(mix_M * (1.0 - mix_M), 0.0) / global_batch
    return float(np.sqrt(2.0 / math.pi * variance_M).sum())


def expected_deviation(mix_M: FloatArray, target_M: FloatArray, global_batch: int) -> float:
    """Expected L1 deviation of a step with expected mix ``mix_M`` where ``target_M`` is wanted."""
    return math.hypot(
        float(np.abs(mix_M - target_M).sum()), chance_deviation(target_M, global_batch)
    )


def fit_within_budget(
    population: Population,
    *,
    account: Account,
    global_batch: int,
    guess: float | None = None,
    start_M: FloatArray | None = None,
) -> tuple[float, Fit, float]:
    """Find the largest delta within the budget; returns it, its posterior and a step's excess.

    Starts at ``guess`` (the delta of the fit before). The result never exceeds the budget, also
    where its use does not grow steadily with delta; then it is the end of a range of admitted
    deltas, not always of the last one. Where the delays are alike delta is 0.
    """
    if population.delay_range < LEAST_DELAY_RANGE:
        return 0.0, fit_posterior(population, delta=0.0, start_M=start_M), 0.0
    inside: _Trial | None = None
    outside: _Trial | None = None
    delta = _FIRST_GUESS if not guess else min(guess, LARGEST_DELTA)
    for _ in range(_MOST_FITS):
        trial = _try(population, delta, account, global_batch, start_M)
        start_M = trial.fit.duals_M
        if trial.used <= 1:
            inside = trial
        else:
            outside = trial
        if _settled(inside, outside):
            break
        delta = _next_delta(inside, outside)
    if inside is None:
        return 0.0, fit_posterior(population, delta=0.0), 0.0
    return inside.delta, inside.fit, inside.excess


def _try(
    population: Population,
    delta: float,
    account: Account,
    global_batch: int,
    start_M: FloatArray | None,
) -> _Trial:
    fit = fit_posterior(population, delta=delta, start_M=start_M)
    offset = float(np.abs(fit.mix_M - population.mix_M).sum())
    # The rounding error of a mix that cannot deviate (one class, equal mixes) is no deviation.
    if offset <= 1e-9:
        return _Trial(delta, 0.0, fit, 0.0)
    chance = chance_deviation(population.mix_M, global_batch)
    excess = _excess(offset, chance)
    tilted = _tilted_part(population, fit)
    mean = tilted * excess
    if tilted < 1:
        mean += (1 - tilted) * _excess(offset * tilted / (1 - tilted), chance)
    used = account.used(mean * population.left / global_batch, excess)
    return _Trial(delta, used, fit, excess)


def _excess(offset: float, chance: float) -> float:
    return math.hypot(offset, chance) / chance - 1 if chance > 0 else math.inf


def _tilted_part(population: Population, fit: Fit) -> float:
    """Part of the steps left until the devices that the fit prefers are spent, from 0 to 1."""
    preferred_K = fit.pi_K > population.share_K
    drawn = float(fit.pi_K[preferred_K].sum())
    return float(population.share_K[preferred_K].sum()) / drawn if drawn > 0 else 1.0


def _settled(inside: _Trial | None, outside: _Trial | None) -> bool:
    if inside is None:
        return outside is not None and outside.delta <= _NARROW * _NARROW
    if inside.used >= _USED_ENOUGH or inside.delta >= LARGEST_DELTA:
        return True
    return outside is not None and abs(outside.delta - inside.delta) <= _NARROW * outside.delta


def _next_delta(inside: _Trial | None, outside: _Trial | None) -> float:
    """Grow until a delta is outside, then interpolate, keeping off the ends of the bracket."""
    if outside is None:
        assert inside is not None
        growth = _AIM / inside.used if inside.used > 0 else math.inf
        return min(LARGEST_DELTA, inside.delta * min(max(growth, 1.02), 2.0))
    low, used_low = (0.0, 0.0) if inside is None else (inside.delta, inside.used)
    width = outside.delta - low
    if not math.isfinite(outside.used):
        return low + width / 2
    part = (_AIM - used_low) / (outside.used - used_low)
    return low + width * min(max(part, 0.1), 0.9)
