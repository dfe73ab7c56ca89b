"""A whole fleet on this machine: broker, coordinator and agents as processes of their own.

Everything goes through the same doors as in a lab: the data is dealt out by the agents' own
``partition:`` blocks, the agents run ``edge-agent run`` on files that stay in the folder, and the
coordinator is the one of ``coordinator train``.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.allocation import Policy
from coordinator.broker import BrokerKind, embedded_broker
from coordinator.config import CheckpointSettings, NetworkSettings, RunSettings
from coordinator.demo_agents import AgentProcesses
from coordinator.optimisers import OptimiserSettings
from coordinator.patience import DeadlineSettings
from coordinator.planning import PolicySettings
from coordinator.reporting import Reporter
from coordinator.service import CoordinatorService
from edge_agent.compute import BackwardName
from edge_agent.config import AgentSettings, ComputeSettings, TrialDelay
from edge_agent.datasets import (
    DataSettings,
    NormalizeSettings,
    NpzSource,
    PartitionSettings,
    load_data,
    partition_indices,
)
from wire.command import stop_on_signals
from wire.errors import ConfigError
from wire.exit_codes import ExitCode
from wire.messages import Precision
from wire.mqtt import MqttSettings

FLEET = "demo"
TEST_SHARE = 0.2
RUN_FILES = ("steps.jsonl", "summary.json", "summary.png", "client.bundle")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The options of ``coordinator demo``."""

    out: Path
    data: Path | None = None
    test_data: Path | None = None
    devices: int = 8
    classes_per_device: int | None = None
    network: str | None = None
    cut: str | None = None
    policy: Policy = Policy.LDS
    delta: float | None = None
    epochs: int = 12
    batch: int = 64
    precision: Precision = Precision.FP16
    stragglers: int = 1
    straggler_delay_s: float = 0.25
    lr: float = 3e-3
    seed: int = 0
    broker: str = "auto"
    agent_python: str = sys.executable
    agent_backward: str | None = None


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """The shared files that agents and coordinator read, and what they hold."""

    train: DataSettings
    test: DataSettings
    sample_shape: tuple[int, ...]
    classes: int
    samples: int


def run_demo(settings: DemoSettings, reporter: Reporter) -> tuple[ExitCode, CoordinatorService]:
    """Train a fleet on this machine; leaves no process behind, however it ends."""
    _prepare_folder(settings.out)
    data = prepare_data(settings)
    with _broker(settings) as (host, port, description):
        reporter.note(f"broker: {description}")
        mqtt = MqttSettings(host=host, port=port)
        run = build_run_settings(settings, data, mqtt)
        service = CoordinatorService(run, source="demo", reporter=reporter, broker=description)
        stop_on_signals(service.stop)
        directory = settings.out / "agents"
        reporter.note(f"starting {settings.devices} agents; their logs are in {directory}")
        fleet = [
            build_agent_settings(settings, data, mqtt, index) for index in range(settings.devices)
        ]
        with AgentProcesses(
            fleet, directory, python=settings.agent_python, stop=service.stop
        ) as agents:
            code = service.run()
            agents.raise_if_failed()
    return code, service


def build_run_settings(settings: DemoSettings, data: DemoData, mqtt: MqttSettings) -> RunSettings:
    """The coordinator's settings; written to ``run.yaml`` too, for a look or a repeat."""
    run = RunSettings(
        run="demo",
        fleet=FLEET,
        out=str(settings.out),
        mqtt=mqtt,
        network=NetworkSettings(
            name=settings.network or _network_for(data.sample_shape),
            cut=settings.cut,
            classes=data.classes,
        ),
        test_data=data.test,
        epochs=settings.epochs,
        global_batch=settings.batch,
        min_devices=settings.devices,
        policy=PolicySettings(name=settings.policy, delta=settings.delta),
        optimiser=OptimiserSettings(lr=settings.lr),
        precision=settings.precision,
        deadline=DeadlineSettings(return_grace_s=10.0),
        checkpoint=CheckpointSettings(every_steps=200),
        threads=1,
        seed=settings.seed,
    )
    (settings.out / "run.yaml").write_bytes(msgspec.yaml.encode(run))
    return run


def build_agent_settings(
    settings: DemoSettings, data: DemoData, mqtt: MqttSettings, index: int
) -> AgentSettings:
    """One agent's settings; the last ``stragglers`` devices are the slow ones."""
    device = f"device-{index + 1:02d}"
    slow = index >= settings.devices - settings.stragglers
    partition = _partition(settings, data.classes, index)
    return AgentSettings(
        device=device,
        fleet=FLEET,
        mqtt=mqtt,
        data=msgspec.structs.replace(data.train, partition=partition),
        compute=ComputeSettings(threads=1, backward=_backward_for(settings, data)),
        state_dir=str(settings.out / "agents" / device),
        telemetry_every_s=5.0,
        trial_delay=TrialDelay(fixed_s=settings.straggler_delay_s if slow else 0.0),
    )


def _backward_for(settings: DemoSettings, data: DemoData) -> BackwardName:
    """Without PyTorch an agent starts sooner and takes a quarter of the memory.

    Only for networks whose segments ONNX Runtime trains as fast (docs/benchmarks.md); a network of
    the user's own may have layers without an ONNX backward pass.
    """
    if settings.agent_backward is not None:
        return _read_backward(settings.agent_backward)
    network = settings.network or _network_for(data.sample_shape)
    return "onnxruntime" if network in {"mlp", "cnn1d", "cnn2d"} else "auto"


def _read_backward(text: str) -> BackwardName:
    try:
        name: BackwardName = msgspec.convert(text, BackwardName)
    except msgspec.ValidationError:
        known = ", ".join(get_args(BackwardName))
        raise ConfigError(
            f"expected one of {known}, found {text!r}", source="--agent-backward"
        ) from None
    return name


def prepare_data(settings: DemoSettings) -> DemoData:
    """Write ``train.npz`` and ``test.npz``: the digits, or the user's own samples."""
    x, y = _read_samples(settings.data, "--data") if settings.data else _digits("train")
    if settings.test_data is not None:
        x_test, y_test = _read_samples(settings.test_data, "--test-data")
    elif settings.data is None:
        x_test, y_test = _digits("test")
    else:
        x, y, x_test, y_test = _hold_out(x, y, settings.seed)
    if x.shape[1:] != x_test.shape[1:]:
        raise ConfigError(
            f"expected samples of shape {x.shape[1:]} as in --data, found {x_test.shape[1:]}",
            source=settings.test_data,
        )
    image = (settings.network or "").startswith(("cnn2d", "resnet"))
    x, x_test = _with_channel(x, image=image), _with_channel(x_test, image=image)
    classes = int(max(y.max(), y_test.max())) + 1
    _check_partition(settings, y, classes)
    normalize = _measure(x)
    paths = {"train": (x, y), "test": (x_test, y_test)}
    sources = {}
    for name, (samples, labels) in paths.items():
        path = settings.out / f"{name}.npz"
        np.savez(path, x=samples, y=labels)
        sources[name] = DataSettings(
            npz=NpzSource(path=str(path)), classes=classes, scale=1.0, normalize=normalize
        )
    return DemoData(
        train=sources["train"],
        test=sources["test"],
        sample_shape=x.shape[1:],
        classes=classes,
        samples=len(y),
    )


@contextlib.contextmanager
def _broker(settings: DemoSettings) -> Iterator[tuple[str, int, str]]:
    """Host, port and description: a broker of ours, or the one at ``HOST:PORT``."""
    if settings.broker in {kind.value for kind in BrokerKind}:
        directory = settings.out / "broker"
        directory.mkdir(parents=True, exist_ok=True)
        with embedded_broker(directory=directory, kind=settings.broker) as broker:
            yield broker.host, broker.port, broker.describe()
        return
    host, colon, port = settings.broker.rpartition(":")
    if not colon or not port.isdigit():
        kinds = ", ".join(kind.value for kind in BrokerKind)
        raise ConfigError(
            f"expected {kinds} or HOST:PORT, found {settings.broker!r}", source="--broker"
        )
    yield host, int(port), settings.broker


def _prepare_folder(out: Path) -> None:
    """Make the folder; what an earlier demo left in it goes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        for path in [*out.glob("state.sqlite*"), *out.glob("checkpoints/step-*.safetensors")]:
            path.unlink()
    except OSError as exc:
        raise ConfigError(
            f"expected a writable directory ({exc.strerror})", source=f"--out {out}"
        ) from exc


def _digits(part: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    function = f"edge_agent.datasets.samples:digits_{part}"
    data = load_data(DataSettings(function=function), source="demo")
    return data.x, data.y


def _read_samples(path: Path, option: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Samples as the agents would read them, checks included."""
    data = load_data(DataSettings(npz=NpzSource(path=str(path))), source=option, field="npz")
    return data.x, data.y


def _hold_out(
    x: NDArray[Any], y: NDArray[np.int64], seed: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any], NDArray[np.int64]]:
    """Without test data a fifth of every class is kept for testing."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        held[members[: math.floor(len(members) * TEST_SHARE)]] = True
    if not held.any():
        raise ConfigError("expected at least 5 samples of a class, or --test-data", source="--data")
    return x[~held], y[~held], x[held], y[held]


def _with_channel(x: NDArray[Any], *, image: bool) -> NDArray[Any]:
    """Images as (N, channels, height, width): a missing channel is added, a last one moved."""
    if x.ndim == 3 and (image or x.shape[1] == x.shape[2]):
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _partition(settings: DemoSettings, classes: int, index: int) -> PartitionSettings:
    return PartitionSettings(
        scheme="dirichlet",
        devices=settings.devices,
        index=index,
        classes_per_device=settings.classes_per_device
        or _default_classes_per_device(classes, settings.devices),
        seed=settings.seed,
    )


def _check_partition(settings: DemoSettings, y: NDArray[np.int64], classes: int) -> None:
    """Find out here what every agent would otherwise find out for itself."""
    options = "--devices, --classes-per-device"
    try:
        parts = partition_indices(y, classes, _partition(settings, classes, 0))
    except ValueError as exc:
        raise ConfigError(str(exc), source=options) from exc
    if not all(len(part) for part in parts):
        raise ConfigError(
            f"expected enough samples for {settings.devices} devices, found {len(y)}",
            source=options,
        )


def _measure(x: NDArray[Any]) -> NormalizeSettings:
    """Mean and standard deviation per feature or channel, over the whole training file.

    The demo may look at all samples; a real fleet gets these numbers in its settings.
    """
    axes = (0, *range(2, x.ndim))
    mean, std = x.mean(axis=axes, dtype=np.float64), x.std(axis=axes, dtype=np.float64)
    std[std < 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0
    return NormalizeSettings(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _network_for(sample_shape: Sequence[int]) -> str:
    """A network that takes samples of this shape."""
    known = {1: "mlp", 2: "cnn1d", 3: "cnn2d"}
    if len(sample_shape) not in known:
        raise ConfigError(
            "expected samples of 1 (features), 2 (channels x time) or 3 (channels x height x "
            f"width) dimensions, found shape {tuple(sample_shape)}",
            source="--data",
        )
    return known[len(sample_shape)]


def _default_classes_per_device(classes: int, devices: int) -> int:
    """Two, or as many as it takes for every class to be held by some device."""
    return min(classes, max(2, math.ceil(classes / devices)))
