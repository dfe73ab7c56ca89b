"""Settings of an edge agent: what stands in its YAML file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_agent.compute import BackwardName, ForwardName
from edge_agent.datasets import DataSettings
from wire.errors import ConfigError
from wire.mqtt import MqttSettings
from wire.settings import Settings, load_settings
from wire.topics import NAME_RULE, is_valid_name

MIB = 1 << 20
MAX_BUNDLE_BYTES = 512 * MIB
SELF_TEST_BYTES = 512 * MIB

S = TypeVar("S", bound=Settings)


class ComputeSettings(Settings, frozen=True, kw_only=True):
    """How the client segment runs.

    ``forward: auto`` takes PyTorch for a segment that PyTorch trains, else ONNX Runtime.
    ``backward: auto`` takes PyTorch where it is installed, else ONNX Runtime. ``max_batch_bytes``
    bounds the memory of one pass: a larger range goes through in micro-batches. ``max_batch`` is
    the most samples that the coordinator may ask for in one step.
    """

    forward: ForwardName = "auto"
    backward: BackwardName = "auto"
    threads: int = 1
    max_batch_bytes: int = 256 * MIB
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if self.threads < 1 or self.max_batch_bytes < MIB:
            raise ValueError(f"expected threads >= 1 and max_batch_bytes >= {MIB}")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"expected max_batch >= 1, received {self.max_batch}")


class TrialDelay(Settings, frozen=True, kw_only=True):
    """Seconds waited before activations are sent, to play a slow device in a trial."""

    fixed_s: float = 0.0
    per_sample_s: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.fixed_s, self.per_sample_s)):
            raise ValueError("expected fixed_s and per_sample_s >= 0, both finite")

    def seconds(self, count: int) -> float:
        return self.fixed_s + self.per_sample_s * count


class AgentSettings(Settings, frozen=True, kw_only=True):
    """One edge agent. ``labels`` describe the device (site, model, …) for selecting devices.

    ``state_dir`` (default ``agent-state/{device}``) keeps the boot counter and bundles.
    ``bundle_keys`` are public keys, as PEM files or in base64: with any, only bundles that one of
    them has signed are taken. ``self_test_max_bytes`` bounds what a new bundle's self-test may
    allocate.
    """

    device: str
    data: DataSettings
    fleet: str = "lab"
    mqtt: MqttSettings = msgspec.field(default_factory=MqttSettings)
    compute: ComputeSettings = msgspec.field(default_factory=ComputeSettings)
    state_dir: str | None = None
    telemetry_every_s: float = 10.0
    max_bundle_bytes: int = MAX_BUNDLE_BYTES
    bundle_keys: tuple[str, ...] = ()
    self_test_max_bytes: int = SELF_TEST_BYTES
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    trial_delay: TrialDelay = msgspec.field(default_factory=TrialDelay)

    def __post_init__(self) -> None:
        for field in ("device", "fleet"):
            if not is_valid_name(getattr(self, field)):
                raise ValueError(
                    f"expected {field}: {NAME_RULE}; received {getattr(self, field)!r}"
                )
        if not self.telemetry_every_s > 0 or self.max_bundle_bytes < 1:
            raise ValueError("expected telemetry_every_s > 0 and max_bundle_bytes >= 1")
        if self.self_test_max_bytes < MIB:
            raise ValueError(f"expected self_test_max_bytes >= {MIB}")

    @property
    def state_directory(self) -> Path:
        """Where the device keeps what must outlive a restart."""
        return Path(self.state_dir or f"agent-state/{self.device}")


def load_agent_settings(path: str, overrides: dict[str, object] | None = None) -> AgentSettings:
    """Read an agent's file; ``overrides`` (from flags) replace fields by dotted name."""
    settings = load_settings(path, AgentSettings)
    for name, value in (overrides or {}).items():
        if value is not None:
            settings = _replace(settings, name, value, path)
    return settings


def _replace(settings: AgentSettings, name: str, value: object, path: str) -> AgentSettings:
    try:
        return _replaced(settings, name, value)
    except ValueError as exc:
        raise ConfigError(str(exc), source=path, field=f"$.{name}") from exc


def _replaced(settings: S, name: str, value: object) -> S:
    head, _, rest = name.partition(".")
    if rest:
        inner = getattr(settings, head)
        if inner is None:
            raise ValueError(f"expected a block {head!r} in the file to set {name!r} in")
        value = _replaced(inner, rest, value)
    return msgspec.structs.replace(settings, **{head: value})
