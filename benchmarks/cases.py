"""What is measured: networks, fleets and payloads, as settings of the real programs.

Every case trains one epoch of Fashion-MNIST dealt out in equal parts, so that the coordinator, the
agents and the undivided network see the same samples and every step has the whole global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.allocation import Policy
from coordinator.config import CheckpointSettings, NetworkSettings, RunSettings
from coordinator.planning import PolicySettings
from edge_agent.config import AgentSettings, ComputeSettings
from edge_agent.datasets import DataSettings, IdxSource, PartitionSettings
from wire.client_choice import ClientName
from wire.messages import Precision
from wire.mqtt import MqttSettings

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
FLEET = "benchmark"
NEVER = 1_000_000_000  # steps between two checkpoints

# What a device is set to: with PyTorch, without it, and with each pass on another of the two.
ENGINES = {
    "torch": ComputeSettings(forward="torch", backward="torch", threads=1),
    "onnxruntime": ComputeSettings(forward="onnxruntime", backward="onnxruntime", threads=1),
    "mixed": ComputeSettings(forward="onnxruntime", backward="torch", threads=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network cut in two and the fleet that trains it; ``global_batch`` is over all devices."""

    name: str
    title: str
    network: str
    sample_shape: tuple[int, ...]
    devices: int
    global_batch: int
    steps: int  # measured per repeat, unless told otherwise
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a case's tensors travel, what runs the client segment, and over which MQTT client."""

    precision: Precision
    engine: str
    client: ClientName


_MLP: dict[str, Any] = {
    "network": "mlp",
    "arguments": {"hidden": [256]},
    "sample_shape": (784,),
    "global_batch": 64,
    "steps": 200,
}

CASES = {
    case.name: case
    for case in (
        Case(name="mlp-n1", title="MLP 784→256, 256→10, N=1, B=64", devices=1, **_MLP),
        Case(name="mlp-n4", title="MLP 784→256, 256→10, N=4, B=4x16", devices=4, **_MLP),
        Case(
            name="cnn-n8",
            title="CNN 28x28, cut after block 2, N=8, B=128",
            network="cnn2d",
            sample_shape=(1, 28, 28),
            devices=8,
            global_batch=128,
            steps=80,
        ),
    )
}


def device_names(case: Case) -> list[str]:
    """Ids of the case's devices, in the order of their parts."""
    return [f"device-{index + 1:02d}" for index in range(case.devices)]


def build_data(case: Case, samples: int, index: int) -> DataSettings:
    """The part of the first ``samples`` images that a device holds."""
    return DataSettings(
        idx=IdxSource(
            images=str(FASHION_MNIST / "train-images-idx3-ubyte.gz"),
            labels=str(FASHION_MNIST / "train-labels-idx1-ubyte.gz"),
        ),
        classes=CLASSES,
        limit=samples,
        shape=case.sample_shape,
        partition=PartitionSettings(devices=case.devices, index=index),
    )


def build_run(
    case: Case, variant: Variant, mqtt: MqttSettings, out: Path, *, name: str, threads: int
) -> RunSettings:
    """One epoch on the coordinator, without evaluation and without checkpoints on the way."""
    return RunSettings(
        run=name,
        fleet=FLEET,
        out=str(out),
        mqtt=mqtt,
        network=NetworkSettings(
            name=case.network,
            arguments=case.arguments,
            input_shape=case.sample_shape,
            classes=CLASSES,
        ),
        epochs=1,
        global_batch=case.global_batch,
        min_devices=case.devices,
        policy=PolicySettings(name=Policy.UGS),
        precision=variant.precision,
        checkpoint=CheckpointSettings(every_steps=NEVER),
        threads=threads,
    )


def build_agent(
    case: Case, engine: str, mqtt: MqttSettings, out: Path, *, index: int, samples: int
) -> AgentSettings:
    """One device with its part of the samples and one thread for its client segment."""
    device = device_names(case)[index]
    return AgentSettings(
        device=device,
        fleet=FLEET,
        mqtt=mqtt,
        data=build_data(case, samples, index),
        compute=ENGINES[engine],
        state_dir=str(out / device),
    )


def split_batch(case: Case) -> list[int]:
    """Samples per device and step where all contribute alike."""
    return [len(part) for part in np.array_split(np.arange(case.global_batch), case.devices)]
