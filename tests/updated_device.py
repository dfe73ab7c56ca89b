"""A device's updater over a directory, with stand-ins for its daemon and its self-tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import ComputeSettings
from edge_agent.self_test import Outcome
from edge_agent.slots import SlotStore
from edge_agent.update_host import Policy
from edge_agent.updater import Updater
from tests.test_bundle import FILES, PLAIN
from wire.bundle import Bundle, Manifest, build_bundle
from wire.errors import ModelError
from wire.messages import (
    ChunkHeader,
    RolloutCancel,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
    SelfTestReport,
)
from wire.signing import TrustedKeys

CHUNK = 1024
REPORT = SelfTestReport(seconds=0.5, peak_bytes=1000, max_error=0.0)
WANTED, VERIFIED, INSTALLED = RolloutPhase.WANTED, RolloutPhase.VERIFIED, RolloutPhase.INSTALLED
COMMITTED, REFUSED, FAILED = RolloutPhase.COMMITTED, RolloutPhase.REFUSED, RolloutPhase.FAILED
REVERTED, CANCELLED = RolloutPhase.REVERTED, RolloutPhase.CANCELLED
SOAK_S = 30.0


def numbered_bundle(number: int, **fields: Any) -> bytes:
    manifest = msgspec.structs.replace(PLAIN, version=str(number), sequence=number)
    return build_bundle(msgspec.structs.replace(manifest, **fields), FILES)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def offer_of(data: bytes, campaign: str = "c", **fields: Any) -> RolloutOffer:
    plain = {"soak_s": SOAK_S} if campaign else {"good_steps": 1}
    return RolloutOffer(
        digest=digest_of(data),
        size_bytes=len(data),
        chunk_bytes=CHUNK,
        campaign=campaign,
        **{**plain, **fields},
    )


class StandInTest:
    """Stands in for the process of a self-test."""

    outcome: Outcome | None = Outcome(report=REPORT)

    def __init__(self, job: Any, *, limit_s: float, now_s: float, wake: Any) -> None:
        pass

    def poll(self, now_s: float) -> Outcome | None:
        return StandInTest.outcome

    def kill(self) -> None:
        pass


class StandInHost:
    """A daemon that only writes down what it is asked."""

    def __init__(self) -> None:
        self.said: list[RolloutStatus] = []
        self.listening: set[str] = set()
        self.bundle: Bundle | None = None
        self.births = 0
        self.unusable: set[str] = set()

    def say(self, status: RolloutStatus) -> None:
        self.said.append(status)

    def listen(self, digest: str) -> None:
        self.listening.add(digest)

    def unlisten(self, digest: str) -> None:
        self.listening.remove(digest)

    def check(self, manifest: Manifest) -> None:
        if manifest.network == "foreign":
            raise ModelError("not for this device")

    def prepare(self, manifest: Manifest) -> None:
        pass

    def use(self, bundle: Bundle | None) -> None:
        if bundle is not None and bundle.digest in self.unusable:
            raise ModelError("cannot be loaded")
        self.bundle = bundle

    def announce(self) -> None:
        self.births += 1

    def wake(self) -> None:
        pass


class Device:
    """An updater over a directory, and what the coordinator does to it."""

    def __init__(self, directory: Path, trust: TrustedKeys | None = None) -> None:
        self.directory = directory
        self.trust = trust
        self.now_s = 1000.0
        self.restart()

    def restart(self, *, clean: bool = False, unusable: set[str] | None = None) -> None:
        if clean:
            self.updater.stop()
        self.host = StandInHost()
        self.host.unusable = unusable or set()
        policy = Policy(
            device="gw",
            agent_version="0.1.0",
            max_bundle_bytes=100_000,
            self_test_max_bytes=1 << 20,
            compute=ComputeSettings(),
            trust=self.trust,
            clock=lambda: datetime(2025, 6, 1, tzinfo=UTC),
        )
        self.store = SlotStore(self.directory)
        self.updater = Updater(self.store, policy, self.host)
        self.updater.start(self.now_s)
        self.updater.connected(self.now_s)

    def offer(self, offer: RolloutOffer) -> None:
        self.updater.offer(offer, self.now_s)

    def send(self, data: bytes, *, shared: bool = False, order: Callable[..., Any] = list) -> None:
        """All chunks, as the coordinator would send them."""
        for offset in order(range(0, len(data), CHUNK)):
            header = ChunkHeader(digest=digest_of(data), offset_bytes=offset, size_bytes=len(data))
            chunk = data[offset : offset + CHUNK]
            self.updater.chunk(header, chunk, shared=shared, now_s=self.now_s)

    def tick(self, seconds: float = 0.0, *, mid_step: bool = False) -> None:
        self.now_s += seconds
        self.updater.tick(self.now_s, mid_step=mid_step)

    def update(self, data: bytes, campaign: str = "c", **fields: Any) -> None:
        """Offer, download, self-test, installation."""
        self.offer(offer_of(data, campaign, **fields))
        self.send(data)
        self.tick()

    def commit(self, data: bytes, campaign: str = "c") -> None:
        self.update(data, campaign)
        self.tick(SOAK_S)
        assert self.last.phase is COMMITTED

    def cancel(self, data: bytes, campaign: str = "c", **fields: Any) -> None:
        message = RolloutCancel(digest=digest_of(data), campaign=campaign, **fields)
        self.updater.cancel(message, self.now_s)

    @property
    def last(self) -> RolloutStatus:
        return self.host.said[-1]

    @property
    def phases(self) -> list[RolloutPhase]:
        return [status.phase for status in self.host.said if status.phase is not WANTED]

    @property
    def in_use(self) -> str | None:
        """What the device works with; it is whole and what the journal says."""
        journal = self.store.journal
        record = journal.in_use
        held = None if self.host.bundle is None else self.host.bundle.digest
        assert held == (None if record is None else record.digest)
        return held


ONE, TWO, THREE = numbered_bundle(1), numbered_bundle(2), numbered_bundle(3)
