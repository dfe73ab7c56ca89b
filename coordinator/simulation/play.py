"""One policy over one epoch of a simulated fleet, step by step.

The plan is the real planner's; what the simulation adds is how long each step lasts and which
classes it holds. Devices take their samples in the order of a random permutation, so the classes of
a count are a draw without replacement from what the device has left, unless the plan names classes.

Shapes: K devices, M classes, T steps. Nothing here is K x T unless the counts are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation import EpochPlanner
from coordinator.allocation.planner import DEFAULT_REFIT_EVERY
from coordinator.simulation.choices import PolicyChoice
from coordinator.simulation.fleet import SimulatedFleet

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_CLASS_STREAM = 12  # of a seed: which samples devices take is independent of the plan


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Who took part in a step: device indices and their counts, of the same length."""

    devices: IntArray
    counts: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlay:
    """An epoch as it went, (T,) each.

    ``seconds_T`` modelled time; ``deviation_T`` L1 distance of the step's class mix from the pooled
    one; ``active_T`` devices with samples; ``with_straggler_T`` whether one of them is a straggler;
    ``delta_T`` LDS's delta, NaN for policies without. ``counts`` only where they were asked for.
    """

    samples_T: IntArray
    seconds_T: FloatArray
    deviation_T: FloatArray
    active_T: IntArray
    with_straggler_T: BoolArray
    delta_T: FloatArray
    counts: tuple[StepCounts, ...] | None = None

    @property
    def steps(self) -> int:
        """T."""
        return int(self.samples_T.size)


def play_epoch(
    fleet: SimulatedFleet,
    choice: PolicyChoice,
    *,
    global_batch: int,
    seed: int,
    refit_every: int = DEFAULT_REFIT_EVERY,
    keep_counts: bool = False,
) -> EpochPlay:
    """Plan and time every step of one epoch; raises ValueError for settings that the planner lacks.

    The planner is told what each device takes, as a run tells it what it has measured.
    """
    held_K = fleet.held_K
    stragglers_K = fleet.delays.stragglers(held_K, global_batch)
    planner = EpochPlanner(
        fleet.label_counts_KM,
        global_batch,
        policy=choice.policy,
        delays_s=fleet.delays.fixed_s_K,
        per_sample_s=fleet.delays.per_sample_s_K,
        delta=choice.delta,
        deviation_budget=choice.deviation_budget,
        max_batch=fleet.max_batch_K,
        refit_every=refit_every,
        seed=seed,
    )
    classes = ClassDraws(fleet.label_counts_KM, seed)
    steps: list[_Step] = []
    kept: list[StepCounts] = []
    while (counts_K := planner.next_step()) is not None:
        taking = StepCounts(np.flatnonzero(counts_K), counts_K[counts_K > 0])
        steps.append(
            _Step(
                samples=int(taking.counts.sum()),
                seconds=fleet.delays.step_s(counts_K),
                deviation=classes.take(taking, planner.class_counts),
                active=taking.devices.size,
                with_straggler=bool(stragglers_K[taking.devices].any()),
                delta=math.nan if planner.last_delta is None else planner.last_delta,
            )
        )
        if keep_counts:
            kept.append(taking)
    return _in_columns(steps, tuple(kept) if keep_counts else None)


class _Step(NamedTuple):
    samples: int
    seconds: float
    deviation: float
    active: int
    with_straggler: bool
    delta: float


def _in_columns(steps: list[_Step], counts: tuple[StepCounts, ...] | None) -> EpochPlay:
    samples, seconds, deviation, active, with_straggler, delta = zip(*steps, strict=True)
    return EpochPlay(
        np.array(samples),
        np.array(seconds),
        np.array(deviation),
        np.array(active),
        np.array(with_straggler),
        np.array(delta),
        counts,
    )


class ClassDraws:
    """The classes of the samples that devices take, drawn without replacement."""

    def __init__(self, label_counts_KM: IntArray, seed: int) -> None:
        self._left_KM = label_counts_KM.astype(np.int64, copy=True)
        pooled_M = self._left_KM.sum(axis=0)
        self._pooled_mix_M: FloatArray = pooled_M / pooled_M.sum()
        self._rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([seed, _CLASS_STREAM]))
        )

    def take(self, taking: StepCounts, planned_KM: IntArray | None) -> float:
        """Take the samples of a step; returns its batch deviation.

        planned_KM: what the plan wants of each class, None where it leaves that to the devices.
        """
        left_AM = self._left_KM[taking.devices]
        if planned_KM is None:
            taken_AM = self._draw(left_AM, taking.counts)
        else:
            taken_AM = planned_KM[taking.devices]
        self._left_KM[taking.devices] = left_AM - taken_AM
        taken_M = taken_AM.sum(axis=0)
        return float(np.abs(taken_M / taken_M.sum() - self._pooled_mix_M).sum())

    def _draw(self, left_AM: IntArray, counts_A: IntArray) -> IntArray:
        """Class by class: given those before, the count of a class is hypergeometric."""
        behind_A, missing_A = left_AM.sum(axis=1), counts_A.copy()
        taken_AM = np.zeros_like(left_AM)
        for m in range(left_AM.shape[1]):
            own = np.flatnonzero(left_AM[:, m])
            good = left_AM[own, m]
            behind_A[own] -= good
            taken_AM[own, m] = self._rng.hypergeometric(good, behind_A[own], missing_A[own])
            missing_A[own] -= taken_AM[own, m]
        return taken_AM
