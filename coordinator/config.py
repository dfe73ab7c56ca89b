"""Settings of a training run: what stands in the coordinator's YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from coordinator.optimisers import OptimiserSettings
from coordinator.patience import DeadlineSettings
from coordinator.planning import PolicySettings
from coordinator.rounds import RoundSettings
from edge_agent.datasets import DataSettings
from wire.messages import Precision
from wire.mqtt import MqttSettings
from wire.settings import Settings, convert_settings
from wire.topics import NAME_RULE, is_valid_name


class NetworkSettings(Settings, frozen=True, kw_only=True):
    """The network and where it is cut.

    ``name`` is a built-in network or ``module:function``. ``input_shape`` and ``classes`` come
    from ``test_data`` or the first device where they are not given. ``frozen``: the client
    segment keeps its ``initial_weights`` (a safetensors file of the whole network), devices need
    no backward pass and run ahead. ``backward`` is ``onnx`` for a bundle that devices without
    PyTorch can train, ``torch`` for any layer where all devices that train have PyTorch.
    """

    name: str = "cnn2d"
    cut: str | None = None
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    classes: int | None = None
    initial_weights: str | None = None
    frozen: bool = False
    backward: str = "onnx"

    def __post_init__(self) -> None:
        shape = self.input_shape
        if shape is not None and (not shape or min(shape) < 1):
            raise ValueError(f"expected sizes >= 1 in input_shape, received {list(shape)}")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"expected classes >= 2, received {self.classes}")
        if self.backward not in ("onnx", "torch"):
            raise ValueError(f"expected backward onnx or torch, received {self.backward!r}")


class CheckpointSettings(Settings, frozen=True, kw_only=True):
    """How often the run is written down, and how many checkpoints stay."""

    every_steps: int = 100
    keep: int = 3

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise ValueError("expected every_steps >= 1 and keep >= 1")


class RunSettings(Settings, frozen=True, kw_only=True):
    """One training run.

    ``out`` is the run's folder (default ``runs/{run}``); ``state`` the URL of the state store
    (default an SQLite file in that folder). ``fleet_out`` is the folder of what outlives a run:
    campaigns, unless ``state`` names a store, and their bundles (default ``fleets/{fleet}``).
    ``ahead`` is how many steps devices may be in front in a frozen run. ``threads`` limits PyTorch
    on the coordinator. ``bundle_key`` is the private key file that the run's bundle is signed with,
    for devices that demand it.
    """

    run: str = "run"
    fleet: str = "lab"
    out: str | None = None
    fleet_out: str | None = None
    state: str | None = None
    mqtt: MqttSettings = msgspec.field(default_factory=MqttSettings)
    network: NetworkSettings = msgspec.field(default_factory=NetworkSettings)
    test_data: DataSettings | None = None
    epochs: int = 10
    global_batch: int = 64
    min_devices: int = 1
    policy: PolicySettings = msgspec.field(default_factory=PolicySettings)
    optimiser: OptimiserSettings = msgspec.field(default_factory=OptimiserSettings)
    client_optimiser: OptimiserSettings | None = None
    precision: Precision = Precision.FP16
    deadline: DeadlineSettings = msgspec.field(default_factory=DeadlineSettings)
    checkpoint: CheckpointSettings = msgspec.field(default_factory=CheckpointSettings)
    ahead: int = 4
    threads: int | None = None
    bundle_key: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("run", "fleet"):
            if not is_valid_name(getattr(self, field)):
                raise ValueError(
                    f"expected {field}: {NAME_RULE}; received {getattr(self, field)!r}"
                )
        for field in ("epochs", "global_batch", "min_devices", "ahead"):
            if getattr(self, field) < 1:
                raise ValueError(f"expected {field} >= 1, received {getattr(self, field)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"expected threads >= 1, received {self.threads}")
        if self.seed < 0:
            raise ValueError(f"expected seed >= 0, received {self.seed}")

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.out or f"runs/{self.run}")

    @property
    def state_url(self) -> str:
        """URL of the state store."""
        return self.state or f"sqlite:///{self.directory / 'state.sqlite'}"

    @property
    def fleet_directory(self) -> Path:
        """The fleet's folder; it comes with the first rollout."""
        return Path(self.fleet_out or f"fleets/{self.fleet}")

    @property
    def fleet_state_url(self) -> str:
        """URL of the store that holds campaigns."""
        return self.state or f"sqlite:///{self.fleet_directory / 'state.sqlite'}"

    def round_settings(self) -> RoundSettings:
        """The part that the round state machine needs."""
        return RoundSettings(
            global_batch=self.global_batch,
            epochs=self.epochs,
            policy=self.policy,
            deadline=self.deadline,
            min_devices=self.min_devices,
            frozen=self.network.frozen,
            ahead=self.ahead,
            seed=self.seed,
        )


def override(settings: RunSettings, values: dict[str, object], *, source: str) -> RunSettings:
    """Replace fields by dotted name with values from flags; None leaves a field as it is.

    Raises ConfigError naming the field for a value that does not fit.
    """
    document = msgspec.to_builtins(settings)
    for name, value in values.items():
        if value is None:
            continue
        *path, last = name.split(".")
        place = document
        for part in path:
            place = place[part]
        place[last] = value
    return convert_settings(document, RunSettings, source=source)
