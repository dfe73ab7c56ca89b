"""A campaign in memory: what operators order, what devices report, and starts after a kill."""

from __future__ import annotations

import pytest

from coordinator.rollout.campaign import SETTLE_S, CampaignError
from coordinator.rollout.device_care import REPEAT_S
from coordinator.rollout.records import (
    CampaignPhase,
    DevicePhase,
)
from tests.campaigns import STAGES, Trial


def _two_of_four_failed() -> Trial:
    """A campaign whose only wave is over, with the first two of its order failed."""
    trial = Trial(4, waves="100%", max_failed=0.5, soak_s=0)
    trial.tick()
    for name in trial.order[:2]:
        trial.say(name, DevicePhase.FAILED, "disk full")
    trial.commit(*trial.order[2:])
    trial.tick()
    return trial


class TestOrders:
    def test_pause_offers_nothing_and_lets_go_on_what_has_begun(self) -> None:
        trial = Trial(4, waves="1,100%", soak_s=0)
        trial.tick()
        trial.take(trial.campaign.pause(trial.now_s))
        trial.commit_offered()
        trial.tick(5000.0)
        assert trial.campaign.record.phase is CampaignPhase.PAUSED
        assert trial.counts == {"committed": 1, "planned": 3}
        trial.take(trial.campaign.resume(trial.now_s))
        trial.tick()
        assert len(trial.offered) == 4

    def test_abort_keep_leaves_what_is_in_use(self) -> None:
        trial = Trial(4, waves="100%")
        trial.tick()
        committed, on_trial, loading, asked = trial.order
        trial.commit(committed)
        for phase in STAGES[:3]:
            trial.say(on_trial, phase)
        trial.say(loading, DevicePhase.DOWNLOADING)
        trial.take(trial.campaign.abort(trial.now_s, revert=False))
        assert sorted(trial.cancelled) == sorted([(loading, False), (asked, False)])
        trial.say(loading, DevicePhase.CANCELLED)
        trial.say(asked, DevicePhase.CANCELLED)
        assert trial.campaign.record.phase is CampaignPhase.ABORTING
        trial.say(on_trial, DevicePhase.COMMITTED)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED
        assert trial.counts == {"committed": 2, "cancelled": 2}

    def test_abort_can_be_hardened_to_a_revert(self) -> None:
        trial = Trial(2, waves="100%")
        trial.tick()
        trial.commit(trial.order[0])
        trial.take(trial.campaign.abort(trial.now_s, revert=False))
        trial.take(trial.campaign.abort(trial.now_s, revert=True))
        assert (trial.order[0], True) in trial.cancelled
        for name in trial.order:
            trial.say(name, DevicePhase.REVERTED)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED

    def test_device_that_was_faster_than_the_abort_keeps_or_goes_back(self) -> None:
        for revert, phase in ((False, DevicePhase.COMMITTED), (True, DevicePhase.CANCELLING)):
            trial = Trial(1, waves="100%")
            trial.tick()
            trial.say(trial.order[0], DevicePhase.TESTING)
            trial.take(trial.campaign.abort(trial.now_s, revert=revert))
            trial.say(trial.order[0], DevicePhase.COMMITTED)
            assert trial.phase(trial.order[0]) is phase

    def test_rollback_calls_the_bundle_back(self) -> None:
        trial = Trial(3, waves="100%", soak_s=0)
        trial.finish()
        trial.take(trial.campaign.roll_back(trial.now_s))
        assert sorted(trial.cancelled) == [(name, True) for name in sorted(trial.order)]
        for name in trial.order:
            trial.say(name, DevicePhase.REVERTED)
        assert trial.campaign.record.phase is CampaignPhase.ROLLED_BACK

    def test_rollback_reaches_a_device_that_was_away(self) -> None:
        trial = Trial(2, waves="100%", soak_s=0, limits={"offered_s": 100})
        trial.finish()
        trial.leave(trial.order[0])
        trial.take(trial.campaign.roll_back(trial.now_s))
        trial.say(trial.order[1], DevicePhase.REVERTED)
        trial.tick(101.0)
        assert trial.phase(trial.order[0]) is DevicePhase.TIMED_OUT
        assert trial.campaign.record.phase is CampaignPhase.ROLLED_BACK
        trial.cancelled.clear()
        trial.now_s += 9999.0
        trial.come(trial.order[0])
        assert trial.cancelled == [(trial.order[0], True)]
        trial.say(trial.order[0], DevicePhase.REVERTED)
        assert trial.counts == {"reverted": 2}

    def test_commit_that_comes_after_a_revert_is_called_back(self) -> None:
        trial = Trial(1, waves="100%", limits={"offered_s": 100})
        trial.tick()
        trial.say(trial.order[0], DevicePhase.DOWNLOADING)
        trial.leave(trial.order[0])
        trial.take(trial.campaign.abort(trial.now_s, revert=True))
        trial.tick(101.0)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED
        trial.come(trial.order[0])
        trial.cancelled.clear()
        trial.say(trial.order[0], DevicePhase.COMMITTED)
        assert trial.cancelled == [(trial.order[0], True)]
        assert trial.campaign.record.phase is CampaignPhase.ABORTING
        trial.say(trial.order[0], DevicePhase.REVERTED)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED

    def test_retry_offers_again_to_those_that_failed(self) -> None:
        trial = _two_of_four_failed()
        failed = trial.order[:2]
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED
        trial.take(trial.campaign.retry(trial.now_s))
        trial.tick()
        assert trial.offered == [*trial.order, *failed]
        assert {trial.attempts[name] for name in failed} == {1}
        trial.say(failed[0], DevicePhase.FAILED, "an old report", attempt=0, sequence=99)
        assert trial.phase(failed[0]) is DevicePhase.OFFERED
        trial.finish()
        assert trial.counts == {"committed": 4}
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED

    def test_retry_of_named_devices_leaves_the_others_that_failed(self) -> None:
        trial = _two_of_four_failed()
        failed = trial.order[:2]
        with pytest.raises(CampaignError, match=f"{trial.order[2]} is committed"):
            trial.campaign.retry(trial.now_s, [failed[0], trial.order[2]])
        with pytest.raises(CampaignError, match="expected a device of c-1, received gw-99"):
            trial.campaign.retry(trial.now_s, ["gw-99"])
        trial.take(trial.campaign.retry(trial.now_s, [failed[1]]))
        trial.finish()
        assert trial.offered == [*trial.order, failed[1]]
        assert trial.counts == {"committed": 3, "failed": 1}

    def test_devices_that_fail_again_do_not_abort_what_was_good(self) -> None:
        trial = Trial(4, waves="100%", max_failed=0.5, soak_s=0)
        trial.tick()
        trial.say(trial.order[0], DevicePhase.FAILED)
        trial.commit(*trial.order[1:])
        trial.tick()
        trial.take(trial.campaign.retry(trial.now_s))
        trial.tick()
        trial.say(trial.order[0], DevicePhase.FAILED)
        trial.tick()
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED
        assert trial.counts == {"failed": 1, "committed": 3}

    def test_orders_that_do_not_fit_are_refused_with_the_phase(self) -> None:
        trial = Trial(1, waves="100%", soak_s=0)
        with pytest.raises(CampaignError, match="paused campaign, c-1 is running"):
            trial.campaign.resume(trial.now_s)
        with pytest.raises(CampaignError, match="abort it with --revert"):
            trial.campaign.roll_back(trial.now_s)
        with pytest.raises(CampaignError, match="there are none"):
            trial.campaign.retry(trial.now_s)
        trial.finish()
        with pytest.raises(CampaignError, match="running campaign, c-1 is completed"):
            trial.campaign.pause(trial.now_s)
        with pytest.raises(CampaignError, match="under way, c-1 is completed"):
            trial.campaign.abort(trial.now_s, revert=True)
        trial.take(trial.campaign.roll_back(trial.now_s))
        with pytest.raises(CampaignError, match="start a new one"):
            trial.campaign.retry(trial.now_s)


class TestReports:
    def test_late_commit_of_a_device_that_was_given_up_is_the_truth(self) -> None:
        trial = Trial(1, waves="100%", max_failed=1, limits={"download_s": 10})
        trial.tick()
        trial.say(trial.order[0], DevicePhase.DOWNLOADING)
        trial.tick(21.0)
        assert trial.phase(trial.order[0]) is DevicePhase.TIMED_OUT
        trial.say(trial.order[0], DevicePhase.COMMITTED)
        assert trial.phase(trial.order[0]) is DevicePhase.COMMITTED
        trial.say(trial.order[0], DevicePhase.REVERTED)  # the cancel has reached it by now
        assert trial.phase(trial.order[0]) is DevicePhase.REVERTED

    def test_device_that_goes_on_after_its_end_is_told_to_stop(self) -> None:
        trial = Trial(1, waves="100%", max_failed=1, limits={"download_s": 10})
        trial.tick()
        trial.say(trial.order[0], DevicePhase.DOWNLOADING)
        trial.tick(21.0)
        trial.cancelled.clear()
        trial.say(trial.order[0], DevicePhase.DOWNLOADING)
        assert trial.cancelled == [(trial.order[0], True)]
        assert trial.phase(trial.order[0]) is DevicePhase.CANCELLING

    def test_repeated_reports_change_nothing(self) -> None:
        trial = Trial(1, waves="100%")
        trial.tick()
        trial.say(trial.order[0], DevicePhase.TESTING)
        trial.say(trial.order[0], DevicePhase.TRIAL)
        trial.store()
        trial.say(trial.order[0], DevicePhase.TRIAL, sequence=2)
        trial.say(trial.order[0], DevicePhase.TESTING, sequence=1)
        assert trial.campaign.take_changes() == (None, [])
        assert trial.phase(trial.order[0]) is DevicePhase.TRIAL

    def test_first_word_may_be_the_last(self) -> None:
        trial = Trial(1, waves="100%")
        trial.tick()
        trial.say(trial.order[0], DevicePhase.COMMITTED)
        assert trial.counts == {"committed": 1}


class TestRestart:
    def test_same_wave_and_nobody_is_offered_twice(self) -> None:
        trial = Trial(10, waves="1,5,100%", soak_s=0)
        trial.tick()
        trial.commit_offered()
        trial.tick()
        offered = list(trial.offered)
        trial.say(trial.order[1], DevicePhase.DOWNLOADING)
        trial.restart()
        trial.come(*trial.order)
        trial.tick(1.0)
        assert trial.offered == offered
        assert trial.campaign.record.wave == 1

    def test_offer_that_was_written_and_never_sent_goes_out_later(self) -> None:
        trial = Trial(1, waves="100%")
        trial.campaign.tick(trial.now_s)  # its actions are lost with the process
        trial.store()
        trial.restart()
        trial.come(*trial.order)
        trial.tick(1.0)
        assert trial.offered == []
        trial.tick(REPEAT_S)
        assert trial.offered == trial.order

    def test_pause_is_still_in_force(self) -> None:
        trial = Trial(4, waves="1,100%", soak_s=0)
        trial.tick()
        trial.take(trial.campaign.pause(trial.now_s, "lunch"))
        trial.commit_offered()
        trial.restart()
        trial.come(*trial.order)
        trial.tick(1000.0)
        assert trial.campaign.record.phase is CampaignPhase.PAUSED
        assert trial.campaign.record.reason == "lunch"
        assert len(trial.offered) == 1

    def test_soak_that_is_over_waits_until_presence_is_known(self) -> None:
        trial = Trial(2, waves="1,100%")
        trial.tick()
        trial.commit_offered()
        trial.now_s += 500.0
        trial.restart()
        trial.tick(1.0)
        assert trial.campaign.record.phase is CampaignPhase.SOAKING
        trial.tick(SETTLE_S)
        assert trial.campaign.record.wave == 1
