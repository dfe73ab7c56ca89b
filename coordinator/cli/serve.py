"""``coordinator serve``: the coordinator between runs, for rollouts."""

from __future__ import annotations

from typing import Annotated

import typer

from wire.command import configure_logging, stop_on_signals
from wire.settings import load_settings


def serve(
    config: Annotated[str, typer.Option("-c", "--config", help="A run's YAML file: fleet, mqtt.")],
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every message.")] = False,
) -> None:
    """Serve a fleet without training: rollouts go on, and operators' commands are answered.

    `train` does the same during a run. A fleet has one coordinator at a time: stop this one
    before `train`. Of two, the one that was started last stays; the other ends with 76.

    Example: coordinator serve -c configs/lab.yaml
    """
    from coordinator.config import RunSettings
    from coordinator.fleet_service import FleetService

    settings = load_settings(config, RunSettings)
    configure_logging(verbose=verbose)
    service = FleetService(settings, source=config)
    stop_on_signals(service.stop)
    raise typer.Exit(service.run())
