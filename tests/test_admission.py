"""Which bundles a device takes: size, age, expiry, agent version, and who asks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from edge_agent.admission import check_manifest, check_offer
from edge_agent.journal import Journal
from tests.test_bundle import PLAIN
from wire.errors import ModelError
from wire.messages import RolloutOffer

NOW = datetime(2025, 6, 1, tzinfo=UTC)
LIMIT = 10_000


def _offer(campaign: str = "c", **fields: Any) -> RolloutOffer:
    plain = {"digest": "1" * 64, "size_bytes": 5_000, "chunk_bytes": 1_000, "campaign": campaign}
    return RolloutOffer(**{**plain, **fields})


def _check(
    journal: Journal | None = None,
    *,
    check_sequence: bool = True,
    now: datetime = NOW,
    **fields: Any,
) -> None:
    manifest = msgspec.structs.replace(PLAIN, **fields)
    check_manifest(
        manifest,
        journal or Journal(),
        now=now,
        agent_version="0.4.1rc2",
        check_sequence=check_sequence,
    )


def test_offer_within_the_limits_is_taken() -> None:
    check_offer(_offer(size_bytes=LIMIT), Journal(), max_bundle_bytes=LIMIT)


def test_offer_beyond_the_devices_limit_is_not_even_fetched() -> None:
    with pytest.raises(ModelError, match="at most 10000 bytes, offered 10001"):
        check_offer(_offer(size_bytes=LIMIT + 1), Journal(), max_bundle_bytes=LIMIT)


def test_offer_in_millions_of_chunks_is_refused() -> None:
    offer = _offer(size_bytes=70_000, chunk_bytes=1)
    with pytest.raises(ModelError, match="at most 65536 chunks"):
        check_offer(offer, Journal(), max_bundle_bytes=10**9)


def test_run_cannot_bring_a_bundle_again_that_failed_here_but_a_campaign_can() -> None:
    journal = Journal(blocked={"1" * 64: "the agent died 3 times with it on trial"})
    with pytest.raises(ModelError, match="died 3 times with it on trial; only a rollout"):
        check_offer(_offer(""), journal, max_bundle_bytes=LIMIT)
    check_offer(_offer(), journal, max_bundle_bytes=LIMIT)


@pytest.mark.parametrize("field", ["pending", "trial"])
def test_campaign_under_way_is_not_disturbed_by_a_run(field: str) -> None:
    journal = Journal(**{field: _offer("spring", digest="2" * 64)})
    with pytest.raises(ModelError, match=r"busy .* of rollout spring"):
        check_offer(_offer(""), journal, max_bundle_bytes=LIMIT)
    check_offer(_offer("other"), journal, max_bundle_bytes=LIMIT)


def test_run_replaces_the_bundle_of_another_run_on_trial() -> None:
    check_offer(_offer(""), Journal(trial=_offer("", digest="2" * 64)), max_bundle_bytes=LIMIT)


def test_bundle_without_expiry_never_expires() -> None:
    _check(now=NOW + timedelta(days=36_500))


def test_expired_bundle_is_refused_from_that_moment_on() -> None:
    expires = "2025-06-01T00:00:00+00:00"
    _check(expires=expires, now=NOW - timedelta(seconds=1))
    with pytest.raises(ModelError, match="digits 3: expired on 2025-06-01"):
        _check(expires=expires)


def test_clock_that_was_never_set_expires_nothing() -> None:
    _check(expires="2025-06-01T00:00:00Z", now=datetime(1970, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("field", ["created", "expires"])
def test_time_that_is_none_is_named(field: str) -> None:
    fields = {"expires": "2026-01-01T00:00:00Z", field: "soon"}
    with pytest.raises(ModelError, match=f"{field}: expected a time, found 'soon'"):
        _check(**fields)


@pytest.mark.parametrize("minimum", ["", "0.4", "0.4.1", "0.3.9"])
def test_agent_that_is_new_enough_takes_it(minimum: str) -> None:
    _check(minimum_agent=minimum)


@pytest.mark.parametrize("minimum", ["0.4.2", "0.5", "1", "0.10"])
def test_agent_that_is_too_old_says_so(minimum: str) -> None:
    with pytest.raises(ModelError, match=f"expected agent {minimum} or later, this is 0.4.1rc2"):
        _check(minimum_agent=minimum)


def test_older_bundle_of_the_same_name_is_refused_for_ever() -> None:
    journal = Journal(highest={"digits": 7})
    _check(journal, sequence=7)
    _check(journal, sequence=8)
    with pytest.raises(ModelError, match="expected sequence 7 or higher, found 6"):
        _check(journal, sequence=6)
    _check(Journal(highest={"other": 7}), sequence=6)


def test_run_in_a_lab_may_go_back_to_an_older_bundle() -> None:
    _check(Journal(highest={"digits": 7}), sequence=6, check_sequence=False)
