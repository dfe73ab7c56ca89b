"""Means over seeds with confidence intervals, and differences between methods seed by seed.

Intervals are Student's: mean +- t(0.975, n - 1) s / sqrt(n) with s the sample standard deviation;
none for a single seed. Differences and ratios are taken for each seed first, since methods share
a seed's deal of the samples, slow devices and initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np
from scipy import stats

from coordinator.allocation import Policy
from coordinator.study.cells import Fleet
from coordinator.study.methods import Method
from coordinator.study.results import CellResult

CONFIDENCE = 0.95
UGS = Method(policy=Policy.UGS)
_FLS = Method(policy=Policy.FLS)
_UNDIVIDED = Method()


class Interval(msgspec.Struct, frozen=True):
    """A mean over ``n`` seeds and half the width of its 95 % interval, None where n is 1."""

    mean: float
    half_width: float | None
    n: int


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one kind of fleet, over all seeds that are finished.

    Accuracies are shares. ``over_fls``, ``over_ugs`` and ``over_undivided`` are differences of
    accuracy, ``time_ratio`` and ``deviation_ratio`` are to UGS; each None without a partner.
    ``curve`` and ``curve_s`` are mean accuracy and mean modelled time at each epoch's end.
    """

    method: Method
    fleet: Fleet | None
    seeds: tuple[int, ...]
    accuracy: Interval
    over_fls: Interval | None
    over_ugs: Interval | None
    over_undivided: Interval | None
    time_s: Interval | None
    time_ratio: Interval | None
    steps: Interval
    straggler_steps: Interval | None
    deviation: Interval
    deviation_p95: Interval
    deviation_ratio: Interval | None
    curve: tuple[float, ...]
    curve_s: tuple[float, ...] | None


def interval(values: Sequence[float]) -> Interval:
    """Student's 95 % interval of the mean; at least one value."""
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, n)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(mean, t * float(np.std(values, ddof=1)) / math.sqrt(n), n)


BySeed = Mapping[int, CellResult]
ByMethod = Mapping[tuple[Method, Fleet | None], BySeed]


def summarise(results: Iterable[CellResult]) -> list[Group]:
    """Group by method and fleet, in the order of their first results."""
    grouped: dict[tuple[Method, Fleet | None], dict[int, CellResult]] = {}
    for result in results:
        cell = result.cell
        grouped.setdefault((cell.method, cell.fleet), {})[cell.seed] = result
    return [_group(method, fleet, grouped) for method, fleet in grouped]


def _group(method: Method, fleet: Fleet | None, grouped: ByMethod) -> Group:
    own = grouped[method, fleet]

    def against(
        other: Method, of: Callable[[CellResult, CellResult], float | None]
    ) -> Interval | None:
        reference = grouped.get((other, None if other.policy is None else fleet))
        return None if other == method or reference is None else _paired(own, reference, of)

    def over(other: Method) -> Interval | None:
        return against(other, lambda a, b: a.accuracy - b.accuracy)

    return Group(
        method=method,
        fleet=fleet,
        seeds=tuple(own),
        accuracy=_over_seeds(own, lambda r: r.accuracy),
        over_fls=over(_FLS),
        over_ugs=over(UGS),
        over_undivided=over(_UNDIVIDED),
        time_s=_known_over_seeds(own, lambda r: r.time_s),
        time_ratio=against(UGS, lambda a, b: _ratio(a.time_s, b.time_s)),
        steps=_over_seeds(own, lambda r: r.steps),
        straggler_steps=_known_over_seeds(own, lambda r: r.straggler_steps),
        deviation=_over_seeds(own, lambda r: r.deviation_mean),
        deviation_p95=_over_seeds(own, lambda r: r.deviation_p95),
        deviation_ratio=against(UGS, lambda a, b: _ratio(a.deviation_mean, b.deviation_mean)),
        curve=_mean_of(r.test_accuracies for r in own.values()),
        curve_s=None if fleet is None else _mean_of(r.epoch_end_s or () for r in own.values()),
    )


def _paired(
    own: BySeed, reference: BySeed, of: Callable[[CellResult, CellResult], float | None]
) -> Interval | None:
    """Over the seeds that both have; None without any."""
    values = [of(result, reference[seed]) for seed, result in own.items() if seed in reference]
    known = [value for value in values if value is not None]
    return interval(known) if known else None


def _over_seeds(own: BySeed, of: Callable[[CellResult], float]) -> Interval:
    return interval([of(result) for result in own.values()])


def _known_over_seeds(own: BySeed, of: Callable[[CellResult], float | None]) -> Interval | None:
    known = [value for value in map(of, own.values()) if value is not None]
    return interval(known) if known else None


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _mean_of(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(mean) for mean in np.mean(list(rows), axis=0))


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The extreme of one comparison: which method, on which fleet, and by how much."""

    method: Method
    fleet: Fleet
    value: Interval


def largest_gain_over_fls(groups: Iterable[Group]) -> Finding | None:
    """Most accuracy above FLS on the same fleets: the paper's first claim."""
    return _extreme(groups, lambda group: group.over_fls, max)


def most_time_saved(groups: Iterable[Group]) -> Finding | None:
    """Smallest modelled time as a share of UGS's: the paper's second claim."""
    seeing = [group for group in groups if group.method.sees_delays]
    return _extreme(seeing, lambda group: group.time_ratio, min)


def _extreme(
    groups: Iterable[Group],
    of: Callable[[Group], Interval | None],
    choose: Callable[..., Finding],
) -> Finding | None:
    findings = [
        Finding(method=group.method, fleet=group.fleet, value=value)
        for group in groups
        if group.fleet is not None and (value := of(group)) is not None
    ]
    return choose(findings, key=lambda finding: finding.value.mean) if findings else None
