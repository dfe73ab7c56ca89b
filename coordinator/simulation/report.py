"""A comparison as a table, a JSON document and CSV rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from coordinator.simulation.choices import REFERENCE
from coordinator.simulation.comparison import Comparison, PolicyResult
from coordinator.simulation.fleet import SimulatedFleet
from coordinator.tables import NONE, format_seconds, format_share, new_table, printable

# A device list beyond this would drown everything else in the document.
MOST_LISTED_DEVICES = 1000
MOST_SHOWN_DEVICES = 20


@dataclass(frozen=True, slots=True)
class Simulation:
    """All that a report says: the result, the first seed's fleet, and what was asked for."""

    comparison: Comparison
    fleet: SimulatedFleet
    global_batch: int
    refit_every: int
    settings: dict[str, Any]


def build_document(simulation: Simulation) -> dict[str, Any]:
    """The result as JSON values; docs/simulate.md names every key.

    A policy's own keys are means over seeds, ``spread`` their standard deviations (null for one
    seed), ``by_seed`` each seed's. ``fleet`` and ``devices`` are those of the first seed.
    """
    comparison = simulation.comparison
    document: dict[str, Any] = {
        "policies": {name: _policy(result) for name, result in comparison.policies.items()},
        "time_lower_bound_s": comparison.time_lower_bound_s,
        "time_lower_bound_ratio": comparison.time_lower_bound_ratio,
        "time_lower_bounds_s": list(comparison.lower_bounds_s),
        "seeds": list(comparison.seeds),
        "settings": simulation.settings,
        "fleet": _fleet(simulation),
    }
    if simulation.fleet.devices <= MOST_LISTED_DEVICES:
        document["devices"] = _devices(simulation)
    return document


def _policy(result: PolicyResult) -> dict[str, Any]:
    return {
        **asdict(result.mean),
        "spread": None if result.spread is None else asdict(result.spread),
        "by_seed": [asdict(facts) for facts in result.by_seed],
    }


def _fleet(simulation: Simulation) -> dict[str, Any]:
    fleet = simulation.fleet
    counts_KM = fleet.label_counts_KM
    return {
        "devices": fleet.devices,
        "samples": int(counts_KM.sum()),
        "classes": counts_KM.shape[1],
        "class_counts": counts_KM.sum(axis=0).tolist(),
        "mean_classes_per_device": float((counts_KM > 0).sum(axis=1).mean()),
        "stragglers": int(fleet.delays.stragglers(fleet.held_K, simulation.global_batch).sum()),
    }


def _devices(simulation: Simulation) -> list[dict[str, Any]]:
    fleet = simulation.fleet
    held_K = fleet.held_K
    typical_s_K = fleet.delays.typical_s(held_K, simulation.global_batch)
    stragglers_K = fleet.delays.stragglers(held_K, simulation.global_batch)
    return [
        {
            "device": fleet.name_of(k),
            "samples": int(held_K[k]),
            "fixed_s": float(fleet.delays.fixed_s_K[k]),
            "per_sample_s": float(fleet.delays.per_sample_s_K[k]),
            "typical_s": float(typical_s_K[k]),
            "straggler": bool(stragglers_K[k]),
        }
        for k in range(fleet.devices)
    ]


def build_csv(comparison: Comparison) -> str:
    """One row per policy and seed, with a header; ratios to UGS of the same seed."""
    text = io.StringIO()
    names = list(asdict(comparison.policies[REFERENCE].mean))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["policy", "seed", *names, "time_lower_bound_s"])
    for policy, result in comparison.policies.items():
        rows = zip(comparison.seeds, result.by_seed, comparison.lower_bounds_s, strict=True)
        for seed, facts, bound_s in rows:
            writer.writerow([policy, seed, *asdict(facts).values(), bound_s])
    return text.getvalue()


def policy_table(comparison: Comparison) -> Table:
    """One row per policy, the lower bound below; spread is the standard deviation over seeds.

    ``devices`` is the mean share that takes part in a step, ``slow steps`` those with a straggler.
    """
    table = new_table(
        ["policy"],
        ["steps", "time", "x ugs", "deviation", "95th", "x ugs", "devices", "slow steps"],
    )
    for name, result in comparison.policies.items():
        table.add_row(Text(name), *_cells(result))
    ratio = comparison.time_lower_bound_ratio
    table.add_row(
        Text("bound"),
        "",
        format_seconds(comparison.time_lower_bound_s),
        NONE if ratio is None else f"{ratio:.2f}",
    )
    return table


def _cells(result: PolicyResult) -> list[str]:
    mean, spread = result.mean, result.spread
    return [
        f"{mean.steps:,.0f}",
        format_seconds(mean.time_s),
        _with_spread(mean.time_ratio, None if spread is None else spread.time_ratio),
        f"{mean.deviation_mean:.3f}",
        f"{mean.deviation_p95:.3f}",
        _with_spread(mean.deviation_ratio, None if spread is None else spread.deviation_ratio),
        format_share(mean.participation),
        f"{mean.straggler_steps:,.0f}",
    ]


def _with_spread(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.2f}" if not spread else f"{mean:.2f} ± {spread:.2f}"


def device_table(simulation: Simulation) -> Table:
    """The slowest devices and what is believed of them."""
    devices = sorted(_devices(simulation), key=lambda device: -float(device["typical_s"]))
    table = new_table(["device"], ["samples", "fixed", "a sample", "contribution"], [""])
    for device in devices[:MOST_SHOWN_DEVICES]:
        table.add_row(
            Text(printable(device["device"])),
            f"{device['samples']:,}",
            format_seconds(device["fixed_s"]),
            format_seconds(device["per_sample_s"]),
            format_seconds(device["typical_s"]),
            Text("straggler" if device["straggler"] else ""),
        )
    rest = len(devices) - MOST_SHOWN_DEVICES
    if rest > 0:
        table.caption = f"and {rest:,} faster ones"
        table.caption_justify = "left"
    return table


def describe(simulation: Simulation) -> Sequence[str]:
    """What was simulated, in two or three lines."""
    facts = _fleet(simulation)
    seeds = simulation.comparison.seeds
    lines = [
        f"{facts['devices']:,} devices, {facts['samples']:,} samples of {facts['classes']} "
        f"classes, {facts['mean_classes_per_device']:.3g} classes a device; "
        f"{facts['stragglers']:,} straggler{'' if facts['stragglers'] == 1 else 's'}",
        f"global batch {simulation.global_batch:,}; "
        + (f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± sd of {len(seeds)} seeds"),
    ]
    larger = oversized(simulation)
    if larger:
        lines.append(
            f"steps larger than the global batch, which the lower bound does not cover: {larger}"
        )
    return lines


def oversized(simulation: Simulation) -> str:
    """Policies that rounded up to steps larger than the global batch, with the largest."""
    found = {
        name: int(max(facts.largest_step for facts in result.by_seed))
        for name, result in simulation.comparison.policies.items()
    }
    return ", ".join(f"{n} ({s:,})" for n, s in found.items() if s > simulation.global_batch)
