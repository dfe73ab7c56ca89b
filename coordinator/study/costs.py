"""What a plan costs, without training it: steps, modelled time, batch deviation.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation import batch_deviation
from coordinator.simulation.delay_models import DeviceDelays

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of a whole training. Times are modelled and None without devices.

    ``epoch_end_s``: time from the start to each epoch's end. ``deviation_*``: over all steps, the
    L1 distance of a step's class mix from the pooled one. ``straggler_steps``: steps in which a
    slow device takes part.
    """

    steps: int
    epoch_end_s: tuple[float, ...] | None
    deviation_mean: float
    deviation_p95: float
    straggler_steps: int | None


@dataclass
class CostMeter:
    """Adds up the steps of a training. ``delays`` None: there are no devices."""

    pooled_M: IntArray
    delays: DeviceDelays | None = None
    slow_K: NDArray[np.bool_] | None = None
    _deviations: list[float] = field(default_factory=list)
    _epoch_end_s: list[float] = field(default_factory=list)
    _time_s: float = 0.0
    _straggler_steps: int = 0

    def add(self, labels: IntArray, counts_K: IntArray | None) -> None:
        """Take a step: the labels of its samples, and who supplied how many."""
        step_M = np.bincount(labels, minlength=self.pooled_M.size)
        self._deviations.append(batch_deviation(step_M, self.pooled_M))
        if self.delays is not None and counts_K is not None:
            self._time_s += self.delays.step_s(counts_K)
            if self.slow_K is not None:
                self._straggler_steps += bool((counts_K[self.slow_K] > 0).any())

    def end_epoch(self) -> None:
        """An epoch is over."""
        self._epoch_end_s.append(self._time_s)

    def costs(self) -> Costs:
        """Of all steps so far; at least one."""
        deviations = np.array(self._deviations)
        has_devices = self.delays is not None
        return Costs(
            steps=len(deviations),
            epoch_end_s=tuple(self._epoch_end_s) if has_devices else None,
            deviation_mean=float(deviations.mean()),
            deviation_p95=float(np.quantile(deviations, 0.95)),
            straggler_steps=self._straggler_steps if has_devices else None,
        )
