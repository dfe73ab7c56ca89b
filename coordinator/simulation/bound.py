"""The least time that any schedule of an epoch can take: a lower bound to hold policies against.

A schedule gives every sample to one step; a step has at most B samples, at most cap_k of device k,
and lasts max_k (f_k + p_k x_k) over the devices with x_k > 0. Three arguments, the best one counts:

- *Fewest steps.* Any step with device k lasts at least s_k = f_k + p_k. The devices with s_k of at
  least some s need N(s) = max(ceil(sum n_k / B), max ceil(n_k / cap_k)) steps, so the whole takes
  at least the integral of N(s) over s. This is the slow devices in the fewest steps that B and the
  caps permit; without parts per sample and without caps a schedule attains it: the slowest first,
  each step filled up to B.
- *One device alone.* Its own steps last at least f_k ceil(n_k / cap_k) + p_k n_k together.
- *Prices.* If prices w_k >= 0 per sample are such that no step sells for more than it lasts,
  sum_k w_k x_k <= max_k (f_k + p_k x_k), then summing over the steps of a schedule gives
  sum_k w_k n_k <= time. Good prices come from a linear program over a few step lengths, the dual of
  filling steps of these lengths; they are then checked against *all* step lengths and scaled down
  by the worst excess. So the solver decides how good the bound is, never whether it holds.

Shapes: G devices, or groups of like devices, with samples; D step lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.simulation.delay_models import DeviceDelays

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MOST_GROUPS = 128
MOST_LENGTHS = 4096
_FIRST_LENGTHS = 24
_ADDED_LENGTHS = 12
_ROUNDS = 6
_GOOD_EXCESS = 1.002
_SLACK = 1e-9  # of rounding in floor(): a reach that is too large only lowers the bound


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What is to be scheduled: n samples, at most cap in a step, f + p x seconds, (G,) each.

    ``members_G`` is how many devices stand behind each entry.
    """

    n_G: FloatArray
    cap_G: FloatArray
    fixed_s_G: FloatArray
    per_sample_s_G: FloatArray
    members_G: FloatArray
    global_batch: int


def time_lower_bound_s(
    held_K: IntArray,
    delays: DeviceDelays,
    global_batch: int,
    max_batch_K: IntArray | None = None,
) -> float:
    """Seconds that no schedule of one epoch undercuts whose steps have at most ``global_batch``.

    held_K: samples of each device; max_batch_K: largest count per device and step, None for none.
    FLS and FPLS give every device at least one sample a step, so their steps can be larger than
    the global batch; the bound does not hold for these.
    """
    work = _work_of(np.asarray(held_K), delays, global_batch, max_batch_K)
    if work.n_G.size == 0:
        return 0.0
    bound_s = max(_fewest_steps_s(work), _one_alone_s(work))
    capped = work.cap_G < np.minimum(work.n_G, global_batch)
    if work.per_sample_s_G.any() or capped.any():
        bound_s = max(bound_s, _priced_s(_grouped(work)))
    return bound_s


def _work_of(
    held_K: IntArray, delays: DeviceDelays, global_batch: int, max_batch_K: IntArray | None
) -> _Work:
    # Leaving devices out that take no time shortens no schedule of the others.
    there = (held_K > 0) & (delays.fixed_s_K + delays.per_sample_s_K > 0)
    n_G = held_K[there].astype(np.float64)
    cap_G = np.minimum(n_G, global_batch)
    if max_batch_K is not None:
        cap_G = np.minimum(cap_G, max_batch_K[there])
    return _Work(
        n_G,
        cap_G,
        delays.fixed_s_K[there],
        delays.per_sample_s_K[there],
        np.ones_like(n_G),
        global_batch,
    )


def _fewest_steps_s(work: _Work) -> float:
    shortest_s_G = work.fixed_s_G + work.per_sample_s_G
    order = np.argsort(-shortest_s_G, kind="stable")
    for_batch_G = np.ceil(np.cumsum(work.n_G[order]) / work.global_batch)
    for_caps_G = np.maximum.accumulate(np.ceil(work.n_G / work.cap_G)[order])
    falls_G = -np.diff(shortest_s_G[order], append=0.0)
    return float((falls_G * np.maximum(for_batch_G, for_caps_G)).sum())


def _one_alone_s(work: _Work) -> float:
    steps_G = np.ceil(work.n_G / work.cap_G)
    return float((work.fixed_s_G * steps_G + work.per_sample_s_G * work.n_G).max())


def _grouped(work: _Work) -> _Work:
    """Pool like devices where there are many; a group is as fast as its fastest parts.

    min(cap, j) is concave in cap, so a group reaches at most its size times that of the mean cap.
    """
    if work.n_G.size <= MOST_GROUPS:
        return work
    group_of = _like_devices(work)
    groups = int(group_of.max()) + 1
    members_G = np.bincount(group_of).astype(np.float64)
    fixed_s_G, per_sample_s_G = np.full(groups, np.inf), np.full(groups, np.inf)
    np.minimum.at(fixed_s_G, group_of, work.fixed_s_G)
    np.minimum.at(per_sample_s_G, group_of, work.per_sample_s_G)
    return _Work(
        np.bincount(group_of, weights=work.n_G).astype(np.float64),
        np.bincount(group_of, weights=work.cap_G) / members_G,
        fixed_s_G,
        per_sample_s_G,
        members_G,
        work.global_batch,
    )


def _like_devices(work: _Work) -> IntArray:
    """The group of each device: equal delays, or, where too many differ, a like magnitude."""
    parts_G2 = np.stack([work.fixed_s_G, work.per_sample_s_G], axis=1)
    _, group_of = np.unique(parts_G2, axis=0, return_inverse=True)
    if group_of.max() >= MOST_GROUPS:
        typical_s_G = work.fixed_s_G + work.per_sample_s_G * np.median(work.cap_G)
        edges = np.geomspace(typical_s_G.min(), typical_s_G.max(), MOST_GROUPS + 1)[1:-1]
        _, group_of = np.unique(np.searchsorted(edges, typical_s_G), return_inverse=True)
    return group_of.astype(np.int64)


def _priced_s(work: _Work) -> float:
    lengths_D, reach_GD = _step_lengths(work)
    chosen = np.unique(np.linspace(0, lengths_D.size - 1, _FIRST_LENGTHS).astype(np.int64))
    best_s = 0.0
    for _ in range(_ROUNDS):
        price_G = _solve_prices(work, lengths_D[chosen], reach_GD[:, chosen])
        if price_G is None:
            break
        excess_D = _sold_for(price_G, reach_GD, work.global_batch) / lengths_D
        worst = float(excess_D.max())
        if worst <= 0:
            break
        best_s = max(best_s, float(price_G @ work.n_G) / worst)
        if worst <= _GOOD_EXCESS:
            break
        chosen = np.union1d(chosen, _worst_of_each_stretch(excess_D))
    return best_s


def _step_lengths(work: _Work) -> tuple[FloatArray, FloatArray]:
    """Lengths (D,) and how many samples of each group a step can have that is not longer, (G, D).

    Either between two lengths no device reaches more samples, or, where there would be too many
    such lengths, a step counts as as long as the lower one and as reaching as far as the upper one.
    """
    lengths_D = _breakpoints(work)
    if lengths_D is not None:
        return lengths_D, _reach(work, lengths_D)
    shortest_s = float((work.fixed_s_G + work.per_sample_s_G).min())
    longest_s = float((work.fixed_s_G + work.per_sample_s_G * np.ceil(work.cap_G)).max())
    lengths_D = np.geomspace(shortest_s, longest_s, MOST_LENGTHS)
    return lengths_D, _reach(work, np.append(lengths_D[1:], np.inf))


def _breakpoints(work: _Work) -> FloatArray | None:
    """Every length at which some device reaches one sample more, ascending; None if too many."""
    most = int(np.ceil(work.cap_G.max())) if work.per_sample_s_G.any() else 1
    if most * work.n_G.size > 64 * MOST_LENGTHS:
        return None
    counts_GJ = np.minimum(np.arange(1.0, most + 1)[None, :], np.ceil(work.cap_G)[:, None])
    lengths_D = np.unique(work.fixed_s_G[:, None] + work.per_sample_s_G[:, None] * counts_GJ)
    return lengths_D if lengths_D.size <= MOST_LENGTHS else None


def _reach(work: _Work, lengths_D: FloatArray) -> FloatArray:
    """Samples that the devices of each group can give within each length, (G, D)."""
    spare_GD = lengths_D[None, :] - work.fixed_s_G[:, None]
    per_sample_G1 = work.per_sample_s_G[:, None]
    in_time_GD = spare_GD >= per_sample_G1 - _SLACK * lengths_D
    with np.errstate(divide="ignore", invalid="ignore"):
        reach_GD = np.floor(spare_GD / per_sample_G1 * (1 + _SLACK) + _SLACK)
    reach_GD = np.where(per_sample_G1 > 0, np.maximum(reach_GD, 1.0), np.inf)
    reach_GD = np.where(in_time_GD, np.minimum(reach_GD, work.cap_G[:, None]), 0.0)
    return reach_GD * work.members_G[:, None]


def _solve_prices(work: _Work, lengths_D: FloatArray, reach_GD: FloatArray) -> FloatArray | None:
    """Prices of the samples where only steps of these lengths may be used, in any number.

    Primal: y_D steps of each length, z_GD samples of a group in them; min sum lengths y, with
    z_GD <= reach_GD y_D, sum_G z_GD <= B y_D and sum_D z_GD >= n_G, whose dual values these are.
    """
    from scipy.optimize import linprog  # noqa: PLC0415 - takes half a second, and few need it
    from scipy.sparse import csr_array, eye_array, hstack, kron, vstack  # noqa: PLC0415

    groups, lengths = reach_GD.shape
    scale_s = float(lengths_D.max())
    reach_rows = hstack(
        [vstack([csr_array(np.diag(-row_D)) for row_D in reach_GD]), eye_array(groups * lengths)]
    )
    batch_rows = hstack(
        [
            -work.global_batch * eye_array(lengths),
            kron(np.ones((1, groups)), eye_array(lengths)),
        ]
    )
    need_rows = hstack(
        [csr_array((groups, lengths)), -kron(eye_array(groups), np.ones((1, lengths)))]
    )
    result = linprog(
        np.concatenate([lengths_D / scale_s, np.zeros(groups * lengths)]),
        A_ub=csr_array(vstack([reach_rows, batch_rows, need_rows])),
        b_ub=np.concatenate([np.zeros(groups * lengths + lengths), -work.n_G / work.n_G.sum()]),
        method="highs",
    )
    if not result.success:
        return None
    price_G: FloatArray = np.maximum(-result.ineqlin.marginals[-groups:], 0.0) * scale_s
    return price_G


def _sold_for(price_G: FloatArray, reach_GD: FloatArray, global_batch: int) -> FloatArray:
    """The most that the samples of a step of each length can sell for, (D,): dearest first."""
    order = np.argsort(-price_G, kind="stable")
    taken_GD = np.minimum(np.cumsum(reach_GD[order], axis=0), global_batch)
    sold_D: FloatArray = price_G[order] @ np.diff(taken_GD, axis=0, prepend=0.0)
    return sold_D


def _worst_of_each_stretch(excess_D: FloatArray) -> IntArray:
    """Lengths at which the prices are too high, one from each stretch of neighbours."""
    stretches = np.array_split(np.arange(excess_D.size), min(_ADDED_LENGTHS, excess_D.size))
    worst: IntArray = np.array([stretch[np.argmax(excess_D[stretch])] for stretch in stretches])
    too_high: IntArray = worst[excess_D[worst] > 1.0]
    return too_high
