"""LDS over a range of deltas and budgets: what a person chooses between. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.allocation import Policy
from coordinator.simulation.choices import REFERENCE, PolicyChoice
from coordinator.simulation.comparison import Comparison, FleetOf, compare

DELTAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
BUDGETS = (0.02, 0.05, 0.10, 0.20, 0.50)
MOST_SEEDS = 3


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One setting: batch deviation and time, both as ratios to UGS."""

    setting: str
    deviation_ratio: float
    time_ratio: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """UGS and LDS by delta, LDS by budget, and the lower bound as a ratio to UGS's time."""

    deltas: tuple[SweepPoint, ...]
    budgets: tuple[SweepPoint, ...]
    bound_ratio: float | None
    seeds: int


def run_sweep(
    fleet_of: FleetOf,
    *,
    global_batch: int,
    seeds: Sequence[int],
    refit_every: int,
    progress: Callable[[str], None] = lambda _what: None,
) -> Sweep:
    """Play LDS at every setting over the first seeds."""
    deltas = {f"{delta:g}": PolicyChoice(f"lds@{delta:g}", Policy.LDS, delta) for delta in DELTAS}
    budgets = {
        f"{budget:.0%}": PolicyChoice(f"lds@{budget:.0%}", Policy.LDS, None, budget)
        for budget in BUDGETS
    }
    comparison = compare(
        fleet_of,
        [PolicyChoice(REFERENCE, Policy.UGS), *deltas.values(), *budgets.values()],
        global_batch=global_batch,
        seeds=seeds[:MOST_SEEDS],
        refit_every=refit_every,
        progress=progress,
    )
    start = SweepPoint("0", 1.0, 1.0)  # delta 0 draws in UGS's proportions
    return Sweep(
        (start, *_points(comparison, deltas)),
        tuple(_points(comparison, budgets)),
        comparison.time_lower_bound_ratio,
        len(comparison.seeds),
    )


def _points(comparison: Comparison, choices: dict[str, PolicyChoice]) -> list[SweepPoint]:
    points = []
    for setting, choice in choices.items():
        mean = comparison.policies[choice.name].mean
        if mean.deviation_ratio is not None and mean.time_ratio is not None:
            points.append(SweepPoint(setting, mean.deviation_ratio, mean.time_ratio))
    return points
