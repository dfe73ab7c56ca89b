"""How long the steps of an epoch should last, so that its slowest work is done in time.

If each step were over as soon as its class counts allow, a device that needs long for its samples
(a large time per sample) would be idle in part early in the epoch, and be waited for at its end.
``plan_pace`` therefore solves the epoch in the large: with w_j the number of steps that last T_j
seconds and c_kj the samples that device k can supply to one of them,

    minimise sum_j w_j T_j   such that
        sum_j w_j >= steps,
        sum_j w_j c_kj >= n_k                                     for each device, and
        sum_j w_j min(b_m, sum_{k in A} min(c_kj, L_km)) >= sum_{k in A} L_km

for each class m and each set A of the slowest devices (nested, by their time for one sample and by
that for a typical contribution). n_k and L_km are what is left, b_m the mean count of the class in
a step. These conditions are necessary, up to rounding, and hardly more is needed: played out,
epochs take a few per cent more than the optimum of this programme. It has some 40 unknowns whatever
the fleet.

Shapes: K devices, M classes, J times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation.supply import Speeds, shortest_s
from coordinator.allocation.validation import FloatArray, IntArray

_TIMES = 32
_SETS = 24
# Part of what the classes let a device supply at once; each gives a time worth planning with.
_PARTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
# Larger fleets are planned on so many of their devices, evenly taken from slow to fast.
_MOST_DEVICES = 512
# A time that not even half a step should have is a corner of the programme, not a pace.
_LEAST_STEPS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """``least_s``: no step needs to be over sooner. ``epoch_s``: time of all that is left."""

    least_s: float
    epoch_s: float


def plan_pace(
    remaining_MK: IntArray, room_K: IntArray, speeds: Speeds, *, global_batch: int
) -> Pace:
    """Solve the programme for what is left; at least one sample must be.

    room_K: most that a device takes in a step (its cap; anything from its samples on is none).
    """
    from scipy.optimize import linprog  # noqa: PLC0415 (half a second that other policies save)

    work = _Work.of(remaining_MK, room_K, speeds, global_batch)
    times_J = work.times()
    served_KJ = work.served(times_J)
    needs = [work.steps_need(times_J), work.device_needs(served_KJ)]
    needs += [work.class_needs(served_KJ, slowness_K) for slowness_K in work.slowness()]
    answer = linprog(
        times_J,
        A_ub=-np.concatenate([rows for rows, _ in needs]),
        b_ub=-np.concatenate([least for _, least in needs]),
        method="highs",
    )
    shortest = shortest_s(speeds, remaining_MK.max(axis=0) > 0)
    if answer.status != 0:
        # Caps can make the conditions contradict the times looked at: then no pace is held.
        return Pace(least_s=shortest, epoch_s=math.inf)
    used = np.flatnonzero(answer.x >= _LEAST_STEPS)
    least_s = float(times_J[used[0]]) if used.size else shortest
    return Pace(least_s=max(shortest, least_s), epoch_s=float(answer.fun))


Needs = tuple[FloatArray, FloatArray]  # rows over J, and the least of each


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What is left to do, of the devices that the programme looks at.

    at_once_K: most samples that a device could supply to one step of the mean class counts.
    """

    remaining_MK: FloatArray
    fixed_K: FloatArray
    per_sample_K: FloatArray
    at_once_K: FloatArray
    batch_M: FloatArray
    steps: float

    @classmethod
    def of(
        cls, remaining_MK: IntArray, room_K: IntArray, speeds: Speeds, global_batch: int
    ) -> _Work:
        left = int(remaining_MK.sum())
        batch = min(global_batch, left)
        chosen = _chosen(remaining_MK.max(axis=0) > 0, speeds)
        part_MK = remaining_MK[:, chosen].astype(np.float64)
        steps = left / batch
        at_once_MK = np.minimum(part_MK, remaining_MK.sum(axis=1)[:, None] / steps)
        at_once_K = np.minimum(at_once_MK.sum(axis=0), room_K[chosen])
        return cls(
            remaining_MK=part_MK,
            fixed_K=speeds.fixed_K[chosen],
            per_sample_K=speeds.per_sample_K[chosen],
            at_once_K=np.maximum(at_once_K, 1.0),
            # Of a part of the devices the steps are as many, with their part of each class.
            batch_M=part_MK.sum(axis=1) / steps,
            steps=steps,
        )

    def times(self) -> FloatArray:
        """Times worth planning with, rising, (J,): the largest of each part of a log scale."""
        extra = [np.ceil((self.at_once_K - 1.0) * part) for part in _PARTS]
        times = np.unique([self.fixed_K + self.per_sample_K * (1.0 + more) for more in extra])
        if times.size <= _TIMES:
            return times
        positive = times[times > 0]
        edges = np.geomspace(positive[0], positive[-1], _TIMES + 1)[1:]
        last = np.searchsorted(times, edges * (1 + 1e-9), side="right") - 1
        return np.unique(times[last])

    def served(self, times_J: FloatArray) -> FloatArray:
        """c: samples that each device can supply to a step of each time, (K, J)."""
        spare_KJ = times_J * (1 + 1e-9) - self.fixed_K[:, None]
        limit_KJ = np.broadcast_to(self.at_once_K[:, None], spare_KJ.shape).copy()
        each_K1 = self.per_sample_K[:, None]
        tight_KJ = each_K1 * limit_KJ > np.maximum(spare_KJ, 0.0)
        served_KJ = np.floor(np.divide(spare_KJ, each_K1, out=limit_KJ, where=tight_KJ) + 1e-9)
        served_KJ = np.where(tight_KJ, served_KJ, self.at_once_K[:, None])
        return np.where(spare_KJ >= 0, np.maximum(served_KJ, 0.0), 0.0)

    def slowness(self) -> tuple[FloatArray, FloatArray]:
        """Two measures by which sets of slow devices are made, (K,) each."""
        typical_K = np.maximum(1.0, self.remaining_MK.sum(axis=0) / self.steps)
        return self.fixed_K + self.per_sample_K, self.fixed_K + self.per_sample_K * typical_K

    def steps_need(self, times_J: FloatArray) -> Needs:
        return np.ones((1, times_J.size)), np.array([self.steps])

    def device_needs(self, served_KJ: FloatArray) -> Needs:
        return served_KJ, self.remaining_MK.sum(axis=0)

    def class_needs(self, served_KJ: FloatArray, slowness_K: FloatArray) -> Needs:
        order = np.argsort(-slowness_K, kind="stable")
        ends = _set_ends(slowness_K[order])
        rows, least = [], []
        for label in np.flatnonzero(self.batch_M):
            held_K = self.remaining_MK[label, order]
            supply_KJ = np.cumsum(np.minimum(served_KJ[order], held_K[:, None]), axis=0)
            rows.append(np.minimum(supply_KJ[ends], self.batch_M[label]))
            least.append(np.cumsum(held_K)[ends])
        return np.concatenate(rows), np.concatenate(least)


def _chosen(present_K: NDArray[np.bool_], speeds: Speeds) -> IntArray:
    """Devices to plan on: all with samples left, or an even part of them from slow to fast."""
    present = np.flatnonzero(present_K)
    if present.size <= _MOST_DEVICES:
        return present
    slowness = speeds.fixed_K[present] + speeds.per_sample_K[present]
    places = np.linspace(0, present.size - 1, _MOST_DEVICES).round().astype(np.int64)
    chosen: IntArray = present[np.argsort(-slowness, kind="stable")[places]]
    return chosen


def _set_ends(falling: FloatArray) -> IntArray:
    """Last index of each set of slowest devices: where slowness falls, at most some sets."""
    ends = np.append(np.flatnonzero(falling[1:] < falling[:-1] * (1 - 1e-12)), falling.size - 1)
    if ends.size > _SETS:
        ends = ends[np.unique(np.linspace(0, ends.size - 1, _SETS).round().astype(np.int64))]
    return ends
