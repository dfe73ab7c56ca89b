"""``coordinator simulate``: what policies would make of a fleet, without a network."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from coordinator.cli import simulate_options as opt
from wire.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.simulation.choices import PolicyChoice
    from coordinator.simulation.options import FleetOptions, FleetSource
    from coordinator.simulation.report import Simulation

T = TypeVar("T")


def simulate(
    label_counts: opt.LabelCounts = None,
    population_from: opt.PopulationFrom = None,
    devices: opt.Devices = None,
    samples: opt.Samples = None,
    classes: opt.Classes = None,
    classes_per_device: opt.ClassesPerDevice = None,
    alpha: opt.Alpha = None,
    iid: opt.Iid = False,
    delays: opt.Delays = None,
    delays_from: opt.DelaysFrom = None,
    stragglers: opt.Stragglers = None,
    factor: opt.Factor = None,
    lognormal: opt.Lognormal = None,
    fixed_s: opt.FixedS = None,
    per_sample_s: opt.PerSampleS = None,
    policies: opt.Policies = None,
    global_batch: opt.GlobalBatch = 128,
    delta: opt.Delta = None,
    deviation_budget: opt.DeviationBudget = None,
    max_batch: opt.MaxBatch = None,
    refit_every: opt.RefitEvery = 10,
    seeds: opt.Seeds = opt.DEFAULT_SEEDS,
    seed: opt.FirstSeed = 0,
    fleet_seed: opt.FleetSeed = None,
    as_json: opt.AsJson = False,
    csv: opt.CsvFile = None,
    plot: opt.PlotFile = None,
) -> None:
    """Play one epoch of a fleet without a network and compare policies.

    A step lasts as long as its slowest device takes: fixed + per sample x count seconds. Without
    options: 128 devices with two of ten classes each, every tenth of them ten times as slow.

    Example: coordinator simulate --devices 64 --lognormal 0.8 -p ugs,lds,lds@2 --seeds 5
    """
    given = locals()  # what these options say belongs to three structures, by the same names
    from coordinator.simulation.options import parse_seeds

    _check(given)
    _check_writable(csv, "--csv")
    _check_writable(plot, "--plot")
    choices = _parse_choices(policies or [], delta, deviation_budget)
    numbers = parse_seeds(seeds, seed)
    simulation = _run(given, choices, numbers, plot)
    if csv is not None:
        from coordinator.simulation.report import build_csv

        _write(csv, build_csv(simulation.comparison), "--csv")
    if as_json:
        from coordinator.simulation.report import build_document

        typer.echo(json.dumps(build_document(simulation), allow_nan=False))
    else:
        _print(simulation)


def _check(given: dict[str, Any]) -> None:
    for name, least in (("global_batch", 1), ("refit_every", 1), ("seed", 0), ("fleet_seed", 0)):
        value = given[name]
        if value is not None and value < least:
            raise ConfigError(
                f"expected a whole number from {least}, found {value}", field=_option(name)
            )
    if given["delta"] is not None and given["deviation_budget"] is not None:
        raise ConfigError(
            "expected --delta or --deviation-budget, found both", field="--deviation-budget"
        )
    for name in ("delta", "deviation_budget"):
        value = given[name]
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(
                f"expected a finite number from 0, found {value}", field=_option(name)
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_choices(
    policies: Sequence[str], delta: float | None, deviation_budget: float | None
) -> tuple[PolicyChoice, ...]:
    from coordinator.simulation.choices import parse_choices

    names = [name.strip() for entry in policies for name in entry.split(",")]
    try:
        return parse_choices(names, delta=delta, deviation_budget=deviation_budget)
    except ValueError as exc:
        raise ConfigError(str(exc), field="--policies") from exc


def _run(
    given: dict[str, Any],
    choices: Sequence[PolicyChoice],
    seeds: Sequence[int],
    plot: Path | None,
) -> Simulation:
    from coordinator.cli.recorded_run import read_recorded_run
    from coordinator.simulation.comparison import compare
    from coordinator.simulation.options import open_fleet
    from coordinator.simulation.report import Simulation

    source = open_fleet(_fleet_options(given), read_recorded_run)
    rules = {"global_batch": given["global_batch"], "refit_every": given["refit_every"]}
    with _progress() as say:
        comparison = compare(source.fleet_of, choices, seeds=seeds, progress=say, **rules)
        simulation = Simulation(
            comparison, source.fleet_of(seeds[0]), settings=_settings(given, choices), **rules
        )
        if plot is not None:
            _plot(simulation, source, choices, plot, say)
    return simulation


def _plot(
    simulation: Simulation,
    source: FleetSource,
    choices: Sequence[PolicyChoice],
    path: Path,
    say: Callable[[str], None],
) -> None:
    from coordinator.simulation.play import play_epoch
    from coordinator.simulation.plot import Picture, write_plot
    from coordinator.simulation.sweep import run_sweep

    seeds = simulation.comparison.seeds
    rules = {"global_batch": simulation.global_batch, "refit_every": simulation.refit_every}
    plays = {
        choice.name: play_epoch(simulation.fleet, choice, seed=seeds[0], keep_counts=True, **rules)
        for choice in choices
    }
    sweep = run_sweep(source.fleet_of, seeds=seeds, progress=say, **rules)
    say("drawing")
    write_plot(
        Picture(simulation.comparison, sweep, simulation.fleet, plays, simulation.global_batch),
        path,
    )


def _fleet_options(given: dict[str, Any]) -> FleetOptions:
    from coordinator.simulation.options import DelayOptions, FleetOptions, PopulationOptions

    return FleetOptions(
        population=_pick(PopulationOptions, given),
        delays=_pick(DelayOptions, given),
        max_batch=given["max_batch"],
        fleet_seed=given["fleet_seed"],
    )


def _pick(structure: type[T], given: dict[str, Any]) -> T:
    names = {each.name for each in fields(structure)}  # type: ignore[arg-type]
    return structure(**{name: value for name, value in given.items() if name in names})


def _settings(given: dict[str, Any], choices: Sequence[PolicyChoice]) -> dict[str, Any]:
    """What was asked for, as the options are called; null where a default holds."""
    output = {"as_json", "csv", "plot", "policies"}
    asked = {name: value for name, value in given.items() if name not in output}
    return {**asked, "policies": [asdict(choice) for choice in choices]}


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is played now, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield status.update


def _print(simulation: Simulation) -> None:
    from coordinator.simulation.report import describe, device_table, policy_table
    from coordinator.tables import build_console

    console = build_console(sys.stdout)
    for line in describe(simulation):
        console.print(line, markup=False)
    console.print()
    console.print(policy_table(simulation.comparison))
    if simulation.fleet.names is not None:
        console.print()
        console.print(device_table(simulation))


def _check_writable(path: Path | None, option: str) -> None:
    """Before hours are spent: whether the result has a place."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(
            f"expected a file in a folder that exists, found {str(path)!r}", field=option
        )


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text)
    except OSError as exc:
        raise ConfigError(
            f"expected a file that can be written ({exc.strerror}), found {str(path)!r}",
            field=option,
        ) from exc
