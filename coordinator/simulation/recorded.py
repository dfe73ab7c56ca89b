"""A fleet as a run has met it: label counts and caps from births, delays as it measured them.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from coordinator.simulation.delay_models import DeviceDelays, FloatArray
from coordinator.simulation.inputs import GivenDelays, GivenPopulation
from wire.errors import ConfigError


class RecordedDevice(Protocol):
    """What a run's summary and its state store both say of a device."""

    @property
    def device(self) -> str: ...
    @property
    def label_counts(self) -> tuple[int, ...]: ...
    @property
    def max_batch(self) -> int | None: ...
    @property
    def fixed_s(self) -> float | None: ...
    @property
    def per_sample_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The devices of a run that hold labelled samples, by id; ``source`` is said in errors."""

    devices: tuple[RecordedDevice, ...]
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """Device ids, in the order of all arrays."""
        return tuple(each.device for each in self.devices)

    def population(self) -> GivenPopulation:
        """Label counts, and caps where a device named one."""
        classes = max(len(each.label_counts) for each in self.devices)
        counts_KM = np.zeros((len(self.devices), classes), dtype=np.int64)
        for row_M, each in zip(counts_KM, self.devices, strict=True):
            row_M[: len(each.label_counts)] = each.label_counts
        caps_K = None
        if any(each.max_batch for each in self.devices):
            unlimited = np.iinfo(np.int64).max
            caps_K = np.array([each.max_batch or unlimited for each in self.devices])
        return GivenPopulation(counts_KM, self.names, caps_K)

    def delays(self) -> GivenDelays:
        """What the run believed last; a device that it never measured gets the others' medians.

        Raises ConfigError where no device was measured.
        """
        fixed_s_K = _known([each.fixed_s for each in self.devices])
        per_sample_s_K = _known([each.per_sample_s for each in self.devices])
        if np.isnan(fixed_s_K).all():
            raise ConfigError(
                f"expected measured delays, none of the {len(self.devices)} devices has one yet",
                source=self.source,
            )
        return GivenDelays(DeviceDelays(_filled(fixed_s_K), _filled(per_sample_s_K)), self.names)


def recorded_run(devices: Iterable[RecordedDevice], source: str) -> RecordedRun:
    """The devices that hold labelled samples; ConfigError where there is none."""
    holding = sorted((each for each in devices if any(each.label_counts)), key=lambda d: d.device)
    if not holding:
        raise ConfigError(
            "expected a run whose devices have reported their label counts, found none",
            source=source,
        )
    return RecordedRun(tuple(holding), source)


def _known(values: list[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values])


def _filled(values_K: FloatArray) -> FloatArray:
    return np.where(np.isnan(values_K), np.nanmedian(values_K), values_K)
