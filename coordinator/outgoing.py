"""What the coordinator says to devices: allocations, weights, cut gradients, state."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.config import RunSettings
from coordinator.planning import PlannedSlot, permutation_seed
from coordinator.registry import Registry
from wire.codec import encode_tensors, exact_block
from wire.messages import (
    Allocation,
    CutGradientHeader,
    FleetState,
    Mode,
    SampleOrder,
    Slot,
    WeightsHeader,
    build_metadata,
    encode_message,
)
from wire.precision import gradient_parts
from wire.topics import Channel

Floats = NDArray[np.float32]


class Publish(Protocol):
    """Hands a message to the broker."""

    def __call__(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        bundle: str | None = None,
        expiry_s: float | None = None,
    ) -> None: ...


class Outgoing:
    """Builds and counts the messages of one run.

    ``run`` names run, attempt and this very start: whatever another start has left in the broker
    or with a device is foreign, even when a run of the same name begins anew.
    """

    def __init__(
        self,
        settings: RunSettings,
        registry: Registry,
        publish: Publish,
        *,
        attempt: int,
        bundle: str,
    ) -> None:
        self.run = f"{settings.run}.{attempt}-{secrets.token_hex(3)}"
        self.plan_number = 0
        self._settings = settings
        self._registry = registry
        self._publish = publish
        self._attempt = attempt
        self._bundle = bundle
        self._weights: bytearray | None = None

    def send_allocations(
        self, slots: Mapping[str, Sequence[tuple[int, PlannedSlot]]], *, epoch: int
    ) -> None:
        """Tell each device all its slots from now on, as (step, slot)."""
        self.plan_number += 1
        frozen = self._settings.network.frozen
        by_class = self._settings.policy.name.is_by_class
        for name, own in slots.items():
            allocation = Allocation(
                run=self.run,
                epoch=epoch,
                seed=permutation_seed(self._settings.seed, epoch, name),
                plan=self.plan_number,
                bundle=self._bundle,
                slots=tuple(Slot(step, slot.offset, slot.count) for step, slot in own),
                precision=self._settings.precision,
                mode=Mode.FROZEN if frozen else Mode.LOCKSTEP,
                ahead=self._settings.ahead if frozen else 0,
                order=SampleOrder.BY_CLASS if by_class else SampleOrder.SHUFFLED,
                ranges=tuple(slot.spans for _, slot in own) if by_class else (),
            )
            self._send_down(Channel.ALLOCATION, encode_message(allocation), name)

    def send_weights(
        self,
        weights: Mapping[str, Floats],
        *,
        epoch: int,
        step: int,
        version: int,
        devices: Iterable[str],
    ) -> None:
        """Give the go of a step."""
        header = WeightsHeader(
            run=self.run, epoch=epoch, step=step, version=version, bundle=self._bundle
        )
        parts = {"weights": exact_block(weights)} if weights else {}
        self._weights = encode_tensors(parts, build_metadata(header))
        self._publish(Channel.WEIGHTS, self._weights)
        for name in devices:
            self._registry.device(name).bytes_down += len(self._weights)

    def repeat_weights(self) -> None:
        """Give the last go again, after a lost connection."""
        if self._weights is not None:
            self._publish(Channel.WEIGHTS, self._weights)

    def send_cut_gradient(
        self, gradient: Floats, slot: PlannedSlot, *, epoch: int, step: int
    ) -> None:
        """Return a slot's gradient at the cut (count, …)."""
        parts, metadata = gradient_parts({"gradient": gradient}, self._settings.precision)
        header = CutGradientHeader(
            run=self.run, epoch=epoch, step=step, offset=slot.offset, count=slot.count
        )
        payload = encode_tensors(parts, build_metadata(header) | metadata)
        self._send_down(Channel.CUT_GRADIENT, payload, slot.device)

    def build_state(self, *, epoch: int, step: int, online: bool) -> bytes:
        """Where the run is, as a message."""
        state = FleetState(online=online, run=self.run, epoch=epoch, step=step, boot=self._attempt)
        return encode_message(state)

    def send_state(self, *, epoch: int, step: int, online: bool) -> None:
        """Say where the run is."""
        self._publish(Channel.FLEET_STATE, self.build_state(epoch=epoch, step=step, online=online))

    def _send_down(self, channel: Channel, payload: bytes | bytearray, device: str) -> None:
        self._registry.device(device).bytes_down += len(payload)
        self._publish(channel, payload, device=device)
