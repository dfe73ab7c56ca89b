"""How long devices take: seconds = fixed + per sample x count, for each device of a fleet.

Pure functions of their arguments and a seed. A step lasts as long as the slowest of its devices:
max over devices with count > 0 of fixed_k + per_sample_k * count.

Shapes: K devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Where no model names them, stragglers are devices that take more than this many times the median.
STRAGGLER_FACTOR = 2.0

_DELAY_STREAM = 11  # of a seed: independent of the population made from the same one


@dataclass(frozen=True, slots=True)
class BaseDelay:
    """What an ordinary device takes: ``fixed_s`` a step, and ``per_sample_s`` for each sample."""

    fixed_s: float = 1.0
    per_sample_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fixed_s", "per_sample_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected finite seconds from 0, found {value}")
        if self.fixed_s + self.per_sample_s == 0:
            raise ValueError("fixed_s, per_sample_s: expected one of them above 0, found 0 and 0")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceDelays:
    """Delays of a fleet, (K,) each. ``named_stragglers_K`` are those that a model made slow."""

    fixed_s_K: FloatArray
    per_sample_s_K: FloatArray
    named_stragglers_K: BoolArray | None = None

    @property
    def devices(self) -> int:
        """K."""
        return int(self.fixed_s_K.size)

    def seconds(self, counts_K: ArrayLike) -> FloatArray:
        """Seconds of each device for its count, (K,), also where the count is 0."""
        seconds_K: FloatArray = self.fixed_s_K + self.per_sample_s_K * np.asarray(counts_K)
        return seconds_K

    def step_s(self, counts_K: ArrayLike) -> float:
        """Seconds that a step with these counts lasts; devices without samples take no part."""
        counts_K = np.asarray(counts_K)
        active = np.flatnonzero(counts_K)
        if active.size == 0:
            return 0.0
        lasts = self.fixed_s_K[active] + self.per_sample_s_K[active] * counts_K[active]
        return float(lasts.max())

    def typical_s(self, held_K: ArrayLike, global_batch: int) -> FloatArray:
        """Seconds of a typical contribution, (K,): what a run's planner is told of the devices.

        held_K: samples of each device. The contribution is its part of a global batch in
        proportion to what it holds, at least one sample.
        """
        held_K = np.asarray(held_K, dtype=np.float64)
        counts_K = np.rint(global_batch * held_K / max(1.0, float(held_K.sum())))
        return self.seconds(np.maximum(counts_K, 1.0))

    def stragglers(self, held_K: ArrayLike, global_batch: int) -> BoolArray:
        """Which devices are stragglers, (K,).

        Those that the model made slow; otherwise those whose typical contribution takes more than
        twice the median of all devices that hold samples.
        """
        if self.named_stragglers_K is not None:
            return self.named_stragglers_K
        held_K = np.asarray(held_K)
        typical_K = self.typical_s(held_K, global_batch)
        present = held_K > 0
        if not present.any():
            return present
        slow_K: BoolArray = present & (
            typical_K > STRAGGLER_FACTOR * float(np.median(typical_K[present]))
        )
        return slow_K


def even_delays(devices: int, base: BaseDelay) -> DeviceDelays:
    """Every device the same."""
    return scaled_delays(np.ones(devices), base)


def straggler_delays(
    devices: int, base: BaseDelay, *, stragglers: int, factor: float, seed: int
) -> DeviceDelays:
    """``stragglers`` randomly chosen devices take ``factor`` times as long, in both parts."""
    if not 0 <= stragglers <= devices:
        raise ValueError(f"stragglers: expected 0 to {devices}, the devices, found {stragglers}")
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"factor: expected a finite factor from 1, found {factor}")
    chosen_K = np.zeros(devices, dtype=np.bool_)
    chosen_K[_generator(seed).permutation(devices)[:stragglers]] = True
    return scaled_delays(np.where(chosen_K, factor, 1.0), base, named_stragglers_K=chosen_K)


def lognormal_delays(devices: int, base: BaseDelay, *, sigma: float, seed: int) -> DeviceDelays:
    """Each device's factor is exp(sigma z), z standard normal: the median device is ``base``."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma: expected a finite number from 0, found {sigma}")
    return scaled_delays(np.exp(sigma * _generator(seed).standard_normal(devices)), base)


def scaled_delays(
    factors_K: ArrayLike, base: BaseDelay, *, named_stragglers_K: BoolArray | None = None
) -> DeviceDelays:
    """Both parts of ``base`` times a factor for each device."""
    factors_K = np.asarray(factors_K, dtype=np.float64)
    return DeviceDelays(base.fixed_s * factors_K, base.per_sample_s * factors_K, named_stragglers_K)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _DELAY_STREAM])))
