"""What a device says of its updates, how they are called off, and campaigns and runs that meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import edge_agent.incoming
from edge_agent.ledger import REPEAT_S
from edge_agent.self_test import Outcome
from tests.updated_device import (
    CANCELLED,
    COMMITTED,
    FAILED,
    INSTALLED,
    ONE,
    REFUSED,
    REPORT,
    REVERTED,
    SOAK_S,
    THREE,
    TWO,
    WANTED,
    Device,
    StandInTest,
    digest_of,
    offer_of,
)
from wire.errors import PeerProtocolError, Refusal
from wire.messages import RolloutAcknowledge


@pytest.fixture(autouse=True)
def passing_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.incoming, "SelfTest", StandInTest)
    monkeypatch.setattr(StandInTest, "outcome", Outcome(report=REPORT))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_status_is_said_again_until_it_is_acknowledged_across_restarts(device: Device) -> None:
    device.commit(ONE)
    last = device.last
    device.host.said.clear()
    device.tick(REPEAT_S - 1)
    assert device.host.said == []
    device.tick(1.0)
    assert device.host.said == [last]
    device.restart()
    assert device.host.said == [last]
    device.updater.acknowledge(
        RolloutAcknowledge(digest=digest_of(ONE), campaign="c", sequence=last.sequence)
    )
    device.restart()
    device.tick(10 * REPEAT_S)
    assert device.host.said == []


def test_nothing_is_repeated_while_offline(device: Device) -> None:
    device.commit(ONE)
    device.updater.disconnected(device.now_s)
    device.host.said.clear()
    device.tick(10 * REPEAT_S)
    assert device.host.said == []


def test_repeated_offer_changes_nothing_and_is_answered(device: Device) -> None:
    offer = offer_of(ONE)
    device.offer(offer)
    device.offer(offer)
    assert [status.phase for status in device.host.said] == [WANTED]
    device.send(ONE)
    device.tick()
    device.tick(SOAK_S)
    device.updater.acknowledge(
        RolloutAcknowledge(digest=digest_of(ONE), campaign="c", sequence=device.last.sequence)
    )
    last = device.last
    device.host.said.clear()
    device.offer(offer)
    assert device.host.said == [last], "the coordinator's account may lack it"


def test_higher_attempt_tries_again_and_a_lower_one_is_late(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInTest, "outcome", Outcome(failure="no"))
    device.update(ONE)
    assert device.last.phase is FAILED
    monkeypatch.setattr(StandInTest, "outcome", Outcome(report=REPORT))
    device.update(ONE, attempt=1)
    assert (device.last.phase, device.last.attempt) == (INSTALLED, 1)
    with pytest.raises(PeerProtocolError) as caught:
        device.offer(offer_of(ONE))
    assert caught.value.reason is Refusal.LATE


@pytest.mark.parametrize("revert", [True, False])
def test_cancel_half_way_stops_the_download(device: Device, *, revert: bool) -> None:
    device.offer(offer_of(ONE, shared=True))
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[:1])
    device.cancel(ONE, revert=revert)
    assert device.last.phase is CANCELLED
    assert (device.host.listening, device.store.part.path.exists()) == (set(), False)
    device.restart()
    assert WANTED not in [status.phase for status in device.host.said]


def test_cancel_in_the_self_test_stops_it(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInTest, "outcome", None)
    device.update(ONE)
    device.cancel(ONE)
    monkeypatch.setattr(StandInTest, "outcome", Outcome(report=REPORT))
    device.tick(1.0)
    assert device.last.phase is CANCELLED
    assert device.in_use is None


def test_cancel_that_keeps_lets_a_trial_go_on(device: Device) -> None:
    device.update(ONE)
    device.cancel(ONE)
    assert device.last.phase is INSTALLED
    device.tick(SOAK_S)
    assert device.last.phase is COMMITTED


@pytest.mark.parametrize("committed", [True, False])
def test_cancel_that_reverts_leads_to_the_bundle_before(device: Device, *, committed: bool) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    if committed:
        device.tick(SOAK_S)
    device.cancel(TWO, revert=True)
    assert device.last.phase is REVERTED
    assert device.in_use == device.updater.committed == digest_of(ONE)
    device.cancel(TWO, revert=True)
    assert device.last.phase is REVERTED
    assert device.in_use == digest_of(ONE), "one step back, not two"


def test_revert_of_a_bundle_that_is_in_use_no_longer_is_true(device: Device) -> None:
    device.commit(ONE)
    device.commit(TWO, "later")
    device.cancel(ONE, revert=True)
    assert (device.last.phase, device.last.campaign) == (REVERTED, "c")
    assert device.in_use == digest_of(TWO)


def test_late_cancel_does_not_stop_the_attempt_that_followed(device: Device) -> None:
    device.offer(offer_of(ONE))
    device.cancel(ONE, revert=True, attempt=0)
    device.offer(offer_of(ONE, attempt=1))
    with pytest.raises(PeerProtocolError) as caught:  # repeated by the broker or by a client
        device.cancel(ONE, revert=True, attempt=0)
    assert caught.value.reason is Refusal.LATE
    device.offer(offer_of(ONE, attempt=1))
    device.send(ONE)
    device.tick()
    assert (device.last.phase, device.last.attempt) == (INSTALLED, 1)
    with pytest.raises(PeerProtocolError):
        device.cancel(ONE, revert=True, attempt=0)
    assert device.in_use == digest_of(ONE)
    device.cancel(ONE, revert=True, attempt=1)
    assert (device.last.phase, device.last.attempt) == (REVERTED, 1)


def test_cancel_that_comes_before_its_offer_is_answered_and_ends_it(device: Device) -> None:
    device.offer(offer_of(ONE))
    device.cancel(ONE, attempt=0)
    device.cancel(ONE, attempt=1)
    assert (device.last.phase, device.last.attempt) == (CANCELLED, 1)
    device.offer(offer_of(ONE, attempt=1))
    assert (device.last.phase, device.last.attempt) == (CANCELLED, 1)
    assert device.updater.committed is None
    device.tick()
    assert device.in_use is None


def test_cancel_of_what_never_came_is_answered(device: Device) -> None:
    device.cancel(ONE, "unheard")
    assert (device.last.phase, device.last.campaign) == (CANCELLED, "unheard")


def test_next_campaign_replaces_one_under_way_and_both_hear_of_it(device: Device) -> None:
    device.offer(offer_of(ONE, "first"))
    device.offer(offer_of(TWO, "second"))
    ended = [s for s in device.host.said if s.campaign == "first" and s.phase is CANCELLED]
    assert [s.detail for s in ended] == ["replaced by rollout second"]
    device.send(TWO)
    device.tick()
    device.update(THREE, "third")
    ended = [s for s in device.host.said if s.campaign == "second" and s.phase is REVERTED]
    assert [s.detail for s in ended] == ["replaced by rollout third"]
    assert device.in_use == digest_of(THREE)


def test_run_does_not_disturb_a_campaign(device: Device) -> None:
    device.offer(offer_of(ONE))
    device.offer(offer_of(TWO, ""))
    assert device.last.phase is REFUSED
    device.send(ONE)
    device.tick()
    device.offer(offer_of(TWO, ""))
    assert device.last.phase is REFUSED
    assert device.in_use == digest_of(ONE)
    device.tick(SOAK_S)
    device.update(TWO, "")
    assert device.in_use == digest_of(TWO)


def test_end_of_a_campaign_makes_a_run_offer_its_bundle_again(device: Device) -> None:
    device.offer(offer_of(ONE))
    births = device.host.births
    device.cancel(ONE)
    assert device.host.births == births + 1
    device.offer(msgspec.structs.replace(offer_of(TWO, ""), size_bytes=100_001))
    assert device.last.phase is REFUSED
    assert device.host.births == births + 1, "a birth would bring the run's offer again"


def test_campaign_takes_over_the_trial_of_a_run_with_the_same_bundle(device: Device) -> None:
    device.update(ONE, "")
    device.offer(offer_of(ONE))
    assert (device.last.phase, device.last.campaign) == (INSTALLED, "c")
    device.tick(SOAK_S)
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "c")


def test_offer_of_the_bundle_before_ends_a_trial(device: Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO, "trial")
    device.offer(offer_of(ONE, "back"))
    assert device.in_use == device.updater.committed == digest_of(ONE)
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "back")


def test_full_disk_ends_the_update_and_not_the_agent(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.commit(ONE, "before")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    device.offer(offer_of(TWO))
    monkeypatch.setattr(device.store.part, "add", full)
    device.send(TWO, order=lambda offsets: list(offsets)[:1])
    assert device.last.phase is FAILED
    assert "No space left on device" in device.last.detail
    assert device.in_use == digest_of(ONE)


def test_chunk_that_nobody_asked_for_is_dropped(device: Device) -> None:
    with pytest.raises(PeerProtocolError) as caught:
        device.send(ONE)
    assert caught.value.reason is Refusal.EARLY
