"""What a campaign asks its owner to do, and what devices report to it."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.rollout.records import DevicePhase, SelfTest


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Offer the bundle to a device."""

    device: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Tell a device to stop; with ``revert`` to go back from the bundle where it is in use."""

    device: str
    revert: bool
    attempt: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Say what has happened to the campaign."""

    text: str


Action = SendOffer | SendCancel | Announce


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a device said: the phase that it is in, within an attempt."""

    phase: DevicePhase
    attempt: int = 0
    sequence: int = 0
    detail: str = ""
    self_test: SelfTest | None = None
