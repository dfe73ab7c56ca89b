"""Class-targeted sampling: UGS's class counts, supplied by whom the step is over soonest with.

Each step's class counts are drawn as UGS draws them from the pooled samples that are left (without
replacement), so batch deviation is UGS's, exactly. Who supplies them is free: any device that
holds the class will do. The step takes the smallest time in which its counts can be met, but not
less than the pace that the epoch's slowest work needs, and within that time the slowest devices go
first, so that they share few steps. Idea: latency-budgeted assignment, arXiv:2609.32132.

With fixed delays alone and no caps, the steps that devices slower than any given time take part in
are the fewest, up to the chance that one step holds more of a class than another;
docs/allocation.md says why. Shapes: K devices, M classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coordinator.allocation.budget import LEAST_DELAY_RANGE
from coordinator.allocation.draws import draw_hypergeometric
from coordinator.allocation.fleet import Delays, Fleet, State
from coordinator.allocation.pace import plan_pace
from coordinator.allocation.supply import (
    Demand,
    Speeds,
    fill_as_far,
    shortest_s,
    smallest_supply,
)
from coordinator.allocation.validation import IntArray

# The solver takes milliseconds for so many pairs of a device and a class that it holds, and a step
# up to ten solutions. With more pairs the greedy rule is mostly as good, and far cheaper.
MOST_PAIRS_SOLVED = 64


class ClassTargetedSampling:
    """One epoch. Order and pace are made anew every ``refit_every`` steps and after ``replan``."""

    delta: float | None = None

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._use(fleet.delays)
        self._slowest_first = np.zeros(0, dtype=np.int64)
        self._holders: tuple[IntArray, ...] = ()
        self._pace_s = 0.0
        self._last_s = 0.0
        self._steps_since_refit = 0
        self._stale = True

    def draw_by_class(
        self, rng: np.random.Generator, remaining_MK: IntArray, room_K: IntArray
    ) -> IntArray:
        """Counts (M, K): UGS's class counts, met by the supply that is over soonest.

        Where caps let nobody supply a class any more, its samples are drawn again from what
        devices with room hold. The generator is used for class counts alone.
        """
        self._refit_where_due(remaining_MK, room_K)
        self._steps_since_refit += 1
        left_M = remaining_MK.sum(axis=1)
        wanted_M = draw_hypergeometric(rng, left_M, left_M, self._fleet.global_batch)
        demand = Demand(
            wanted_M=wanted_M, remaining_MK=remaining_MK, room_K=room_K, holders=self._holders
        )
        speeds = self._speeds
        least_s = max(self._pace_s, shortest_s(speeds, room_K > 0))
        supply_MK = smallest_supply(
            demand,
            speeds,
            least_s=least_s,
            guess_s=self._last_s,
            exactly=self._is_small(remaining_MK),
        )
        if supply_MK is None:
            return self._under_caps(rng, demand)
        self._last_s = speeds.seconds(supply_MK.sum(axis=0))
        return supply_MK

    def replan(self, delays: Delays) -> None:
        """Order devices by these delays before the next step."""
        self._use(delays)
        self._stale = True

    def state(self) -> State:
        """Order and pace, which were made on an earlier remainder."""
        return {
            "slowest_first": self._slowest_first.tolist(),
            "pace_s": self._pace_s,
            "last_s": self._last_s,
            "steps_since_refit": self._steps_since_refit,
            "stale": self._stale,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the order and the pace of ``state``."""
        self._slowest_first = np.array(state["slowest_first"], dtype=np.int64)
        self._holders = ()
        self._pace_s = float(state["pace_s"])
        self._last_s = float(state["last_s"])
        self._steps_since_refit = int(state["steps_since_refit"])
        self._stale = bool(state["stale"])

    def _use(self, delays: Delays) -> None:
        """Where delays are alike, as before the first measurement, even shares are sought."""
        held_K = self._fleet.held_K
        fixed_K = delays.speeds.fixed_K[held_K > 0]
        longest_s = float(fixed_K.max(initial=0.0))
        alike = longest_s - float(fixed_K.min(initial=longest_s)) <= LEAST_DELAY_RANGE * longest_s
        self._is_even = alike and not delays.speeds.per_sample_K.any()
        self._speeds = delays.speeds
        if self._is_even:
            self._speeds = Speeds(
                fixed_K=np.zeros(held_K.shape), per_sample_K=1.0 / np.maximum(held_K, 1)
            )

    def _is_small(self, remaining_MK: IntArray) -> bool:
        return int(np.count_nonzero(remaining_MK)) <= MOST_PAIRS_SOLVED

    def _refit_where_due(self, remaining_MK: IntArray, room_K: IntArray) -> None:
        if self._stale or self._steps_since_refit >= self._fleet.refit_every:
            self._slowest_first = self._order(remaining_MK.sum(axis=0))
            self._pace_s = self._pace(remaining_MK, room_K)
            self._steps_since_refit, self._stale = 0, False
            self._holders = ()
        if not self._holders:
            order = self._slowest_first
            self._holders = tuple(order[held_K[order] > 0] for held_K in remaining_MK)

    def _order(self, left_K: IntArray) -> IntArray:
        """Devices with samples left by the time of what is typical of them now, slowest first.

        Among equals those with most samples left go first: they are needed longest.
        """
        speeds = self._speeds
        typical_K = self._fleet.global_batch * (left_K / int(left_K.sum()))
        slowness_K = speeds.fixed_K + speeds.per_sample_K * np.maximum(typical_K, 1.0)
        order: IntArray = np.lexsort((-left_K, -slowness_K))
        return order[left_K[order] > 0]

    def _pace(self, remaining_MK: IntArray, room_K: IntArray) -> float:
        """Least time of a step; only a time per sample makes it pay to wait."""
        if self._is_even or not self._speeds.per_sample_K.any():
            return 0.0
        return plan_pace(
            remaining_MK, room_K, self._speeds, global_batch=self._fleet.global_batch
        ).least_s

    def _under_caps(self, rng: np.random.Generator, demand: Demand) -> IntArray:
        """Supply what caps permit, and draw what is missing from devices with room."""
        counts_MK = np.zeros(demand.shape, dtype=np.int64)
        while True:
            added_MK, missing = fill_as_far(demand, demand.room_K)
            counts_MK += added_MK
            room_K = demand.room_K - added_MK.sum(axis=0)
            left_MK = demand.remaining_MK - added_MK
            pool_M = left_MK[:, room_K > 0].sum(axis=1)
            if not missing or not pool_M.any():
                return counts_MK
            demand = Demand(
                wanted_M=draw_hypergeometric(rng, pool_M, pool_M, missing),
                remaining_MK=left_MK,
                room_K=room_K,
                holders=demand.holders,
            )
