"""A simulated fleet: who holds what, how long devices take, and what a step of each may hold.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.simulation.delay_models import DeviceDelays

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedFleet:
    """``label_counts_KM`` samples per device and class; ``max_batch_K`` None where nothing caps.

    ``names`` are device ids where they are known. ValueError where the parts do not belong
    together, or where there is no sample at all.
    """

    label_counts_KM: IntArray
    delays: DeviceDelays
    max_batch_K: IntArray | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        devices = len(self.label_counts_KM)
        if self.delays.devices != devices:
            raise ValueError(
                f"delays: expected one per device ({devices}), found {self.delays.devices}"
            )
        if self.max_batch_K is not None and self.max_batch_K.shape != (devices,):
            raise ValueError(
                f"max_batch: expected one per device ({devices}), found {self.max_batch_K.size}"
            )
        if not self.label_counts_KM.any():
            raise ValueError("label counts: expected at least one sample, found none")

    @property
    def devices(self) -> int:
        """K, those without samples too."""
        return len(self.label_counts_KM)

    @property
    def held_K(self) -> IntArray:  # noqa: N802
        """Samples of each device."""
        held_K: IntArray = self.label_counts_KM.sum(axis=1)
        return held_K

    def name_of(self, device: int) -> str:
        """Its id, or its place in the label counts."""
        return str(device) if self.names is None else self.names[device]
