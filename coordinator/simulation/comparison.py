"""Policies side by side on the same fleets, over several seeds.

Each seed is one trial: a fleet (another one per seed where it is made up), the draws of every
policy, and the lower bound of that fleet. Ratios to UGS are taken within a trial; what is reported
is the mean over trials and its standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordinator.allocation.planner import DEFAULT_REFIT_EVERY
from coordinator.simulation.bound import time_lower_bound_s
from coordinator.simulation.choices import REFERENCE, PolicyChoice
from coordinator.simulation.fleet import SimulatedFleet
from coordinator.simulation.play import EpochPlay, play_epoch

FleetOf = Callable[[int], SimulatedFleet]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochFacts:
    """What one policy made of one epoch.

    ``deviation_*`` are over steps, each counted once; ratios are to UGS in the same trial, with the
    same draws of the fleet. ``participation`` is the mean share of the devices with samples that
    contribute to a step, ``straggler_steps`` the steps that have at least one straggler.
    ``largest_step`` is in samples: above the global batch where FLS or FPLS round up. A ratio is
    None where UGS's value is 0 and this one is not, ``delta_mean`` for policies without delta.
    """

    steps: float
    time_s: float
    time_ratio: float | None
    deviation_mean: float
    deviation_p95: float
    deviation_ratio: float | None
    deviation_p95_ratio: float | None
    straggler_steps: float
    participation: float
    devices_per_step: float
    largest_step: float
    delta_mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy over all seeds: mean, standard deviation (None for one seed), and each seed."""

    mean: EpochFacts
    spread: EpochFacts | None
    by_seed: tuple[EpochFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies over all seeds; the lower bounds belong to the seeds."""

    policies: Mapping[str, PolicyResult]
    seeds: tuple[int, ...]
    lower_bounds_s: tuple[float, ...]

    @property
    def time_lower_bound_s(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.lower_bounds_s))

    @property
    def time_lower_bound_ratio(self) -> float | None:
        """Mean over seeds of the bound's ratio to UGS's time; None where that is 0."""
        times_s = [facts.time_s for facts in self.policies[REFERENCE].by_seed]
        if min(times_s) <= 0:
            return None
        return float(np.mean(np.array(self.lower_bounds_s) / np.array(times_s)))


def compare(
    fleet_of: FleetOf,
    choices: Sequence[PolicyChoice],
    *,
    global_batch: int,
    seeds: Sequence[int],
    refit_every: int = DEFAULT_REFIT_EVERY,
    progress: Callable[[str], None] = lambda _what: None,
) -> Comparison:
    """Play every policy over every seed's fleet; ``progress`` hears what is played next.

    choices: UGS among them, since ratios are to it. Raises ValueError for impossible settings.
    """
    by_name: dict[str, list[EpochFacts]] = {choice.name: [] for choice in choices}
    ordered = sorted(choices, key=lambda choice: choice.name != REFERENCE)
    bounds_s = []
    for seed in seeds:
        fleet = fleet_of(seed)
        reference: EpochFacts | None = None
        for choice in ordered:
            progress(f"seed {seed}: {choice.name}")
            play = play_epoch(
                fleet, choice, global_batch=global_batch, seed=seed, refit_every=refit_every
            )
            facts = epoch_facts(play, fleet, reference)
            reference = reference or facts
            by_name[choice.name].append(facts)
        progress(f"seed {seed}: lower bound")
        bounds_s.append(
            time_lower_bound_s(fleet.held_K, fleet.delays, global_batch, fleet.max_batch_K)
        )
    return Comparison(
        policies={name: _over_seeds(facts) for name, facts in by_name.items()},
        seeds=tuple(seeds),
        lower_bounds_s=tuple(bounds_s),
    )


def epoch_facts(play: EpochPlay, fleet: SimulatedFleet, reference: EpochFacts | None) -> EpochFacts:
    """Sum an epoch up; ``reference`` is UGS's in the same trial, None for UGS itself."""
    time_s = float(play.seconds_T.sum())
    mean, p95 = float(play.deviation_T.mean()), float(np.percentile(play.deviation_T, 95))
    present = int(np.count_nonzero(fleet.held_K))
    deltas = play.delta_T[~np.isnan(play.delta_T)]
    return EpochFacts(
        steps=play.steps,
        time_s=time_s,
        time_ratio=_ratio(time_s, None if reference is None else reference.time_s),
        deviation_mean=mean,
        deviation_p95=p95,
        deviation_ratio=_ratio(mean, None if reference is None else reference.deviation_mean),
        deviation_p95_ratio=_ratio(p95, None if reference is None else reference.deviation_p95),
        straggler_steps=int(play.with_straggler_T.sum()),
        participation=float(play.active_T.mean()) / present,
        devices_per_step=float(play.active_T.mean()),
        largest_step=int(play.samples_T.max()),
        delta_mean=float(deltas.mean()) if deltas.size else None,
    )


def _ratio(value: float, reference: float | None) -> float | None:
    """To the reference; 1 for the reference itself, and where both are 0."""
    if reference is None or value == reference:
        return 1.0
    return value / reference if reference > 0 else None


def _over_seeds(facts: Sequence[EpochFacts]) -> PolicyResult:
    columns = {name: [asdict(each)[name] for each in facts] for name in asdict(facts[0])}
    mean: dict[str, Any] = {name: _mean(values) for name, values in columns.items()}
    spread: dict[str, Any] = {name: _deviation(values) for name, values in columns.items()}
    return PolicyResult(
        mean=EpochFacts(**mean),
        spread=EpochFacts(**spread) if len(facts) > 1 else None,
        by_seed=tuple(facts),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Whole where all are the same whole number, as the number of steps mostly is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return known[0] if len(set(known)) == 1 else float(np.mean(known))


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
