"""``coordinator demo``: a fleet on this machine, on real data, with an embedded broker."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from coordinator.allocation import Policy
from wire.command import configure_logging
from wire.errors import ConfigError
from wire.exit_codes import ExitCode
from wire.messages import Precision


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Own samples, FILE.npz with x and y, instead of digits.")
    ] = None,
    test_data: Annotated[
        Path | None, typer.Option(help="Own test samples; else a fifth of --data is held out.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Agents to start.")] = 8,
    classes_per_device: Annotated[
        int | None, typer.Option(min=1, help="Classes that each device holds.  [default: 2]")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="mlp, cnn2d, cnn1d, resnet18 or module:function.")
    ] = None,
    cut: Annotated[str | None, typer.Option(help="Cut layer, by name.")] = None,
    policy: Annotated[Policy, typer.Option(help="How samples are allocated.")] = Policy.LDS,
    delta: Annotated[
        float | None, typer.Option(min=0, help="LDS: weight of delays, not a deviation budget.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Global batch, in samples.")] = 64,
    precision: Annotated[
        Precision, typer.Option(help="How activations and gradients travel.")
    ] = Precision.FP16,
    stragglers: Annotated[int, typer.Option(min=0, help="Devices with an added delay.")] = 1,
    straggler_delay_s: Annotated[
        float, typer.Option(min=0, help="Seconds added to each of their answers.")
    ] = 0.25,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    broker: Annotated[str, typer.Option(help="auto, mosquitto, iotcore or HOST:PORT.")] = "auto",
    agent_python: Annotated[
        str, typer.Option(help="Python interpreter that runs the agents.")
    ] = sys.executable,
    agent_backward: Annotated[
        str | None,
        typer.Option(help="What trains on the agents: onnxruntime, torch or auto.  [by network]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.  [default: runs/demo-TIME]")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every message.")] = False,
) -> None:
    """Train a fleet of agents on this machine and show what came of it.

    Example: coordinator demo --devices 16 --policy ugs --stragglers 2
    """
    if stragglers > devices:
        raise ConfigError(f"expected at most {devices} (--devices)", source="--stragglers")
    if test_data is not None and data is None:
        raise ConfigError("expected --data with it", source="--test-data")
    from coordinator.demo import DemoSettings, run_demo
    from coordinator.plots import write_summary_plot
    from coordinator.progress import build_reporter

    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    settings = DemoSettings(
        out=folder,
        data=data,
        test_data=test_data,
        devices=devices,
        classes_per_device=classes_per_device,
        network=network,
        cut=cut,
        policy=policy,
        delta=delta,
        epochs=epochs,
        batch=batch,
        precision=precision,
        stragglers=stragglers,
        straggler_delay_s=straggler_delay_s,
        lr=lr,
        seed=seed,
        broker=broker,
        agent_python=agent_python,
        agent_backward=agent_backward,
    )
    configure_logging(verbose=verbose, quiet=True)
    with build_reporter() as reporter:
        code, service = run_demo(settings, reporter)
    if service.summary is not None and service.summary.steps:
        write_summary_plot(folder, folder / "summary.png")
        typer.echo(f"results: {folder / 'summary.json'}, {folder / 'summary.png'}")
    if not service.is_complete:
        raise typer.Exit(ExitCode.INTERRUPTED if code is ExitCode.OK else code)
    raise typer.Exit(code)
