"""What bringing bundles into use asks of the daemon, and what the device accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from edge_agent.config import ComputeSettings
from wire.bundle import Bundle, Manifest, Trust
from wire.errors import SplitfleetError
from wire.messages import RolloutOffer, RolloutPhase, RolloutStatus


class Host(Protocol):
    """The daemon, as the updater sees it."""

    def say(self, status: RolloutStatus) -> None:
        """Publish a status; lost while offline."""

    def listen(self, digest: str) -> None:
        """Subscribe to a bundle's shared chunks."""

    def unlisten(self, digest: str) -> None:
        """End that subscription."""

    def check(self, manifest: Manifest) -> None:
        """Raise ModelError if this device cannot serve such a bundle."""

    def prepare(self, manifest: Manifest) -> None:
        """Import the libraries that such a bundle needs; ConfigError if one lacks."""

    def use(self, bundle: Bundle | None) -> None:
        """Work with this bundle, or none, from now on; ModelError if it cannot be loaded."""

    def announce(self) -> None:
        """Publish the birth again: what is in use or committed has changed."""

    def wake(self) -> None:
        """Make the owner's loop turn; called in another thread."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What this device accepts. ``trust`` is None where unsigned bundles are."""

    device: str
    agent_version: str
    max_bundle_bytes: int
    self_test_max_bytes: int
    compute: ComputeSettings
    trust: Trust | None
    clock: Callable[[], datetime]


class UpdateEndedError(SplitfleetError):
    """An update ends before its bundle was in use: ``refused``, ``failed`` or ``cancelled``."""

    def __init__(self, offer: RolloutOffer, phase: RolloutPhase, reason: str) -> None:
        self.offer = offer
        self.phase = phase
        self.reason = reason
        super().__init__(reason)
