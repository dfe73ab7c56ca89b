"""What a device knows about its bundles, and how that changes."""

from __future__ import annotations

import random

import msgspec
import pytest

from edge_agent import journal as journals
from edge_agent.journal import COMMITTED_DEATHS, TRIAL_DEATHS, Journal, SlotName, SlotRecord
from wire.messages import RolloutOffer, RolloutPhase, SelfTestReport


def _record(number: int, sequence: int | None = None) -> SlotRecord:
    return SlotRecord(
        digest=f"{number:064x}",
        name="net",
        version=str(number),
        sequence=number if sequence is None else sequence,
    )


def _offer(number: int, campaign: str = "c") -> RolloutOffer:
    return RolloutOffer(digest=f"{number:064x}", size_bytes=1, chunk_bytes=1, campaign=campaign)


def _installed(journal: Journal, number: int, campaign: str = "c") -> Journal:
    return journals.install(journal, _offer(number, campaign), _record(number))


def _committed(*numbers: int) -> Journal:
    journal = Journal()
    for number in numbers:
        journal = journals.commit(_installed(journal, number))
    return journal


def test_new_bundle_never_goes_over_the_one_to_go_back_to() -> None:
    journal = _committed(1)
    trial = _installed(journal, 2)
    assert trial.in_use == _record(2)
    assert trial.committed == _record(1)
    replaced = _installed(trial, 3)
    assert (replaced.in_use, replaced.committed) == (_record(3), _record(1))
    assert journals.revert(replaced).in_use == _record(1)


def test_any_history_leaves_the_last_committed_bundle_in_a_slot() -> None:
    rng = random.Random(5)
    journal, last_good = Journal(), None
    for number in range(1, 500):
        action = rng.choice(["install", "commit", "revert"])
        if action == "install":
            journal = _installed(journal, number)
        elif action == "commit" and journal.trial is not None:
            journal = journals.commit(journal)
            last_good = journal.in_use
        elif action == "revert" and journal.trial is not None:
            journal = journals.revert(journal, blocked_for="why")
            assert journal.in_use == last_good
        assert journal.committed == last_good
        assert journal.last_good != journal.active or journal.active is None
        assert len(journal.slots) <= 2


def test_revert_on_request_leads_to_the_bundle_before_and_no_further() -> None:
    journal = journals.revert(_committed(1, 2, 3))
    assert journal.in_use == journal.committed == _record(2)
    assert journals.revert(journal).in_use is None


def test_first_bundle_can_be_left_for_none() -> None:
    journal = journals.revert(_installed(Journal(), 1))
    assert (journal.in_use, journal.slots) == (None, {})


def test_highest_sequence_stays_when_the_bundle_is_left() -> None:
    journal = journals.revert(_committed(1, 7))
    assert journal.highest == {"net": 7}
    assert _committed(7, 1).highest == {"net": 7}


def test_bundle_on_trial_is_given_up_after_three_deaths() -> None:
    journal = _installed(_committed(1), 2)
    reasons = []
    for _ in range(TRIAL_DEATHS):
        journal, reason = journals.start(journal)
        reasons.append(reason)
    assert reasons == ["", "", f"the agent died {TRIAL_DEATHS} times with it on trial"]


def test_clean_stops_are_no_deaths() -> None:
    journal = _installed(_committed(1), 2)
    for _ in range(10):
        journal, reason = journals.start(journals.stop(journal))
        assert (reason, journal.deaths) == ("", 0)


def test_committed_bundle_is_left_only_for_quick_deaths_in_a_row() -> None:
    journal = _committed(1, 2)
    for _ in range(20):
        journal, reason = journals.start(journal)
        assert reason == ""
        journal = journals.survive(journal)
    for _ in range(COMMITTED_DEATHS - 1):
        journal, reason = journals.start(journal)
        assert reason == ""
    assert "in a row" in journals.start(journal)[1]


def test_surviving_a_while_does_not_clear_a_bundle_on_trial() -> None:
    journal, _ = journals.start(_installed(_committed(1), 2))
    assert journals.survive(journal).deaths == 1


def test_committed_bundle_without_one_before_it_stays_whatever_happens() -> None:
    journal = _committed(1)
    for _ in range(20):
        journal, reason = journals.start(journal)
        assert reason == ""


def test_status_is_owed_until_its_number_is_acknowledged() -> None:
    status = journals.build_status(_offer(1), RolloutPhase.VERIFIED)
    journal = journals.note(Journal(), status)
    journal = journals.note(journal, msgspec.structs.replace(status, phase=RolloutPhase.FAILED))
    (owed,) = journal.owed
    assert (owed.phase, owed.sequence) == (RolloutPhase.FAILED, 2)
    assert journals.acknowledge(journal, "c", 1).owed == (owed,)
    assert journals.acknowledge(journal, "other", 2).owed == (owed,)
    journal = journals.acknowledge(journal, "c", 2)
    assert journal.owed == ()
    assert journals.owe_again(journal, "c").owed == (owed,)


def test_self_test_report_stays_with_later_statuses_of_the_attempt() -> None:
    report = SelfTestReport(seconds=1.0, peak_bytes=5)
    installed = journals.build_status(_offer(1), RolloutPhase.INSTALLED, self_test=report)
    committed = journals.build_status(_offer(1), RolloutPhase.COMMITTED)
    journal = journals.note(journals.note(Journal(), installed), committed)
    assert journal.owed[0].self_test == report
    again = msgspec.structs.replace(committed, attempt=1)
    assert journals.note(journal, again).owed[0].self_test is None


def test_end_of_one_campaign_leaves_another_one_pending() -> None:
    journal = journals.expect(Journal(), _offer(2, "new"))
    ended = journals.build_status(_offer(1, "old"), RolloutPhase.REVERTED)
    journal = journals.note(journal, ended)
    assert journal.pending == _offer(2, "new")
    failed = journals.build_status(_offer(2, "new"), RolloutPhase.FAILED)
    assert journals.note(journal, failed).pending is None


def test_memory_of_campaigns_and_blocks_is_bounded() -> None:
    journal = Journal()
    for number in range(100):
        journal = _installed(journal, number, f"c{number}")
        journal = journals.revert(journal, blocked_for="why")
        status = journals.build_status(_offer(number, f"c{number}"), RolloutPhase.REVERTED)
        journal = journals.note(journal, status)
    assert len(journal.records) == journals.KEPT_RECORDS
    assert len(journal.blocked) == journals.KEPT_BLOCKS
    assert _record(99).digest in journal.blocked


def test_campaign_lifts_a_block() -> None:
    journal = journals.revert(_installed(Journal(), 1), blocked_for="why")
    assert journals.expect(journal, _offer(1)).blocked == {}


@pytest.mark.parametrize("slot", list(SlotName))
def test_journal_survives_being_written(slot: SlotName) -> None:
    journal = journals.forget(journals.expect(_installed(_committed(1), 2), _offer(3)), slot)
    assert msgspec.json.decode(msgspec.json.encode(journal), type=Journal) == journal
