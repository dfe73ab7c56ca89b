"""``coordinator demo``: a fleet on this machine, on real data, with an embedded broker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.demo_options import FleetOptions, MachineOptions, TrainingOptions
from coordinator.cli.grouped import grouped
from wire.command import configure_logging
from wire.errors import ConfigError
from wire.exit_codes import ExitCode


@grouped
def demo(
    fleet: FleetOptions,
    training: TrainingOptions,
    machine: MachineOptions,
    out: Annotated[Path | None, typer.Option(help="Folder for results. (runs/demo-TIME)")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every message.")] = False,
) -> None:
    """Train a fleet of agents on this machine and show what came of it.

    Example: coordinator demo --devices 16 --policy ugs --stragglers 2
    """
    if fleet.stragglers > fleet.devices:
        raise ConfigError(f"expected at most {fleet.devices} (--devices)", source="--stragglers")
    if fleet.test_data is not None and fleet.data is None:
        raise ConfigError("expected --data with it", source="--test-data")
    from coordinator.demo import DemoSettings, run_demo
    from coordinator.plots import write_summary_plot
    from coordinator.progress import build_reporter

    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    settings = DemoSettings(out=folder, **vars(fleet), **vars(training), **vars(machine))
    configure_logging(verbose=verbose, quiet=True)
    with build_reporter() as reporter:
        code, service = run_demo(settings, reporter)
    if service.summary is not None and service.summary.steps:
        write_summary_plot(folder, folder / "summary.png")
        typer.echo(f"results: {folder / 'summary.json'}, {folder / 'summary.png'}")
    if not service.is_complete:
        raise typer.Exit(ExitCode.INTERRUPTED if code is ExitCode.OK else code)
    raise typer.Exit(code)
