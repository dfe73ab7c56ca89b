"""Delays as measured: seconds per phase of a step, split into a fixed part and a part per sample.

A phase of a device takes about ``fixed_s + per_sample_s * count`` seconds. The estimate is a robust
line through the last observations, weighted by age: slopes and levels are weighted medians
(Theil-Sen), so a single outlier moves nothing, and since the weights halve every 6.6 observations a
lasting jump holds the median after 7 observations. Large jumps are noticed after 3 to 5
(``speed_change``); then all that was observed at the old speed is forgotten. No clock is read here;
callers pass seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.speed_change import LEAST_ALLOWANCE, SpeedWatch

FloatArray = NDArray[np.float64]

# Weight of an observation relative to the next one.
FORGETTING = 0.9
# The weight of what lies further back is 3 % of the whole; bounds memory and work.
WINDOW = 32
# Observations between two fits of what new ones are held against; a fit at each would cost as much
# as the message that brought it.
REFRESH_EVERY = 8
FIRST_EXPECTATION_AFTER = 4
_VARIES_BY = 2.0  # times its median log residual is what a device may differ without being suspect


class DelayEstimator:
    """Delay of one phase of one device.

    While all counts are the same the parts cannot be told apart; then all of it counts as fixed.
    Both parts are never negative. Without observations both are 0.
    """

    def __init__(self) -> None:
        self._observations: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._n_observations = 0
        self._changes = 0
        self._line: tuple[float, float] | None = None
        self._expected: _Expected | None = None
        self._watch = SpeedWatch()

    def observe(self, count: int, seconds: float) -> bool:
        """Take one measurement of ``count`` samples; tell whether the speed has changed for good.

        If it has, what was measured before the change is forgotten. ValueError where it cannot be
        a measurement.
        """
        if count < 1:
            raise ValueError(f"count: expected at least 1 sample, received {count}")
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"seconds: expected finite seconds from 0, received {seconds}")
        if self._expected is not None:
            self._watch = self._expected.compare(self._watch, int(count), float(seconds))
        self._observations.append((int(count), float(seconds)))
        self._n_observations += 1
        self._line = None
        has_changed = self._watch.changed_since > 0
        if has_changed:
            self._forget_all_but(self._watch.changed_since)
        if has_changed or self._is_refresh_due():
            self._expected = _expected_of(self._observations, *self._fitted())
        return has_changed

    @property
    def n_observations(self) -> int:
        """Measurements taken so far, forgotten ones too."""
        return self._n_observations

    @property
    def changes(self) -> int:
        """How often the speed has changed for good."""
        return self._changes

    @property
    def fixed_s(self) -> float:
        """Seconds that a step takes however few its samples."""
        return self._fitted()[0]

    @property
    def per_sample_s(self) -> float:
        """Seconds that each sample adds."""
        return self._fitted()[1]

    def estimate_s(self, count: int) -> float:
        """Seconds expected for ``count`` samples."""
        fixed_s, per_sample_s = self._fitted()
        return fixed_s + per_sample_s * count

    def state(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "n_observations": self._n_observations,
            "observations": [list(observation) for observation in self._observations],
            "changes": self._changes,
            "expected": None if self._expected is None else list(self._expected),
            "watch": self._watch.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DelayEstimator:
        """An estimator that continues where ``state`` was taken."""
        estimator = cls()
        observations = [(int(count), float(seconds)) for count, seconds in state["observations"]]
        estimator._observations.extend(observations)
        estimator._n_observations = int(state["n_observations"])
        if "watch" in state:  # checkpoints of earlier versions do without
            estimator._changes = int(state["changes"])
            estimator._watch = SpeedWatch.from_state(state["watch"])
            if state["expected"] is not None:
                estimator._expected = _Expected(*state["expected"])
        return estimator

    def _forget_all_but(self, last: int) -> None:
        self._observations = deque(list(self._observations)[-last:], maxlen=WINDOW)
        self._changes += 1
        self._watch = SpeedWatch()

    def _is_refresh_due(self) -> bool:
        """Not while a change is suspected: it would become what is expected."""
        taken = self._n_observations
        is_turn = taken == FIRST_EXPECTATION_AFTER or taken % REFRESH_EVERY == 0
        return is_turn and not self._watch.is_suspicious

    def _fitted(self) -> tuple[float, float]:
        """(fixed_s, per_sample_s), fitted when first asked for after an observation."""
        if self._line is None:
            self._line = _fit_line(self._observations)
        return self._line


class _Expected(NamedTuple):
    """The line that new observations are held against, the counts it was made from, its spread."""

    fixed_s: float
    per_sample_s: float
    least_count: int
    most_count: int
    allowance: float

    def compare(self, watch: SpeedWatch, count: int, seconds: float) -> SpeedWatch:
        """Add an observation to the evidence.

        Beyond the counts seen, a line whose parts could not be told apart may lie anywhere between
        itself and proportional growth; only what is outside of that counts.
        """
        seen = min(max(count, self.least_count), self.most_count)
        line_s = self.fixed_s + self.per_sample_s * count
        in_proportion_s = (self.fixed_s + self.per_sample_s * seen) * count / seen
        tiny_s = 1e-9
        low_s = max(min(line_s, in_proportion_s), tiny_s)
        high_s = max(line_s, in_proportion_s, tiny_s)
        seconds = max(seconds, tiny_s)
        return watch.observe(math.log(seconds / high_s), math.log(seconds / low_s), self.allowance)


class FleetDelays:
    """Delays of all devices, by id: a forward phase (go to activations) and a backward phase
    (cut gradient to parameter gradients) each. A frozen client segment has no backward phase.
    """

    def __init__(self) -> None:
        self._forward: dict[str, DelayEstimator] = {}
        self._backward: dict[str, DelayEstimator] = {}

    def observe_forward(self, device_id: str, count: int, seconds: float) -> bool:
        """Take the seconds from the go to the device's activations; tell of a lasting change."""
        return self._forward.setdefault(device_id, DelayEstimator()).observe(count, seconds)

    def observe_backward(self, device_id: str, count: int, seconds: float) -> bool:
        """Take the seconds from the cut gradient to the device's parameter gradients."""
        return self._backward.setdefault(device_id, DelayEstimator()).observe(count, seconds)

    def forward(self, device_id: str) -> DelayEstimator | None:
        """What is known of the device's forward phase."""
        return self._forward.get(device_id)

    def backward(self, device_id: str) -> DelayEstimator | None:
        """What is known of the device's backward phase."""
        return self._backward.get(device_id)

    def forget(self, device_id: str) -> None:
        """Drop what is known of a device, as after its hardware was exchanged."""
        self._forward.pop(device_id, None)
        self._backward.pop(device_id, None)

    def delays_s(self, ids: Sequence[str], counts: Sequence[int] | NDArray[np.int64]) -> FloatArray:
        """Seconds of both phases together for each device at its count, (K,).

        A device that has not been measured in a phase gets the median of the fixed and of the
        per-sample parts of those that have; without any measurement a phase takes 0 s.
        """
        if len(ids) != len(counts):
            raise ValueError(f"counts: expected one per device ({len(ids)}), got {len(counts)}")
        counts_K = np.asarray(counts, dtype=np.float64)
        return _phase_s(self._forward, ids, counts_K) + _phase_s(self._backward, ids, counts_K)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {"forward": _states(self._forward), "backward": _states(self._backward)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FleetDelays:
        """Delays that continue where ``state`` was taken."""
        fleet = cls()
        fleet._forward = _estimators(state["forward"])
        fleet._backward = _estimators(state["backward"])
        return fleet


def _fit_line(observations: Collection[tuple[int, float]]) -> tuple[float, float]:
    """Weighted Theil-Sen line, (fixed_s, per_sample_s), both at least 0.

    Source: Sen, J. Amer. Statist. Assoc. 63 (1968), 1379-1389; pairs weighted as in Jaeckel,
    Ann. Math. Statist. 43 (1972), by the distance of their counts, and here by their age too.
    """
    if not observations:
        return 0.0, 0.0
    counts_N, seconds_N = np.array(list(observations), dtype=np.float64).T
    weights_N = FORGETTING ** np.arange(len(observations) - 1, -1, -1.0)
    slope = max(0.0, _median_slope(counts_N, seconds_N, weights_N))
    level = _weighted_median(seconds_N - slope * counts_N, weights_N)
    if level >= 0:
        return level, slope
    # All time is the samples': the best line through the origin.
    return 0.0, _weighted_median(seconds_N / counts_N, weights_N * counts_N)


def _expected_of(
    observations: Collection[tuple[int, float]], fixed_s: float, per_sample_s: float
) -> _Expected:
    """The fitted line as what is expected, with the allowance that its residuals ask for."""
    counts_N, seconds_N = np.array(list(observations), dtype=np.float64).T
    line_N = np.maximum(fixed_s + per_sample_s * counts_N, 1e-9)
    spread = float(np.median(np.abs(np.log(np.maximum(seconds_N, 1e-9) / line_N))))
    return _Expected(
        fixed_s,
        per_sample_s,
        int(counts_N.min()),
        int(counts_N.max()),
        max(LEAST_ALLOWANCE, _VARIES_BY * spread),
    )


def _median_slope(counts_N: FloatArray, seconds_N: FloatArray, weights_N: FloatArray) -> float:
    """Median of the slopes of all pairs with different counts; 0 where there is none."""
    first, second = np.triu_indices(counts_N.size, k=1)
    apart_P = counts_N[second] - counts_N[first]
    told = apart_P != 0
    if not told.any():
        return 0.0
    first, second, apart_P = first[told], second[told], apart_P[told]
    slopes_P = (seconds_N[second] - seconds_N[first]) / apart_P
    return _weighted_median(slopes_P, weights_N[first] * weights_N[second] * np.abs(apart_P))


def _weighted_median(values: FloatArray, weights: FloatArray) -> float:
    """The value with at most half of the weight on either side; the middle of two if both are."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order])
    half = cumulated[-1] / 2
    lower = int(np.searchsorted(cumulated, half * (1 - 1e-12), side="left"))
    upper = int(np.searchsorted(cumulated, half * (1 + 1e-12), side="right"))
    low, high = values[order[lower]], values[order[min(upper, values.size - 1)]]
    return float((low + high) / 2)


def _phase_s(
    estimators: Mapping[str, DelayEstimator], ids: Sequence[str], counts_K: FloatArray
) -> FloatArray:
    if not estimators:
        return np.zeros(counts_K.shape)
    known = {device_id: (e.fixed_s, e.per_sample_s) for device_id, e in estimators.items()}
    median = tuple(np.median(list(known.values()), axis=0))
    lines = [known.get(device_id, median) for device_id in ids]
    lines_K2 = np.array(lines, dtype=np.float64).reshape(-1, 2)
    phase_K: FloatArray = lines_K2[:, 0] + lines_K2[:, 1] * counts_K
    return phase_K


def _states(estimators: Mapping[str, DelayEstimator]) -> dict[str, Any]:
    return {device_id: estimator.state() for device_id, estimator in estimators.items()}


def _estimators(states: Mapping[str, Any]) -> dict[str, DelayEstimator]:
    return {device_id: DelayEstimator.from_state(state) for device_id, state in states.items()}
