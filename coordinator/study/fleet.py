"""A fleet in memory: its parts of the pooled samples, its delays, and the steps it would be told.

Steps come from the planner of real runs, with the seeds of real runs: what is trained here is
what the same devices with these delays would train over MQTT.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.accounting import EpochAccount
from coordinator.planning import (
    Member,
    PlannedStep,
    PolicySettings,
    WindowPlanner,
    permutation_seed,
)
from coordinator.simulation.delay_models import BaseDelay, DeviceDelays, straggler_delays
from coordinator.study.cells import Fleet
from coordinator.study.data import StudyData
from coordinator.study.settings import DelayModel
from edge_agent.datasets import partition_indices
from edge_agent.worker import order_samples
from wire.errors import ConfigError
from wire.messages import SampleOrder

IntArray = NDArray[np.int64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class StudyFleet:
    """K devices. ``parts`` are indices into the pooled samples; counts_KM their label counts."""

    names: tuple[str, ...]
    parts: tuple[Indices, ...]
    counts_KM: IntArray
    delays: DeviceDelays

    @property
    def held_K(self) -> IntArray:  # noqa: N802 - the name carries the shape
        """Samples of each device."""
        held_K: IntArray = self.counts_KM.sum(axis=1)
        return held_K

    def members(self) -> dict[str, Member]:
        """The devices as the planner knows them."""
        return {
            name: Member(device=name, label_counts=tuple(int(count) for count in counts_M))
            for name, counts_M in zip(self.names, self.counts_KM, strict=True)
        }


def build_fleet(data: StudyData, fleet: Fleet, delays: DelayModel, seed: int) -> StudyFleet:
    """Deal the pooled samples out and choose the slow devices; all of it belongs to ``seed``."""
    y = data.train.y
    source = f"--schemes {fleet.scheme.name}, --devices {fleet.devices}"
    try:
        parts = partition_indices(y, data.classes, fleet.scheme.partition(fleet.devices, seed))
    except ValueError as exc:
        raise ConfigError(str(exc), source=source) from exc
    if not all(len(part) for part in parts):
        raise ConfigError(f"expected at most {len(y):,} devices, one sample each", source=source)
    counts = [np.bincount(y[part], minlength=data.classes) for part in parts]
    return StudyFleet(
        names=device_names(fleet.devices),
        parts=tuple(parts),
        counts_KM=np.array(counts, dtype=np.int64),
        delays=_build_delays(fleet, delays, seed),
    )


def device_names(devices: int) -> tuple[str, ...]:
    """Names that sort as they are numbered."""
    return tuple(f"device-{number:06d}" for number in range(devices))


def _build_delays(fleet: Fleet, delays: DelayModel, seed: int) -> DeviceDelays:
    """A share above 0 makes at least one device slow."""
    slow = round(fleet.stragglers * fleet.devices)
    return straggler_delays(
        fleet.devices,
        BaseDelay(delays.fixed_s, delays.per_sample_s),
        stragglers=max(slow, 1) if fleet.stragglers else 0,
        factor=delays.factor,
        seed=seed,
    )


class EpochPlans:
    """The steps of each epoch, in turn, as a run's coordinator would plan them."""

    def __init__(
        self, fleet: StudyFleet, policy: PolicySettings, *, global_batch: int, seed: int
    ) -> None:
        self._fleet = fleet
        self._window_steps = policy.refit_every
        self._planner = WindowPlanner(policy, global_batch=global_batch, seed=seed)
        self._members = fleet.members()
        self._index = {name: index for index, name in enumerate(fleet.names)}
        self._step = 0

    def epoch(self, epoch: int) -> Iterator[PlannedStep]:
        """The epoch's steps; ask for epochs in order, each to its end."""
        account = EpochAccount()
        for member in self._members.values():
            account.add(member.device, member.samples)
        while self._planner.refill(
            account,
            self._members,
            epoch=epoch,
            next_step=self._step + 1,
            steps=self._window_steps,
            delays_of=self._delays_of,
        ):
            while self._planner.window:
                step = self._planner.window.popleft()
                self._step = step.step
                for slot in step.slots:
                    account.mark_trained(slot.device, slot.spans)
                yield step

    def _delays_of(
        self, devices: Sequence[str], counts: Sequence[int] | IntArray
    ) -> NDArray[np.float64]:
        index_K = [self._index[name] for name in devices]
        delays = self._fleet.delays
        seconds_K: NDArray[np.float64] = delays.fixed_s_K[index_K] + (
            delays.per_sample_s_K[index_K] * np.asarray(counts)
        )
        return seconds_K


class EpochOrder:
    """Which samples the slots of one epoch stand for: each device's order of the epoch."""

    def __init__(
        self,
        fleet: StudyFleet,
        labels_N: IntArray,
        order: SampleOrder,
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self._index = {name: index for index, name in enumerate(fleet.names)}
        self._orders = [
            part[order_samples(permutation_seed(seed, epoch, name), labels_N[part], order)]
            for name, part in zip(fleet.names, fleet.parts, strict=True)
        ]

    def rows(self, step: PlannedStep) -> Indices:
        """The step's global batch as indices into the pooled samples, in device order."""
        return np.concatenate(
            [
                self._orders[self._index[slot.device]][offset : offset + count]
                for slot in step.slots
                for offset, count in slot.spans
            ]
        )

    def counts_K(self, step: PlannedStep) -> IntArray:  # noqa: N802 - the name carries the shape
        """Samples of each device in the step, (K,)."""
        counts_K = np.zeros(len(self._orders), dtype=np.int64)
        for slot in step.slots:
            counts_K[self._index[slot.device]] += slot.count
        return counts_K
