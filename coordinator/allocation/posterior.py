"""The posterior of Latent Dirichlet Sampling (LDS), from class counts.

Source: Kohankhaki, Ayad, Barhoush, Schmeink, arXiv:2407.15738, with the prior entering as its mean
(alpha, not alpha - 1). With s pseudo-samples of the class mix q and prior alpha, EM iterates

    gamma_km = pi_k beta_km / sum_j pi_j beta_jm
    pi_k = (s sum_m q_m gamma_km + alpha_k) / (s + A)

with A = sum alpha. Its fixed point is the only maximum of the concave function
s sum_m q_m log (pi beta)_m + sum_k alpha_k log pi_k on the simplex. EM reaches it linearly, in
thousands of iterations where a device owns a class. We solve the dual instead, with one unknown
per class: with a = alpha / (s + A), t = s / (s + A) and p_m = t q_m / (pi beta)_m the fixed point
reads pi_k = a_k / (1 - sum_m beta_km p_m), and p minimises the convex function

    D(p) = - t sum_m q_m log p_m - sum_k a_k log(1 - sum_m beta_km p_m).

Every p with p > 0 and beta p < 1 is a valid start, whatever q, a and t are, so the solution of one
fit starts the next. `docs/allocation.md` has the derivation and the proof of the step length.

Shapes: K devices, M classes; beta is held classes first (MK), since sums run along devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coordinator.allocation import validation
from coordinator.allocation.validation import FloatArray, IntArray

DEFAULT_SAMPLE_SIZE = 1000
DEFAULT_CONCENTRATION = 1.0

# The relative error of pi at which the public function and the planner stop. A step's counts are
# random with a relative spread of 1/sqrt(B pi_k), so the planner needs no more than this.
EXACT = 1e-12
PLANNING = 1e-7

# Below this share of pseudo-samples the prior alone decides: pi moves by at most 2 t.
_LEAST_DATA_SHARE = 1e-14
# exp(-60) of the mean prior: such a device is drawn once in 1e26 samples unless it owns a class.
_LOWEST_LOG_TILT = -60.0
_MOST_ITERATIONS = 500
# A Newton matrix is used again while the steps shrink at least this much each.
_CHORD_SHRINK = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """What a fit sees: label mixes, samples left and delays, reduced to what the formulas need.

    beta_MK: label distribution of each device, columns sum to 1 (0 where a device has none left).
    share_K: r, samples left over all samples left. sigma_K: z-score of the delays, 0 where none
    are left. mix_M: q, the class mix of what is left. left: samples left in all.
    delay_range: (longest - shortest delay) / longest, from 0 to 1, of devices with samples left.
    """

    beta_MK: FloatArray
    share_K: FloatArray
    sigma_K: FloatArray
    mix_M: FloatArray
    left: int
    delay_range: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A posterior and what the next fit can start from.

    pi_K sums to 1; mix_M = pi beta is the class mix that a step drawn from it is expected to have;
    duals_M is p of the module's head (NaN where the class has no sample left).
    """

    pi_K: FloatArray
    mix_M: FloatArray
    duals_M: FloatArray
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prior:
    """a = alpha / (s + A) and t = s / (s + A) of the module's head."""

    a_K: FloatArray
    data_share: float


def build_label_mix(label_counts_KM: IntArray) -> FloatArray:
    """Each device's label distribution as a column; zeros for a device without samples."""
    held_K = label_counts_KM.sum(axis=1)
    beta_MK: FloatArray = np.ascontiguousarray(label_counts_KM.T) / np.maximum(held_K, 1)
    return beta_MK


def delay_scores(delays_K: FloatArray, left_K: IntArray) -> FloatArray:
    """z-score of the delays over the devices with samples left; 0 for the others.

    All 0 where the delays are equal up to rounding.
    """
    present_K = left_K > 0
    delays_P = delays_K[present_K]
    if delays_P.size == 0:
        return np.zeros(delays_K.shape)
    # Scaled first: the squares of very large delays would overflow.
    scaled_P = delays_P / max(float(delays_P.max()), np.finfo(np.float64).tiny)
    mean, spread = scaled_P.mean(), scaled_P.std()
    if spread <= 1e-12:
        return np.zeros(delays_K.shape)
    scores_K = np.zeros(delays_K.shape)
    scores_K[present_K] = (scaled_P - mean) / spread
    return scores_K


def _delay_range(delays_P: FloatArray) -> float:
    longest = float(delays_P.max())
    return 0.0 if longest == 0 else 1.0 - float(delays_P.min()) / longest


def build_population(beta_MK: FloatArray, left_K: IntArray, delays_K: FloatArray) -> Population:
    """Population of a fit; at least one sample must be left."""
    left = int(left_K.sum())
    share_K = left_K / left
    return Population(
        beta_MK=beta_MK,
        share_K=share_K,
        sigma_K=delay_scores(delays_K, left_K),
        mix_M=beta_MK @ share_K,
        left=left,
        delay_range=_delay_range(delays_K[left_K > 0]),
    )


def fit_posterior(
    population: Population,
    *,
    delta: float,
    concentration: float = DEFAULT_CONCENTRATION,
    sample_size: int = DEFAULT_SAMPLE_SIZE,
    start_M: FloatArray | None = None,
    tolerance: float = PLANNING,
) -> Fit:
    """Fit pi for one delta; ``start_M`` is the ``duals_M`` of an earlier fit of these devices."""
    prior = _build_prior(population, delta, concentration, sample_size)
    classes = population.mix_M > 0
    duals_M = np.full(population.mix_M.shape, np.nan)
    beta_MK = population.beta_MK if classes.all() else population.beta_MK[classes]
    if prior.data_share <= _LEAST_DATA_SHARE:
        pi_K, iterations = prior.a_K, 0
    else:
        start_C = None if start_M is None else start_M[classes]
        duals_M[classes], pi_K, iterations = _solve(
            beta_MK, population.mix_M[classes], prior, start_C, tolerance
        )
    pi_K = pi_K / pi_K.sum()
    return Fit(pi_K=pi_K, mix_M=population.beta_MK @ pi_K, duals_M=duals_M, iterations=iterations)


def lds_posterior(
    label_counts: ArrayLike,
    remaining: ArrayLike,
    delays_s: ArrayLike,
    *,
    delta: float,
    concentration: float = DEFAULT_CONCENTRATION,
    sample_size: int = DEFAULT_SAMPLE_SIZE,
) -> FloatArray:
    """Share of the global batch that each device is expected to supply, (K,), summing to 1.

    label_counts: samples per device and class, (K, M). remaining: samples left, (K,).
    delays_s: seconds per device, (K,). delta: how strongly slow devices are preferred; 0 gives
    ``remaining / sum(remaining)``. concentration: factor c of the prior. sample_size: S.
    All zeros where nothing is left. Raises ValueError naming the argument.
    Source: see the head of this module.
    """
    counts_KM = validation.check_label_counts(label_counts)
    held_K = counts_KM.sum(axis=1)
    left_K = validation.check_remaining(remaining, held_K, at_most_held=False)
    delays_K = validation.check_delays(delays_s, held_K.size)
    delta = validation.check_not_negative(delta, "delta")
    concentration = validation.check_positive(concentration, "concentration")
    sample_size = validation.check_whole_number(sample_size, "sample_size", least=1)
    if not left_K.any():
        return np.zeros(left_K.shape)
    return fit_posterior(
        build_population(build_label_mix(counts_KM), left_K, delays_K),
        delta=delta,
        concentration=concentration,
        sample_size=sample_size,
        tolerance=EXACT,
    ).pi_K


def _build_prior(
    population: Population, delta: float, concentration: float, sample_size: int
) -> _Prior:
    """alpha = c Z r exp(delta sigma), normalised without ever forming a large exponential."""
    left = population.left
    pseudo = min(sample_size, left - 1)
    strength = max(1.0, pseudo * (left - 1) / (left - pseudo) - 1.0)
    tilt_K = np.maximum(delta * population.sigma_K, _LOWEST_LOG_TILT)
    top = float(tilt_K.max())
    weight_K = population.share_K * np.exp(tilt_K - top)
    # In units of c Z exp(top), so that a score of 10 at delta 100 does not overflow.
    pseudo_scaled = pseudo * float(np.exp(-top)) / (concentration * strength)
    total = pseudo_scaled + float(weight_K.sum())
    return _Prior(a_K=weight_K / total, data_share=pseudo_scaled / total)


def _solve(
    beta_CK: FloatArray,
    mix_C: FloatArray,
    prior: _Prior,
    start_C: FloatArray | None,
    tolerance: float,
) -> tuple[FloatArray, FloatArray, int]:
    """Minimise D by Newton steps relative to p; returns (p, pi before normalising, iterations).

    A step that would change any p or any slack by the factor 1 + h is shortened by 1 / (1 + h):
    that keeps both positive and provably lowers D, so no line search is needed.
    """
    a_K, target_C = prior.a_K, prior.data_share * mix_C
    # A device that has run out has no barrier to keep its slack positive, and needs none.
    gone_K = a_K == 0
    p_C, slack_K = _starting_point(beta_CK, gone_K, prior.data_share, start_C)
    inverse_CC: FloatArray | None = None
    previous = np.inf
    for iteration in range(1, _MOST_ITERATIONS + 1):  # noqa: B007 (the count is returned)
        pi_K = a_K / slack_K
        gradient_C = p_C * (beta_CK @ pi_K) - target_C
        fresh = inverse_CC is None
        if inverse_CC is None:
            inverse_CC = _inverse_curvature(beta_CK, pi_K / slack_K, p_C, target_C)
        step_C = -(inverse_CC @ gradient_C)
        slack_step_K = -((p_C * step_C) @ beta_CK)
        slack_step_K[gone_K] = 0.0
        change = max(float(np.abs(step_C).max()), float(np.abs(slack_step_K / slack_K).max()))
        if not fresh and change > _CHORD_SHRINK * previous:
            inverse_CC = None  # no longer near enough: take this step from a fresh matrix
            previous = np.inf
            continue
        length = 1.0 if change < 0.1 else 1.0 / (1.0 + change)
        p_C = p_C * (1.0 + length * step_C)
        # Not 1 - p beta: a slack of 1e-17 would be lost in the difference.
        slack_K = slack_K + length * slack_step_K
        if _close_enough(change, fresh=fresh, tolerance=tolerance):
            break
        previous = change
        if change > 0.3:
            inverse_CC = None
    return p_C, a_K / slack_K, iteration


def _close_enough(change: float, *, fresh: bool, tolerance: float) -> bool:
    """Whether the step just taken leaves a relative error below the tolerance.

    A fresh Newton step squares the error; an old matrix shrinks it by ``_CHORD_SHRINK`` or more.
    """
    left = change * (change if fresh else _CHORD_SHRINK)
    return left <= tolerance


def _starting_point(
    beta_CK: FloatArray,
    gone_K: NDArray[np.bool_],
    data_share: float,
    start_C: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """The given start where it is valid for these devices, else p = t, the answer at delta 0."""
    if start_C is not None and np.all(start_C > 0):
        slack_K = 1.0 - start_C @ beta_CK
        slack_K[gone_K] = 1.0
        if slack_K.min() > 0:
            return start_C, slack_K
    p_C = np.full(beta_CK.shape[0], data_share)
    return p_C, np.full(beta_CK.shape[1], 1.0 - data_share)


def _inverse_curvature(
    beta_CK: FloatArray, weight_K: FloatArray, p_C: FloatArray, target_C: FloatArray
) -> FloatArray:
    """Inverse of the Hessian of D in relative coordinates, (C, C)."""
    hessian_CC = np.outer(p_C, p_C) * ((beta_CK * weight_K) @ beta_CK.T)
    hessian_CC[np.diag_indices_from(hessian_CC)] += target_C
    return np.asarray(np.linalg.inv(hessian_CC), dtype=np.float64)
