"""The options of ``coordinator demo``, by the names of ``DemoSettings``' fields."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from coordinator.allocation import Policy
from wire.messages import Precision

# One word for the size of a step, wherever it is asked for.
BATCH_NAMES = ("-B", "--batch", "--global-batch")


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Whom to start, and what they hold."""

    data: Annotated[
        Path | None, typer.Option(help="Own samples, FILE.npz with x and y, instead of digits.")
    ] = None
    test_data: Annotated[
        Path | None, typer.Option(help="Own test samples; else a fifth of --data is held out.")
    ] = None
    devices: Annotated[int, typer.Option(min=1, help="Agents to start.")] = 8
    classes_per_device: Annotated[
        int | None, typer.Option(min=1, help="Classes that each device holds. (2)")
    ] = None
    stragglers: Annotated[int, typer.Option(min=0, help="Devices with an added delay.")] = 1
    straggler_delay_s: Annotated[
        float, typer.Option(min=0, help="Seconds added to each of their answers.")
    ] = 0.25


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What to train, and how."""

    network: Annotated[
        str | None, typer.Option(help="mlp, cnn2d, cnn1d, resnet18 or module:function.")
    ] = None
    cut: Annotated[str | None, typer.Option(help="Cut layer, by name.")] = None
    policy: Annotated[Policy, typer.Option(help="How samples are allocated.")] = Policy.LDS
    delta: Annotated[
        float | None, typer.Option(min=0, help="LDS: weight of delays, not a deviation budget.")
    ] = None
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.")] = 12
    batch: Annotated[int, typer.Option(*BATCH_NAMES, min=1, help="Samples of a step.")] = 64
    precision: Annotated[Precision, typer.Option(help="How activations and gradients travel.")] = (
        Precision.FP16
    )
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 3e-3
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What runs it."""

    broker: Annotated[str, typer.Option(help="auto, mosquitto, iotcore or HOST:PORT.")] = "auto"
    agent_python: Annotated[str, typer.Option(help="Python interpreter that runs the agents.")] = (
        sys.executable
    )
    agent_backward: Annotated[
        str | None,
        typer.Option(help="What trains on the agents: onnxruntime, torch or auto. (by network)"),
    ] = None
