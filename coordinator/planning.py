"""From counts per step to ranges per device: the window of planned steps.

Steps are planned a window at a time (as long as a refit is due), so that LDS always works with
the newest delays and a fleet of any size never holds steps times devices. Pure: no sockets,
clock, files or threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.accounting import EpochAccount, Range, class_blocks
from coordinator.allocation import EpochPlanner, Policy
from wire.settings import Settings


class PolicySettings(Settings, frozen=True, kw_only=True):
    """How samples are allocated; see docs/allocation.md.

    ``delta`` or ``deviation_budget`` set LDS's trade of batch deviation against time.
    ``delays_s`` gives seconds per step by device id instead of measuring them.
    """

    name: Policy = Policy.LDS
    delta: float | None = None
    deviation_budget: float | None = None
    refit_every: int = 10
    max_batch: int | None = None
    delays_s: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.refit_every < 1:
            raise ValueError(f"expected refit_every >= 1, received {self.refit_every}")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"expected max_batch >= 1, received {self.max_batch}")
        if self.delta is not None and self.deviation_budget is not None:
            raise ValueError("expected delta or deviation_budget, received both")
        for value in (self.delta, self.deviation_budget):
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"expected delta and deviation_budget >= 0, received {value}")
        if any(not 0.0 < delay < math.inf for delay in self.delays_s.values()):
            raise ValueError("expected every entry of delays_s > 0 and finite")


@dataclass(frozen=True, slots=True, order=True)
class PlannedSlot:
    """A device's part of a step: one range of its order, or several where classes are planned.

    ``ranges`` are (offset, count) of the order by class; the slot then has the offset of the first
    and the count of all. Empty where the slot is the one range.
    """

    device: str
    offset: int
    count: int
    ranges: tuple[Range, ...] = ()

    @property
    def spans(self) -> tuple[Range, ...]:
        """All its ranges, as (offset, count)."""
        return self.ranges or ((self.offset, self.count),)


@dataclass(frozen=True)
class PlannedStep:
    """One step and the slots that make its global batch, in device order."""

    step: int
    slots: tuple[PlannedSlot, ...]

    @property
    def samples(self) -> int:
        return sum(slot.count for slot in self.slots)

    @cached_property
    def slot_set(self) -> frozenset[PlannedSlot]:
        return frozenset(self.slots)

    @cached_property
    def devices(self) -> frozenset[str]:
        return frozenset(slot.device for slot in self.slots)

    @cached_property
    def slots_by_name(self) -> dict[tuple[str, int, int], PlannedSlot]:
        """By (device, offset, count), which is how messages name a slot of a step."""
        return {(slot.device, slot.offset, slot.count): slot for slot in self.slots}


@dataclass(frozen=True, slots=True)
class Member:
    """What the planner needs to know of a device."""

    device: str
    label_counts: tuple[int, ...]
    max_batch: int | None = None

    @property
    def samples(self) -> int:
        return sum(self.label_counts)


DelaysOf = Callable[[Sequence[str], Sequence[int]], NDArray[np.float64]]


class WindowPlanner:
    """Plans an epoch's steps window by window over the devices that are there."""

    def __init__(self, settings: PolicySettings, *, global_batch: int, seed: int) -> None:
        self._settings = settings
        self._global_batch = global_batch
        self._seed = seed
        self._planner: EpochPlanner | None = None
        self._devices: list[str] = []
        self._label_counts: list[list[int]] = []
        self.builds = 0
        self.window: deque[PlannedStep] = deque()

    @property
    def last_delta(self) -> float | None:
        return None if self._planner is None else self._planner.last_delta

    @property
    def heeds_measured_delays(self) -> bool:
        """Whether other delays would give another plan."""
        deaf = (Policy.FLS, Policy.FPLS, Policy.UGS)
        return self._settings.name not in deaf and not self._settings.delays_s

    def devices(self) -> set[str]:
        """Devices that the current plan counts on."""
        planned = {slot.device for step in self.window for slot in step.slots}
        return planned | (set(self._devices) if self._planner is not None else set())

    def forget(self) -> None:
        """Build the planner anew at the next refill; what is planned stays."""
        self._planner = None

    def clear(self, account: EpochAccount) -> None:
        """Give all planned ranges back and build the planner anew."""
        for step in self.window:
            for slot in step.slots:
                account.give_back(slot.device, slot.spans)
        self.window.clear()
        self._planner = None

    def refill(
        self,
        account: EpochAccount,
        members: Mapping[str, Member],
        *,
        epoch: int,
        next_step: int,
        steps: int,
        delays_of: DelaysOf,
    ) -> bool:
        """Plan until ``steps`` are in the window or nothing is left; tell whether any was added.

        ``members`` are the devices that can take part now; ``next_step`` numbers the first step
        behind the window.
        """
        added = False
        if self._planner is None:
            self._build(account, members, epoch, delays_of)
        elif not self._settings.delays_s:
            self._planner.set_delays(*self._delays(account, delays_of))
        while self._planner is not None and len(self.window) < steps:
            counts = self._planner.next_step()
            if counts is None:
                self._planner = None
                break
            slots = self._take_classes(account) if self._by_class else self._take(account, counts)
            self.window.append(PlannedStep(next_step, slots))
            next_step += 1
            added = True
        return added

    def _take(self, account: EpochAccount, counts: NDArray[np.int64]) -> tuple[PlannedSlot, ...]:
        slots = []
        for index in np.flatnonzero(counts):
            device = self._devices[index]
            for offset, count in account.devices[device].take(int(counts[index])):
                slots.append(PlannedSlot(device, offset, count))
        return tuple(slots)

    def _take_classes(self, account: EpochAccount) -> tuple[PlannedSlot, ...]:
        """One slot per device, from the blocks of the classes that it is to supply."""
        assert self._planner is not None
        counts_KM = self._planner.class_counts
        assert counts_KM is not None
        slots = []
        for index in np.flatnonzero(counts_KM.any(axis=1)):
            device = self._devices[index]
            blocks = class_blocks(self._label_counts[index])
            spans = [
                span
                for label in np.flatnonzero(counts_KM[index])
                for span in account.devices[device].take(
                    int(counts_KM[index, label]), within=blocks[label]
                )
            ]
            total = sum(count for _, count in spans)
            slots.append(PlannedSlot(device, spans[0][0], total, tuple(spans)))
        return tuple(slots)

    def _build(
        self,
        account: EpochAccount,
        members: Mapping[str, Member],
        epoch: int,
        delays_of: DelaysOf,
    ) -> None:
        self._devices = sorted(name for name in members if account.free(name))
        if not self._devices:
            return
        self.builds += 1
        settings = self._settings
        self._label_counts = [list(members[name].label_counts) for name in self._devices]
        delays_s, per_sample_s = self._delays(account, delays_of)
        self._planner = EpochPlanner(
            self._label_counts,
            self._global_batch,
            policy=settings.name,
            remaining=self._remaining(account),
            delays_s=delays_s,
            per_sample_s=per_sample_s,
            delta=settings.delta,
            deviation_budget=settings.deviation_budget,
            max_batch=self._caps(members),
            refit_every=settings.refit_every,
            seed=_derive_seed(self._seed, epoch, self.builds),
        )

    def _caps(self, members: Mapping[str, Member]) -> NDArray[np.int64]:
        unlimited = np.iinfo(np.int64).max
        cap = self._settings.max_batch or unlimited
        return np.array(
            [min(cap, members[name].max_batch or unlimited) for name in self._devices],
            dtype=np.int64,
        )

    @property
    def _by_class(self) -> bool:
        return self._settings.name.is_by_class

    def _remaining(self, account: EpochAccount) -> NDArray[np.int64]:
        """Free samples per device, (K,), or per device and class, (K, M)."""
        if not self._by_class:
            return np.array([account.free(name) for name in self._devices], dtype=np.int64)
        rows = zip(self._devices, self._label_counts, strict=True)
        return np.array([account.free_by_class(*row) for row in rows], dtype=np.int64)

    def _delays(
        self, account: EpochAccount, delays_of: DelaysOf
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Seconds of a typical contribution: B samples in proportion to what devices hold.

        Where classes are planned: the fixed part, and seconds per sample.
        """
        given = self._settings.delays_s
        if given:
            typical_s = float(np.median(list(given.values())))
            return np.array([given.get(name, typical_s) for name in self._devices]), None
        if self._by_class:
            fixed_s = delays_of(self._devices, [0] * len(self._devices))
            one_sample_s = delays_of(self._devices, [1] * len(self._devices))
            return fixed_s, np.maximum(one_sample_s - fixed_s, 0.0)
        samples = [account.devices[name].samples for name in self._devices]
        total = max(1, sum(samples))
        counts = [max(1, round(self._global_batch * n / total)) for n in samples]
        return delays_of(self._devices, counts), None

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        return {
            "builds": self.builds,
            "devices": self._devices,
            "label_counts": self._label_counts,
            "planner": None if self._planner is None else self._planner.state(),
            "window": [
                [step.step, [[s.device, s.offset, s.count, s.ranges] for s in step.slots]]
                for step in self.window
            ],
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Take up the state that ``document`` gave; further steps are then the same."""
        self.builds = document["builds"]
        self._devices = list(document["devices"])
        self._label_counts = document["label_counts"]
        state = document["planner"]
        self._planner = (
            None if state is None else EpochPlanner.from_state(self._label_counts, state)
        )
        self.window = deque(
            PlannedStep(step, tuple(_slot_from(*slot) for slot in slots))
            for step, slots in document["window"]
        )


def _slot_from(
    device: str, offset: int, count: int, ranges: Sequence[Sequence[int]] = ()
) -> PlannedSlot:
    return PlannedSlot(device, offset, count, tuple((start, n) for start, n in ranges))


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(11))


def permutation_seed(run_seed: int, epoch: int, device: str) -> int:
    """Seed of a device's permutation for an epoch: 53 bits, so that any JSON reader keeps it."""
    return _derive_seed(run_seed, epoch, *device.encode())
