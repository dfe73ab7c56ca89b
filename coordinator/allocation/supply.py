"""Who supplies a step's class counts, so that the step is over soonest.

A step lasts as long as the slowest of its devices: max over devices with samples in it of
fixed_k + per_sample_k * count. Given a time, each device has room for so many samples, and whether
the class counts can be met is a flow from classes through devices. ``smallest_supply`` looks for
the smallest time that works; within it, slow devices go first, since a fast one is of use in any
later step and a slow one is not.

Two ways to fill a given time. ``fill_greedily`` serves the scarcest class first and each class from
the slowest device on: O(samples) with the lists at hand. ``fill_exactly`` solves the flow as a
linear programme (HiGHS), whose vertices are whole numbers. They differ only where devices that
hold several classes are short of room.

Shapes: K devices, M classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation.validation import FloatArray, IntArray

# Times are searched to 1 %: delays are not known any better.
TIME_TOLERANCE = 0.01
_MOST_TRIALS = 24
# A device whose time is up by a rounding error still counts.
_SLACK = 1e-9
# Devices looked at first for a class, per sample wanted: mostly enough, and far from all of them.
_CHUNK_PER_SAMPLE = 4
_LEAST_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Seconds of a step by device, (K,): ``fixed_K``, and ``per_sample_K`` for each sample."""

    fixed_K: FloatArray
    per_sample_K: FloatArray

    def seconds(self, counts_K: IntArray) -> float:
        """Seconds that a step with these counts lasts; devices without samples take no part."""
        active = np.flatnonzero(counts_K)
        if active.size == 0:
            return 0.0
        lasts = self.fixed_K[active] + self.per_sample_K[active] * counts_K[active]
        return float(lasts.max())

    def room_within(self, time_s: float, room_K: IntArray) -> IntArray:
        """Samples that each device can serve within ``time_s``, at most its room."""
        spare_K = time_s * (1 + _SLACK) - self.fixed_K
        if not self.per_sample_K.any():
            return np.where(spare_K >= 0, room_K, 0)
        most_K = room_K.astype(np.float64)
        # A time per sample that the spare time holds more often than there is room counts as 0.
        counted_K = self.per_sample_K * most_K > np.maximum(spare_K, 0.0)
        served_K = np.divide(spare_K, self.per_sample_K, out=most_K, where=counted_K)
        served_K = np.maximum(np.floor(served_K + _SLACK), 0.0)
        return np.where(spare_K >= 0, served_K, 0.0).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a step asks for, and who could supply it.

    wanted_M: samples per class. remaining_MK: what devices hold. room_K: most that each takes.
    holders: for each class its devices, the slowest first.
    """

    wanted_M: IntArray
    remaining_MK: IntArray
    room_K: IntArray
    holders: tuple[IntArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, K)."""
        return self.remaining_MK.shape


Fill = Callable[[Demand, Speeds, float], IntArray | None]


def class_supply(demand: Demand, room_K: IntArray) -> IntArray:
    """Samples of each class that devices could give if it were the only one wanted, (M,)."""
    supply_M: IntArray = np.minimum(demand.remaining_MK, room_K).sum(axis=1)
    return supply_M


def fill_greedily(demand: Demand, speeds: Speeds, time_s: float) -> IntArray | None:
    """Counts (M, K) that meet the demand within ``time_s``; None where this rule finds none."""
    room_K = speeds.room_within(time_s, demand.room_K)
    if np.any(class_supply(demand, room_K) < demand.wanted_M):
        return None
    counts_MK, missing = fill_as_far(demand, room_K, stop_early=True)
    return None if missing else counts_MK


def fill_as_far(
    demand: Demand, room_K: IntArray, *, stop_early: bool = False
) -> tuple[IntArray, int]:
    """Counts (M, K) within the devices' room, and how many samples could not be supplied.

    The scarcest class goes first. ``stop_early``: the first that cannot be met ends it.
    """
    counts_MK = np.zeros(demand.shape, dtype=np.int64)
    room_K = room_K.copy()
    missing = 0
    wanted = np.flatnonzero(demand.wanted_M)
    scarcity = class_supply(demand, room_K)[wanted] / demand.wanted_M[wanted]
    for label in wanted[np.argsort(scarcity, kind="stable")]:
        for ids, given in _serve_class(demand, int(label), room_K):
            counts_MK[label, ids] = given
            room_K[ids] -= given
        missing += int(demand.wanted_M[label] - counts_MK[label].sum())
        if missing and stop_early:
            break
    return counts_MK, missing


def _serve_class(
    demand: Demand, label: int, room_K: IntArray
) -> Iterator[tuple[IntArray, IntArray]]:
    """(devices, samples of the class that each gives), a chunk of its holders at a time."""
    missing = int(demand.wanted_M[label])
    holders = demand.holders[label]
    start, chunk = 0, max(_LEAST_CHUNK, _CHUNK_PER_SAMPLE * missing)
    while missing and start < holders.size:
        ids = holders[start : start + chunk]
        available = np.minimum(demand.remaining_MK[label, ids], room_K[ids])
        given = np.clip(missing - (np.cumsum(available) - available), 0, available)
        yield ids, given
        missing -= int(given.sum())
        start, chunk = start + chunk, 2 * chunk


def fill_exactly(demand: Demand, speeds: Speeds, time_s: float) -> IntArray | None:
    """Counts (M, K) within ``time_s`` that take most from the slowest; None where there are none.

    The constraint matrix is that of a transport problem, so the solver's vertex is whole.
    """
    from scipy.optimize import linprog  # noqa: PLC0415 (half a second that other policies save)
    from scipy.sparse import csr_array  # noqa: PLC0415

    room_K = speeds.room_within(time_s, demand.room_K)
    most_MK = np.minimum(np.minimum(demand.remaining_MK, room_K), demand.wanted_M[:, None])
    labels, devices = np.nonzero(most_MK)
    if np.any(most_MK.sum(axis=1) < demand.wanted_M):
        return None
    pairs = np.arange(labels.size)
    ones = np.ones(labels.size)
    answer = linprog(
        -_slowness_rank(demand, devices),
        A_eq=csr_array((ones, (labels, pairs)), shape=(demand.shape[0], labels.size)),
        b_eq=demand.wanted_M,
        A_ub=csr_array((ones, (devices, pairs)), shape=(demand.shape[1], labels.size)),
        b_ub=room_K,
        bounds=np.stack([np.zeros(labels.size), most_MK[labels, devices]], axis=1),
        method="highs",
    )
    if answer.status != 0:
        return None
    counts_MK = np.zeros(demand.shape, dtype=np.int64)
    counts_MK[labels, devices] = np.rint(answer.x).astype(np.int64)
    return counts_MK


def _slowness_rank(demand: Demand, devices: IntArray) -> FloatArray:
    """From 1 for the slowest down to 0, by the order of the lists of holders.

    Only those count that hold the class still: lists that were made anew, as after a resume, lack
    the others.
    """
    rank_K = np.zeros(demand.shape[1])
    for listed, remaining_K in zip(demand.holders, demand.remaining_MK, strict=True):
        holders = listed[remaining_K[listed] > 0]
        rank_K[holders] = np.maximum(rank_K[holders], np.linspace(1.0, 0.0, holders.size))
    return rank_K[devices]


def smallest_supply(
    demand: Demand, speeds: Speeds, *, least_s: float, guess_s: float = 0.0, exactly: bool
) -> IntArray | None:
    """Counts (M, K) in the smallest time from ``least_s`` on, to 1 %; None where none was found.

    ``guess_s`` is a time to look round first. The greedy rule searches first; ``exactly`` lets the
    solver go on from what it found.
    """
    soonest_s = _soonest_s(demand, speeds, least_s, guess_s)
    if soonest_s is None:
        return None
    best = fill_greedily(demand, speeds, soonest_s)
    if best is not None:
        return best
    best = _search(demand, speeds, fill_greedily, soonest_s, None)
    return _search(demand, speeds, fill_exactly, soonest_s, best) if exactly else best


def _soonest_s(demand: Demand, speeds: Speeds, least_s: float, guess_s: float) -> float | None:
    """Smallest time, to 1 %, in which each class alone could be met: no supply is over sooner."""

    def suffices(time_s: float) -> bool:
        room_K = speeds.room_within(time_s, demand.room_K)
        return bool(np.all(class_supply(demand, room_K) >= demand.wanted_M))

    if suffices(least_s):
        return least_s
    low_s, high_s = least_s, longest_s(demand, speeds)
    if not suffices(high_s):
        return None
    step = 1 + 2 * TIME_TOLERANCE
    if low_s < guess_s < high_s:
        # From the guess, away in growing strides until a time that does is on the other side.
        while low_s < guess_s < high_s:
            if suffices(guess_s):
                high_s, guess_s = guess_s, guess_s / step
            else:
                low_s, guess_s = guess_s, guess_s * step
            step = step**2
    for _ in range(_MOST_TRIALS):
        if high_s <= low_s * (1 + TIME_TOLERANCE):
            break
        middle_s = _between(low_s, high_s)
        low_s, high_s = (low_s, middle_s) if suffices(middle_s) else (middle_s, high_s)
    return high_s


def _between(low_s: float, high_s: float) -> float:
    return math.sqrt(low_s * high_s) if low_s > 0 else high_s / 8


def _search(
    demand: Demand, speeds: Speeds, fill: Fill, low_s: float, best: IntArray | None
) -> IntArray | None:
    """Bisect between a time that does not do and that of ``best``, or the longest of all."""
    if best is None:
        best = fill(demand, speeds, longest_s(demand, speeds))
    if best is None:
        return None
    high_s = speeds.seconds(best.sum(axis=0))
    for _ in range(_MOST_TRIALS):
        if high_s <= low_s * (1 + TIME_TOLERANCE):
            break
        middle_s = _between(low_s, high_s)
        found = fill(demand, speeds, middle_s)
        if found is None:
            low_s = middle_s
        else:
            best, high_s = found, min(middle_s, speeds.seconds(found.sum(axis=0)))
    return best


def shortest_s(speeds: Speeds, present_K: NDArray[np.bool_]) -> float:
    """Seconds of the fastest device with a single sample: no step is over sooner."""
    return float((speeds.fixed_K + speeds.per_sample_K)[present_K].min())


def longest_s(demand: Demand, speeds: Speeds) -> float:
    """Seconds that are enough for any supply of the demand."""
    most_K = np.minimum(demand.room_K, int(demand.wanted_M.sum()))
    lasts_K = speeds.fixed_K + speeds.per_sample_K * most_K
    return float(lasts_K[most_K > 0].max(initial=0.0))
