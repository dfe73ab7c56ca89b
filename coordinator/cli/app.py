"""Registers the commands; each parses its flags, builds its settings and calls one function."""

from __future__ import annotations

import os

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
from wire.command import build_app, run_command

app = build_app("coordinator", "Train a network together with a fleet of edge agents, over MQTT.")
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
    # For PyTorch's threads, before it is imported: theirs is to wait for work in a busy loop of
    # milliseconds, which takes a processor from whatever else runs here. A step with eight agents
    # on the same host took an eighth longer.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    run_command(app)
