"""Rollouts to a real agent process over a real broker: killed at any moment, it stands at the end
on a verified bundle, and what it says is true."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from coordinator.config import RunSettings
from coordinator.model import build_split
from edge_agent.journal import Journal
from edge_agent.slots import find_file_in_use, read_journal
from models.export import export_bundle
from models.release import Release
from tests.fleet import Fleet, Process, running_fleet, terminate
from tests.rollout_peer import RolloutPeer
from wire.bundle import Bundle, bundle_digest
from wire.messages import RolloutCancel, RolloutPhase
from wire.signing import SigningKey, TrustedKeys, build_signature_file, generate_key

pytestmark = [pytest.mark.broker, pytest.mark.processes]

DEVICE = "gw-1"
KEY = generate_key()
Export = Callable[..., bytes]


@pytest.fixture(scope="module")
def export() -> Export:
    """A small frozen bundle, signed, of a given sequence."""
    network = {"name": "mlp", "cut": "block1", "arguments": {"hidden": [64, 6]}, "frozen": True}
    settings = msgspec.convert({"network": network}, RunSettings)
    split = build_split(settings, input_shape=(5,), classes=3, source="test")

    def build(sequence: int, key: SigningKey | None = KEY) -> bytes:
        def sign(manifest: bytes) -> bytes:
            assert key is not None
            return build_signature_file(manifest, [key])

        release = Release(sequence=sequence, sign=None if key is None else sign)
        return export_bundle(
            split, name="net", version=str(sequence), classes=3, frozen=True, release=release
        )

    return build


@pytest.fixture
def running(shared_mosquitto: EmbeddedBroker, fleet: str, tmp_path: Path) -> Any:
    with (
        running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes,
        RolloutPeer(shared_mosquitto.port, fleet, DEVICE) as peer,
    ):
        yield processes, peer


def _agent(fleet: Fleet) -> Process:
    rng = np.random.default_rng(1)
    data = {"npz": {"path": fleet.write_data("data", rng.normal(size=(9, 5)), np.arange(9) % 3)}}
    compute = {"forward": "onnxruntime", "backward": "none"}
    return fleet.agent(DEVICE, data, compute=compute, bundle_keys=[KEY.public.text])


def _state(fleet: Fleet) -> Path:
    return fleet.directory / f"state-{DEVICE}" / "bundles"


def _journal(fleet: Fleet) -> Journal:
    return read_journal(_state(fleet))


def _verified_in_use(fleet: Fleet) -> str:
    """Digest of the bundle on disk that the agent uses, after all checks."""
    path = find_file_in_use(_state(fleet))
    assert path is not None
    return Bundle.from_bytes(path.read_bytes(), trust=TrustedKeys((KEY.public,))).digest


def test_campaign_over_the_shared_topic_ends_acknowledged(running: Any, export: Export) -> None:
    fleet, peer = running
    agent = _agent(fleet)
    peer.wait_until(lambda: bool(peer.births), "a birth")
    assert peer.births[-1].bundle is None
    data = export(1)
    peer.shared = True
    peer.offer(data, "c1", soak_s=0.5)
    installed = peer.wait_for(RolloutPhase.INSTALLED, "c1")
    assert installed.self_test is not None
    assert installed.self_test.max_error is not None
    peer.wait_for(RolloutPhase.COMMITTED, "c1")
    peer.wait_until(lambda: peer.births[-1].committed == bundle_digest(data), "its birth")
    fleet.wait_until(lambda: not _journal(fleet).owed, "the acknowledgement")
    terminate(agent)
    assert agent.wait() == 0
    assert _verified_in_use(fleet) == bundle_digest(data)


def test_unsigned_bundle_is_refused_and_the_one_in_use_stays(running: Any, export: Export) -> None:
    fleet, peer = running
    _agent(fleet)
    peer.wait_until(lambda: bool(peer.births), "a birth")
    good = export(1)
    peer.offer(good, "good")
    peer.wait_for(RolloutPhase.COMMITTED, "good")
    peer.offer(export(2, None), "unsigned")
    assert "signed" in peer.wait_for(RolloutPhase.REFUSED, "unsigned").detail
    peer.offer(export(3, generate_key()), "stranger")
    assert "expected a signature of key" in peer.wait_for(RolloutPhase.REFUSED, "stranger").detail
    assert _verified_in_use(fleet) == bundle_digest(good)


def test_committed_bundle_is_called_back(running: Any, export: Export) -> None:
    fleet, peer = running
    _agent(fleet)
    peer.wait_until(lambda: bool(peer.births), "a birth")
    one, two = export(1), export(2)
    for campaign, data in (("one", one), ("two", two)):
        peer.offer(data, campaign)
        peer.wait_for(RolloutPhase.COMMITTED, campaign)
    peer.say(RolloutCancel(digest=bundle_digest(two), campaign="two", revert=True))
    peer.wait_for(RolloutPhase.REVERTED, "two")
    peer.wait_until(lambda: peer.births[-1].bundle == bundle_digest(one), "the birth")
    assert _verified_in_use(fleet) == bundle_digest(one)


def test_agent_killed_at_random_moments_ends_on_a_verified_bundle(
    running: Any, export: Export
) -> None:
    """A bundle in use; then an update, with kill -9 again and again, fewer than end a trial."""
    fleet, peer = running
    agent = _agent(fleet)
    peer.wait_until(lambda: bool(peer.births), "a birth")
    old, new = export(1), export(2)
    peer.offer(old, "old")
    peer.wait_for(RolloutPhase.COMMITTED, "old")
    rng = random.Random(4)
    for _ in range(4):
        offer = peer.offer(new, "new", soak_s=0.5)
        peer.run_for(rng.uniform(0.0, 0.6))
        agent.kill()
        if _journal(fleet).active is not None:
            assert _verified_in_use(fleet) in (bundle_digest(old), bundle_digest(new))
        births = len(peer.births)
        agent.start()
        peer.wait_until(lambda seen=births: len(peer.births) > seen, "the next birth")
    peer.say(offer)
    ends = (RolloutPhase.COMMITTED, RolloutPhase.REVERTED)
    peer.wait_until(
        lambda: any(s.campaign == "new" and s.phase in ends for s in peer.statuses), "an end"
    )
    fleet.wait_until(lambda: not _journal(fleet).owed or peer._turn(0.05), "its acknowledgement")
    (record,) = [r for r in _journal(fleet).records if r.status.campaign == "new"]
    expected = new if record.status.phase is RolloutPhase.COMMITTED else old
    assert _verified_in_use(fleet) == bundle_digest(expected)
    assert peer.births[-1].bundle == bundle_digest(expected)


def test_bundle_that_keeps_killing_the_agent_is_left_by_itself(
    running: Any, export: Export
) -> None:
    fleet, peer = running
    agent = _agent(fleet)
    peer.wait_until(lambda: bool(peer.births), "a birth")
    old, new = export(1), export(2)
    peer.offer(old, "old")
    peer.wait_for(RolloutPhase.COMMITTED, "old")
    peer.offer(new, "new", soak_s=3600.0)
    peer.wait_for(RolloutPhase.INSTALLED, "new")
    for _ in range(3):
        agent.kill()
        births = len(peer.births)
        agent.start()
        peer.wait_until(lambda seen=births: len(peer.births) > seen, "the next birth")
    assert "died 3 times" in peer.wait_for(RolloutPhase.REVERTED, "new").detail
    assert peer.births[-1].bundle == peer.births[-1].committed == bundle_digest(old)
    assert _verified_in_use(fleet) == bundle_digest(old)
