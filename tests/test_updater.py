"""The device's side of a rollout: every end that an update can have, and restarts in between."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import edge_agent.incoming
from edge_agent.incoming import STEP_WAIT_S
from edge_agent.journal import TRIAL_DEATHS
from edge_agent.ledger import REPEAT_S
from edge_agent.self_test import Outcome
from tests.test_bundle import FILES, PLAIN
from tests.updated_device import (
    CHUNK,
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
    VERIFIED,
    WANTED,
    Device,
    StandInTest,
    digest_of,
    numbered_bundle,
    offer_of,
)
from wire.bundle import build_bundle
from wire.errors import ModelError
from wire.messages import ChunkHeader
from wire.signing import TrustedKeys, build_signature_file, generate_key


@pytest.fixture(autouse=True)
def passing_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.incoming, "SelfTest", StandInTest)
    monkeypatch.setattr(StandInTest, "outcome", Outcome(report=REPORT))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_campaign_goes_through_its_phases(device: Device) -> None:
    device.update(ONE)
    assert device.phases == [VERIFIED, INSTALLED]
    assert device.last.self_test == REPORT
    assert (device.in_use, device.updater.committed) == (digest_of(ONE), None)
    device.tick(SOAK_S)
    assert device.phases == [VERIFIED, INSTALLED, COMMITTED]
    assert device.last.self_test == REPORT
    assert device.updater.committed == digest_of(ONE)
    assert device.host.births == 2
    assert [s.sequence for s in device.host.said if s.phase is not WANTED] == [1, 2, 3]


def test_runs_bundle_is_used_at_once_and_committed_by_its_first_good_step(device: Device) -> None:
    device.update(ONE, campaign="")
    assert device.in_use == digest_of(ONE)
    device.tick(1e6)
    assert device.updater.committed is None
    device.updater.good_step(device.now_s)
    assert device.updater.committed == digest_of(ONE)
    assert device.host.births == 1, "a birth in the middle of a step is no help"
    device.tick(REPEAT_S)
    assert device.phases == [INSTALLED, COMMITTED], "a run's statuses are said once"


def test_restarted_device_still_has_its_bundle(device: Device) -> None:
    device.commit(ONE)
    device.restart()
    assert device.in_use == device.updater.committed == digest_of(ONE)


def test_bundle_that_is_in_use_is_not_fetched_again(device: Device) -> None:
    device.commit(ONE)
    device.offer(offer_of(ONE, "other"))
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "other")
    device.offer(offer_of(ONE, ""))
    assert (device.last.phase, device.last.campaign) == (COMMITTED, "")
    assert WANTED not in [status.phase for status in device.host.said[-2:]]


def test_bundle_before_is_used_again_without_a_download(device: Device) -> None:
    device.update(ONE, "")
    device.updater.good_step(device.now_s)
    device.update(TWO, "")
    device.updater.good_step(device.now_s)
    device.host.said.clear()
    device.offer(offer_of(ONE, ""))
    device.tick()
    assert device.in_use == digest_of(ONE)
    assert [status.phase for status in device.host.said] == [INSTALLED]


def test_shared_chunks_are_taken_in_any_order_and_the_subscription_ends(device: Device) -> None:
    device.offer(offer_of(ONE, shared=True))
    assert device.host.listening == {digest_of(ONE)}
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[::-1])
    assert device.host.listening == set()
    assert [s.phase for s in device.host.said] == [WANTED, VERIFIED], "nothing was asked for twice"


def test_missing_shared_chunk_is_asked_for_when_no_more_come(device: Device) -> None:
    device.offer(offer_of(ONE, shared=True))
    device.send(ONE, shared=True, order=lambda offsets: list(offsets)[1:])
    device.tick(1.9)
    assert len(device.host.said) == 1
    device.tick(0.2)
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, 0)


def test_download_goes_on_by_itself_after_a_restart(device: Device) -> None:
    device.offer(offer_of(ONE))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.restart()
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, CHUNK)
    device.send(ONE, order=lambda offsets: list(offsets)[1:])
    device.tick()
    assert device.in_use == digest_of(ONE)


def test_download_that_takes_too_long_fails_and_says_how_far_it_came(device: Device) -> None:
    device.offer(offer_of(ONE, download_limit_s=5.0))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.tick(5.0)
    assert device.last.phase is FAILED
    assert f"{CHUNK} of {len(ONE)} bytes came" in device.last.detail
    assert device.store.journal.pending is None


def test_altered_bytes_fail_by_their_digest(device: Device) -> None:
    device.offer(offer_of(ONE))
    wrong = ONE[:-1] + b"X"
    for offset in range(0, len(ONE), CHUNK):
        header = ChunkHeader(digest=digest_of(ONE), offset_bytes=offset, size_bytes=len(ONE))
        device.updater.chunk(
            header, wrong[offset : offset + CHUNK], shared=False, now_s=device.now_s
        )
    assert device.last.phase is FAILED
    assert "expected a bundle with digest" in device.last.detail
    assert device.in_use is None


def test_part_that_a_power_cut_has_spoiled_is_fetched_once_more(device: Device) -> None:
    device.offer(offer_of(ONE))
    device.send(ONE, order=lambda offsets: list(offsets)[:1])
    device.store.part.path.write_bytes(b"\0" * CHUNK)
    device.restart()
    device.send(ONE, order=lambda offsets: list(offsets)[1:])
    assert (device.last.phase, device.last.offset_bytes) == (WANTED, 0)
    device.send(ONE)
    device.tick()
    assert device.in_use == digest_of(ONE)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"no zip at all" * 200, "expected a whole zip archive"),
        (ONE[:-100], "expected a whole zip archive"),
        (numbered_bundle(9, expires="2025-01-01T00:00:00Z"), "expired on 2025-01-01"),
        (numbered_bundle(9, minimum_agent="99"), "expected agent 99 or later"),
        (numbered_bundle(9, network="foreign"), "not for this device"),
        (numbered_bundle(9, schema=2), "expected schema 1, found 2"),
    ],
    ids=["noise", "truncated", "expired", "agent", "foreign", "schema"],
)
def test_bad_bundle_is_refused_in_words_and_leaves_nothing(
    device: Device, data: bytes, detail: str
) -> None:
    device.commit(TWO, "before")
    device.update(data)
    assert device.last.phase is REFUSED
    assert detail in device.last.detail
    assert device.in_use == digest_of(TWO)
    assert not device.store.part.path.exists()


def test_bundle_beyond_the_devices_limit_is_not_fetched(device: Device) -> None:
    device.offer(msgspec.structs.replace(offer_of(ONE), size_bytes=100_001))
    assert [s.phase for s in device.host.said] == [REFUSED]


def test_older_bundle_is_refused_by_a_campaign_but_not_in_a_lab_run(device: Device) -> None:
    device.commit(THREE)
    device.update(ONE, "older")
    assert device.last.phase is REFUSED
    assert "older than what this device has had" in device.last.detail
    device.update(ONE, "")
    assert device.in_use == digest_of(ONE)


def test_device_with_keys_takes_only_what_they_signed(tmp_path: Path) -> None:
    key = generate_key()
    device = Device(tmp_path, TrustedKeys((key.public,)))
    device.update(ONE, "")
    assert device.last.phase is REFUSED
    assert "expected a signed bundle" in device.last.detail
    signed = build_bundle(PLAIN, FILES, sign=lambda m: build_signature_file(m, [key]))
    device.update(signed, "")
    assert device.in_use == digest_of(signed)


def test_signed_fleet_refuses_an_older_bundle_from_a_run_too(tmp_path: Path) -> None:
    key = generate_key()
    device = Device(tmp_path, TrustedKeys((key.public,)))

    def sign(number: int) -> bytes:
        manifest = msgspec.structs.replace(PLAIN, sequence=number)
        return build_bundle(manifest, FILES, sign=lambda m: build_signature_file(m, [key]))

    device.commit(sign(2))
    device.update(sign(1), "")
    assert device.last.phase is REFUSED


def test_failed_self_test_leaves_the_bundle_before_in_use(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.commit(ONE, "before")
    monkeypatch.setattr(StandInTest, "outcome", Outcome(failure="self-test: ended by SIGSEGV"))
    device.update(TWO)
    assert (device.last.phase, device.last.detail) == (FAILED, "self-test: ended by SIGSEGV")
    assert device.in_use == digest_of(ONE)


def test_update_waits_for_the_end_of_a_step_and_no_longer(device: Device) -> None:
    device.commit(ONE, "before")
    device.offer(offer_of(TWO))
    device.send(TWO)
    device.tick(mid_step=True)
    device.tick(STEP_WAIT_S - 1, mid_step=True)
    assert device.in_use == digest_of(ONE)
    device.tick()
    assert device.in_use == digest_of(TWO)
    device.offer(offer_of(THREE, "next"))
    device.send(THREE)
    device.tick(mid_step=True)
    device.tick(STEP_WAIT_S, mid_step=True)
    assert device.in_use == digest_of(THREE), "a step that never ends must not hold it up"


def test_bundle_that_cannot_be_loaded_is_left_at_once(device: Device) -> None:
    device.commit(ONE, "before")
    device.host.unusable = {digest_of(TWO)}
    device.update(TWO)
    assert (device.last.phase, device.last.detail) == (REVERTED, "cannot be loaded")
    assert device.in_use == digest_of(ONE)


def test_failing_pass_ends_a_trial_but_not_a_committed_bundle(device: Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    assert device.updater.bad_step(ModelError("node 3: out of range"))
    assert device.last.phase is REVERTED
    assert "node 3: out of range" in device.last.detail
    assert device.in_use == digest_of(ONE)
    assert not device.updater.bad_step(ModelError("again"))


def test_trial_that_takes_too_long_is_given_up(device: Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO, good_steps=5, soak_s=0.0, commit_limit_s=60.0)
    device.updater.good_step(device.now_s)
    device.tick(60.0)
    assert device.last.phase is REVERTED
    assert "not committed within 60 s: 1 good steps" in device.last.detail
    assert device.in_use == digest_of(ONE)


def test_crash_loop_on_trial_goes_back_and_the_campaign_hears_of_it(device: Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    for _ in range(TRIAL_DEATHS - 1):
        device.restart()
        assert device.in_use == digest_of(TWO)
    device.restart()
    assert device.in_use == device.updater.committed == digest_of(ONE)
    assert (device.last.phase, device.last.campaign) == (REVERTED, "c")
    assert "died 3 times" in device.last.detail


def test_runs_bundle_that_killed_the_agent_is_not_taken_from_the_run_again(
    device: Device,
) -> None:
    device.update(ONE, "")
    for _ in range(TRIAL_DEATHS):
        device.restart()
    assert device.in_use is None
    device.offer(offer_of(ONE, ""))
    assert device.last.phase is REFUSED
    assert "died 3 times" in device.last.detail
    device.update(ONE, "on purpose")
    assert device.in_use == digest_of(ONE)


def test_clean_restarts_do_not_end_a_trial(device: Device) -> None:
    device.update(ONE)
    for _ in range(10):
        device.restart(clean=True)
    assert device.in_use == digest_of(ONE)
    device.tick(SOAK_S)
    assert device.updater.committed == digest_of(ONE)


def test_damaged_file_of_the_bundle_on_trial_leads_back(device: Device) -> None:
    device.commit(ONE, "before")
    device.update(TWO)
    (device.directory / "b.bundle").write_bytes(b"rot")
    device.restart()
    assert device.in_use == digest_of(ONE)
    assert device.last.phase is REVERTED
