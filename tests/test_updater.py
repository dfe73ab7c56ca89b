"""The device's side of a rollout: every end that an update can have, and restarts in between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edge_agent.incoming
from edge_agent.config import ComputeSettings
from edge_agent.incoming import STEP_WAIT_S
from edge_agent.journal import TRIAL_DEATHS
from edge_agent.ledger import REPEAT_S
from edge_agent.self_test import Outcome
from edge_agent.slots import SlotStore
from edge_agent.update_host import Policy
from edge_agent.updater import Updater
from tests.test_bundle import FILES, PLAIN
from wire.bundle import Bundle, Manifest, build_bundle
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.messages import (
    ChunkHeader,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
    SelfTestReport,
)
from wire.signing import TrustedKeys, build_signature_file, generate_key

CHUNK = 1024
REPORT = SelfTestReport(seconds=0.5, peak_bytes=1000, max_error=0.0)
WANTED, VERIFIED, INSTALLED = RolloutPhase.WANTED, RolloutPhase.VERIFIED, RolloutPhase.INSTALLED
COMMITTED, REFUSED, FAILED = RolloutPhase.COMMITTED, RolloutPhase.REFUSED, RolloutPhase.FAILED
REVERTED, CANCELLED = RolloutPhase.REVERTED, RolloutPhase.CANCELLED
SOAK_S = 30.0


def _bundle(number: int, **fields: Any) -> bytes:
    manifest = msgspec.structs.replace(PLAIN, version=str(number), sequence=number)
    return build_bundle(msgspec.structs.replace(manifest, **fields), FILES)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _offer(data: bytes, campaign: str = "c", **fields: Any) -> RolloutOffer:
    plain = {"soak_s": SOAK_S} if campaign else {"good_steps": 1}
    return RolloutOffer(
        digest=_digest(data),
        size_bytes=len(data),
        chunk_bytes=CHUNK,
        campaign=campaign,
        **{**plain, **fields},
    )


class _Test:
    """Stands in for the process of a self-test."""

    outcome: Outcome | None = Outcome(report=REPORT)

    def __init__(self, job: Any, *, limit_s: float, now_s: float, wake: Any) -> None:
        pass

    def poll(self, now_s: float) -> Outcome | None:
        return _Test.outcome

    def kill(self) -> None:
        pass


class _Host:
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


class _Device:
    """An updater over a directory, and what the coordinator does to it."""

    def __init__(self, directory: Path, trust: TrustedKeys | None = None) -> None:
        self.directory = directory
        self.trust = trust
        self.now_s = 1000.0
        self.restart()

    def restart(self, *, clean: bool = False, unusable: set[str] | None = None) -> None:
        if clean:
            self.updater.stop()
        self.host = _Host()
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
            header = ChunkHeader(digest=_digest(data), offset_bytes=offset, size_bytes=len(data))
            chunk = data[offset : offset + CHUNK]
            self.updater.chunk(header, chunk, shared=shared, now_s=self.now_s)

    def tick(self, seconds: float = 0.0, *, mid_step: bool = False) -> None:
        self.now_s += seconds
        self.updater.tick(self.now_s, mid_step=mid_step)

    def update(self, data: bytes, campaign: str = "c", **fields: Any) -> None:
        """Offer, download, self-test, installation."""
        self.offer(_offer(data, campaign, **fields))
        self.send(data)
        self.tick()

    def commit(self, data: bytes, campaign: str = "c") -> None:
        self.update(data, campaign)
        self.tick(SOAK_S)
        assert self.last.phase is COMMITTED

    def cancel(self, data: bytes, campaign: str = "c", **fields: Any) -> None:
        message = RolloutCancel(digest=_digest(data), campaign=campaign, **fields)
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


@pytest.fixture(autouse=True)
def passing_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.incoming, "SelfTest", _Test)
    monkeypatch.setattr(_Test, "outcome", Outcome(report=REPORT))


@pytest.fixture
def device(tmp_path: Path) -> _Device:
    return _Device(tmp_path)


ONE, TWO, THREE = _bundle(1), _bundle(2), _bundle(3)


def test_campaign_goes_through_its_phases(device: _Device) -> None:
    device.update(ONE)
    assert device.phases == [VERIFIED, INSTALLED]
    assert device.last.self_test == REPORT
    assert (device.in_use, device.updater.committed) == (_digest(ONE), None)
    device.tick(SOAK_S)
    assert device.phases == [VERIFIED, INSTALLED, COMMITTED]
    assert device.last.self_test == REPORT
    assert device.updater.committed == _digest(ONE)
    assert device.host.births == 2
    assert [s.sequence for s in device.host.said if s.phase is not WANTED] == [1, 2, 3]


def test_runs_bundle_is_used_at_once_and_committed_by_its_first_good_step(device: _Device) -> None:
    device.update(ONE, campaign="")
    assert device.in_use == _digest(ONE)
    device.tick(1e6)
    assert device.updater.committed is None
    device.updater.good_step(device.now_s)
    assert device.updater.committed == _digest(ONE)
    assert device.host.births == 1, "a birth in the middle of a step is no help"
    device.tick(REPEAT_S)
    assert device.phases == [INSTALLED, COMMITTED], "a run's statuses are said once"


def test_restarted_device_still_has_its_bundle(device: _Device) -> None:
    device.commit(ONE)
    device.restart()
    assert device.in_use == device.updater.committed == _digest(ONE)


def test_bundle_that_is_in_use_is_not_fetched_again(device: _Device) -> None:
    device.commit(ONE)
    device.offer(_offer(ONE, "other"))
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "other")
    device.offer(_offer(ONE, ""))
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "")
    assert WANTED not in [status.phase for status in device.host.said[-2:]]


def test_bundle_before_is_used_again_without_a_download(device: _Device) -> None:
    device.update(ONE, "")
    device.updater.good_step(device.now_s)
    device.update(TWO, "")
    device.updater.good_step(device.now_s)
    device.host.said.clear()
    device.offer(_offer(ONE, ""))
    device.tick()
    assert device.in_use == _digest(ONE)
    assert [status.phase for status in device.host.said] == [INSTALLED]


def test_shared_chunks_are_taken_in_any_order_and_the_subscription_ends(device: _Device) -> None:
    device.offer(_offer(ONE, shared=True))
    assert device.host.listening == {_digest(ONE)}
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[::-1])
    assert device.host.listening == set()
    assert [s.phase for s in device.host.said] == [WANTED, VERIFIED], "nothing was asked for twice"


def test_missing_shared_chunk_is_asked_for_when_no_more_come(device: _Device) -> None:
    device.offer(_offer(ONE, shared=True))
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[1:])
    device.tick(1.9)
    assert len(device.host.said) == 1
    device.tick(0.2)
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, 0)


def test_download_goes_on_by_itself_after_a_restart(device: _Device) -> None:
    device.offer(_offer(ONE))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.restart()
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, CHUNK)
    device.send(ONE, order=lambda offsets: list(offsets)[1:])
    device.tick()
    assert device.in_use == _digest(ONE)


def test_download_that_takes_too_long_fails_and_says_how_far_it_came(device: _Device) -> None:
    device.offer(_offer(ONE, download_limit_s=5.0))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.tick(5.0)
    assert device.last.phase is FAILED
    assert f"{CHUNK} of {len(ONE)} bytes came" in device.last.detail
    assert device.store.journal.pending is None


def test_altered_bytes_fail_by_their_digest(device: _Device) -> None:
    device.offer(_offer(ONE))
    wrong = ONE[:-1] + b"X"
    for offset in range(0, len(ONE), CHUNK):
        header = ChunkHeader(digest=_digest(ONE), offset_bytes=offset, size_bytes=len(ONE))
        device.updater.chunk(
            header, wrong[offset : offset + CHUNK], shared=False, now_s=device.now_s
        )
    assert device.last.phase is FAILED
    assert "expected a bundle with digest" in device.last.detail
    assert device.in_use is None


def test_part_that_a_power_cut_has_spoiled_is_fetched_once_more(device: _Device) -> None:
    device.offer(_offer(ONE))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.store.part.path.write_bytes(b"\0" * CHUNK)
    device.restart()
    device.send(ONE, order=lambda offsets: list(offsets)[1:])
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, 0)
    device.send(ONE)
    device.tick()
    assert device.in_use == _digest(ONE)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"no zip at all" * 200, "expected a whole zip archive"),
        (ONE[:-100], "expected a whole zip archive"),
        (_bundle(9, expires="2025-01-01T00:00:00Z"), "expired on 2025-01-01"),
        (_bundle(9, minimum_agent="99"), "expected agent 99 or later"),
        (_bundle(9, network="foreign"), "not for this device"),
        (_bundle(9, schema=2), "expected schema 1, found 2"),
    ],
    ids=["noise", "truncated", "expired", "agent", "foreign", "schema"],
)
def test_bad_bundle_is_refused_in_words_and_leaves_nothing(
    device: _Device, data: bytes, detail: str
) -> None:
    device.commit(TWO, "before")
    device.update(data)
    assert device.last.phase is REFUSED
    assert detail in device.last.detail
    assert device.in_use == _digest(TWO)
    assert not device.store.part.path.exists()


def test_bundle_beyond_the_devices_limit_is_not_fetched(device: _Device) -> None:
    device.offer(msgspec.structs.replace(_offer(ONE), size_bytes=100_001))
    assert [s.phase for s in device.host.said] == [REFUSED]


def test_older_bundle_is_refused_by_a_campaign_but_not_in_a_lab_run(device: _Device) -> None:
    device.commit(THREE)
    device.update(ONE, "older")
    assert device.last.phase is REFUSED
    assert "older than what this device has had" in device.last.detail
    device.update(ONE, "")
    assert device.in_use == _digest(ONE)


def test_device_with_keys_takes_only_what_they_signed(tmp_path: Path) -> None:
    key = generate_key()
    device = _Device(tmp_path, TrustedKeys((key.public,)))
    device.update(ONE, "")
    assert device.last.phase is REFUSED
    assert "expected a signed bundle" in device.last.detail
    signed = build_bundle(PLAIN, FILES, sign=lambda m: build_signature_file(m, [key]))
    device.update(signed, "")
    assert device.in_use == _digest(signed)


def test_signed_fleet_refuses_an_older_bundle_from_a_run_too(tmp_path: Path) -> None:
    key = generate_key()
    device = _Device(tmp_path, TrustedKeys((key.public,)))

    def sign(number: int) -> bytes:
        manifest = msgspec.structs.replace(PLAIN, sequence=number)
        return build_bundle(manifest, FILES, sign=lambda m: build_signature_file(m, [key]))

    device.commit(sign(2))
    device.update(sign(1), "")
    assert device.last.phase is REFUSED


def test_failed_self_test_leaves_the_bundle_before_in_use(
    device: _Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.commit(ONE, "before")
    monkeypatch.setattr(_Test, "outcome", Outcome(failure="self-test: ended by SIGSEGV"))
    device.update(TWO)
    assert (device.last.phase, device.last.detail) == (FAILED, "self-test: ended by SIGSEGV")
    assert device.in_use == _digest(ONE)


def test_update_waits_for_the_end_of_a_step_and_no_longer(device: _Device) -> None:
    device.commit(ONE, "before")
    device.offer(_offer(TWO))
    device.send(TWO)
    device.tick(mid_step=True)
    device.tick(STEP_WAIT_S - 1, mid_step=True)
    assert device.in_use == _digest(ONE)
    device.tick()
    assert device.in_use == _digest(TWO)
    device.offer(_offer(THREE, "next"))
    device.send(THREE)
    device.tick(mid_step=True)
    device.tick(STEP_WAIT_S, mid_step=True)
    assert device.in_use == _digest(THREE), "a step that never ends must not hold it up"


def test_bundle_that_cannot_be_loaded_is_left_at_once(device: _Device) -> None:
    device.commit(ONE, "before")
    device.host.unusable = {_digest(TWO)}
    device.update(TWO)
    assert (device.last.phase, device.last.detail) == (REVERTED, "cannot be loaded")
    assert device.in_use == _digest(ONE)


def test_failing_pass_ends_a_trial_but_not_a_committed_bundle(device: _Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    assert device.updater.bad_step(ModelError("node 3: out of range"))
    assert device.last.phase is REVERTED
    assert "node 3: out of range" in device.last.detail
    assert device.in_use == _digest(ONE)
    assert not device.updater.bad_step(ModelError("again"))


def test_trial_that_takes_too_long_is_given_up(device: _Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO, good_steps=5, soak_s=0.0, commit_limit_s=60.0)
    device.updater.good_step(device.now_s)
    device.tick(60.0)
    assert device.last.phase is REVERTED
    assert "not committed within 60 s: 1 good steps" in device.last.detail
    assert device.in_use == _digest(ONE)


def test_crash_loop_on_trial_goes_back_and_the_campaign_hears_of_it(device: _Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    for _ in range(TRIAL_DEATHS - 1):
        device.restart()
        assert device.in_use == _digest(TWO)
    device.restart()
    assert device.in_use == device.updater.committed == _digest(ONE)
    assert (device.last.phase, device.last.campaign) == (REVERTED, "c")
    assert "died 3 times" in device.last.detail


def test_runs_bundle_that_killed_the_agent_is_not_taken_from_the_run_again(
    device: _Device,
) -> None:
    device.update(ONE, "")
    for _ in range(TRIAL_DEATHS):
        device.restart()
    assert device.in_use is None
    device.offer(_offer(ONE, ""))
    assert device.last.phase is REFUSED
    assert "died 3 times" in device.last.detail
    device.update(ONE, "on purpose")
    assert device.in_use == _digest(ONE)


def test_clean_restarts_do_not_end_a_trial(device: _Device) -> None:
    device.update(ONE)
    for _ in range(10):
        device.restart(clean=True)
    assert device.in_use == _digest(ONE)
    device.tick(SOAK_S)
    assert device.updater.committed == _digest(ONE)


def test_damaged_file_of_the_bundle_on_trial_leads_back(device: _Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    (device.directory / "b.bundle").write_bytes(b"rot")
    device.restart()
    assert device.in_use == _digest(ONE)
    assert device.last.phase is REVERTED


def test_status_is_said_again_until_it_is_acknowledged_across_restarts(device: _Device) -> None:
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
        RolloutAcknowledge(digest=_digest(ONE), campaign="c", sequence=last.sequence)
    )
    device.restart()
    device.tick(10 * REPEAT_S)
    assert device.host.said == []


def test_nothing_is_repeated_while_offline(device: _Device) -> None:
    device.commit(ONE)
    device.updater.disconnected(device.now_s)
    device.host.said.clear()
    device.tick(10 * REPEAT_S)
    assert device.host.said == []


def test_repeated_offer_changes_nothing_and_is_answered(device: _Device) -> None:
    offer = _offer(ONE)
    device.offer(offer)
    device.offer(offer)
    assert [status.phase for status in device.host.said] == [WANTED]
    device.send(ONE)
    device.tick()
    device.tick(SOAK_S)
    device.updater.acknowledge(
        RolloutAcknowledge(digest=_digest(ONE), campaign="c", sequence=device.last.sequence)
    )
    last = device.last
    device.host.said.clear()
    device.offer(offer)
    assert device.host.said == [last], "the coordinator's account may lack it"


def test_higher_attempt_tries_again_and_a_lower_one_is_late(
    device: _Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Test, "outcome", Outcome(failure="no"))
    device.update(ONE)
    assert device.last.phase is FAILED
    monkeypatch.setattr(_Test, "outcome", Outcome(report=REPORT))
    device.update(ONE, attempt=1)
    assert (device.last.phase, device.last.attempt) == (INSTALLED, 1)
    with pytest.raises(PeerProtocolError) as caught:
        device.offer(_offer(ONE))
    assert caught.value.reason is Refusal.LATE


@pytest.mark.parametrize("revert", [True, False])
def test_cancel_half_way_stops_the_download(device: _Device, *, revert: bool) -> None:
    device.offer(_offer(ONE, shared=True))
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[:1])
    device.cancel(ONE, revert=revert)
    assert device.last.phase is CANCELLED
    assert (device.host.listening, device.store.part.path.exists()) == (set(), False)
    device.restart()
    assert WANTED not in [status.phase for status in device.host.said]


def test_cancel_in_the_self_test_stops_it(device: _Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Test, "outcome", None)
    device.update(ONE)
    device.cancel(ONE)
    monkeypatch.setattr(_Test, "outcome", Outcome(report=REPORT))
    device.tick(1.0)
    assert device.last.phase is CANCELLED
    assert device.in_use is None


def test_cancel_that_keeps_lets_a_trial_go_on(device: _Device) -> None:
    device.update(ONE)
    device.cancel(ONE)
    assert device.last.phase is INSTALLED
    device.tick(SOAK_S)
    assert device.last.phase is COMMITTED


@pytest.mark.parametrize("committed", [True, False])
def test_cancel_that_reverts_leads_to_the_bundle_before(
    device: _Device, *, committed: bool
) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    if committed:
        device.tick(SOAK_S)
    device.cancel(TWO, revert=True)
    assert device.last.phase is REVERTED
    assert device.in_use == device.updater.committed == _digest(ONE)
    device.cancel(TWO, revert=True)
    assert device.last.phase is REVERTED
    assert device.in_use == _digest(ONE), "one step back, not two"


def test_revert_of_a_bundle_that_is_in_use_no_longer_is_true(device: _Device) -> None:
    device.commit(ONE)
    device.commit(TWO, "later")
    device.cancel(ONE, revert=True)
    assert (device.last.phase, device.last.campaign) == (REVERTED, "c")
    assert device.in_use == _digest(TWO)


def test_late_cancel_does_not_stop_the_attempt_that_followed(device: _Device) -> None:
    device.offer(_offer(ONE))
    device.cancel(ONE, revert=True, attempt=0)
    device.offer(_offer(ONE, attempt=1))
    with pytest.raises(PeerProtocolError) as caught:  # repeated by the broker or by a client
        device.cancel(ONE, revert=True, attempt=0)
    assert caught.value.reason is Refusal.LATE
    device.offer(_offer(ONE, attempt=1))
    device.send(ONE)
    device.tick()
    assert (device.last.phase, device.last.attempt) == (INSTALLED, 1)
    with pytest.raises(PeerProtocolError):
        device.cancel(ONE, revert=True, attempt=0)
    assert device.in_use == _digest(ONE)
    device.cancel(ONE, revert=True, attempt=1)
    assert (device.last.phase, device.last.attempt) == (REVERTED, 1)


def test_cancel_that_comes_before_its_offer_is_answered_and_ends_it(device: _Device) -> None:
    device.offer(_offer(ONE))
    device.cancel(ONE, attempt=0)
    device.cancel(ONE, attempt=1)
    assert (device.last.phase, device.last.attempt) == (CANCELLED, 1)
    device.offer(_offer(ONE, attempt=1))
    assert (device.last.phase, device.last.attempt) == (CANCELLED, 1)
    assert device.updater.committed is None
    device.tick()
    assert device.in_use is None


def test_cancel_of_what_never_came_is_answered(device: _Device) -> None:
    device.cancel(ONE, "unheard")
    assert (device.last.phase, device.last.campaign) == (CANCELLED, "unheard")


def test_next_campaign_replaces_one_under_way_and_both_hear_of_it(device: _Device) -> None:
    device.offer(_offer(ONE, "first"))
    device.offer(_offer(TWO, "second"))
    ended = [s for s in device.host.said if s.campaign == "first" and s.phase is CANCELLED]
    assert [s.detail for s in ended] == ["replaced by rollout second"]
    device.send(TWO)
    device.tick()
    device.update(THREE, "third")
    ended = [s for s in device.host.said if s.campaign == "second" and s.phase is REVERTED]
    assert [s.detail for s in ended] == ["replaced by rollout third"]
    assert device.in_use == _digest(THREE)


def test_run_does_not_disturb_a_campaign(device: _Device) -> None:
    device.offer(_offer(ONE))
    device.offer(_offer(TWO, ""))
    assert device.last.phase is REFUSED
    device.send(ONE)
    device.tick()
    device.offer(_offer(TWO, ""))
    assert device.last.phase is REFUSED
    assert device.in_use == _digest(ONE)
    device.tick(SOAK_S)
    device.update(TWO, "")
    assert device.in_use == _digest(TWO)


def test_end_of_a_campaign_makes_a_run_offer_its_bundle_again(device: _Device) -> None:
    device.offer(_offer(ONE))
    births = device.host.births
    device.cancel(ONE)
    assert device.host.births == births + 1
    device.offer(msgspec.structs.replace(_offer(TWO, ""), size_bytes=100_001))
    assert device.last.phase is REFUSED
    assert device.host.births == births + 1, "a birth would bring the run's offer again"


def test_campaign_takes_over_the_trial_of_a_run_with_the_same_bundle(device: _Device) -> None:
    device.update(ONE, "")
    device.offer(_offer(ONE))
    assert (device.last.phase, device.last.campaign) == (INSTALLED, "c")
    device.tick(SOAK_S)
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "c")


def test_offer_of_the_bundle_before_ends_a_trial(device: _Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO, "trial")
    device.offer(_offer(ONE, "back"))
    assert device.in_use == device.updater.committed == _digest(ONE)
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "back")


def test_full_disk_ends_the_update_and_not_the_agent(
    device: _Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.commit(ONE, "before")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    device.offer(_offer(TWO))
    monkeypatch.setattr(device.store.part, "add", full)
    device.send(TWO, order=lambda offsets: list(offsets)[:1])
    assert device.last.phase is FAILED
    assert "No space left on device" in device.last.detail
    assert device.in_use == _digest(ONE)


def test_chunk_that_nobody_asked_for_is_dropped(device: _Device) -> None:
    with pytest.raises(PeerProtocolError) as caught:
        device.send(ONE)
    assert caught.value.reason is Refusal.EARLY
