"""Registers the commands; each parses its flags, builds its settings and calls one function."""

from __future__ import annotations

from typing import Annotated

import typer

from coordinator.cli import (
    broker_config,
    demo,
    devices,
    doctor,
    export,
    keys,
    rollout,
    serve,
    simulate,
    status,
    study,
    train,
)
from wire import __version__
from wire.command import run_command

app = typer.Typer(
    name="coordinator",
    help="Train a network together with a fleet of edge agents, over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"coordinator {__version__}")
        raise typer.Exit


app.command()(demo.demo)
app.command()(train.train)
app.command()(serve.serve)
app.add_typer(rollout.rollout)
app.command()(devices.devices)
app.command()(status.status)
app.command()(simulate.simulate)
app.command()(export.export)
app.add_typer(keys.app, name="keys")
app.command("broker-config")(broker_config.broker_config)
app.command()(doctor.doctor)
app.command()(study.study)


def main() -> None:
    """Run the command; errors end in one line on stderr and a code of wire.exit_codes."""
    run_command(app)
