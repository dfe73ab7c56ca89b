"""The campaign's state machine: waves, limits, verdicts, and all of it at random."""

from __future__ import annotations

import contextlib
import random

import pytest

from coordinator.rollout.campaign import SETTLE_S, CampaignError
from coordinator.rollout.device_care import REPEAT_S
from coordinator.rollout.records import (
    TERMINAL_PHASES,
    CampaignPhase,
    DevicePhase,
)
from tests.campaigns import STAGES, Trial, device_names


class TestWaves:
    def test_one_wave_after_the_other_and_all_commit(self) -> None:
        trial = Trial(10, waves="1,50%,100%")
        trial.tick()
        assert trial.offered == trial.order[:1]
        trial.commit_offered()
        trial.tick(59.0)
        assert len(trial.offered) == 1, "the first wave is still being watched"
        trial.tick(1.0)
        assert trial.offered == trial.order[:5]
        trial.commit_offered()
        trial.tick(60.0)
        assert trial.offered == trial.order
        trial.commit_offered()
        trial.tick(60.0)
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED
        assert trial.counts == {"committed": 10}

    def test_next_wave_waits_for_every_device_of_this_one(self) -> None:
        trial = Trial(4, waves="2,100%", soak_s=0)
        trial.tick()
        trial.commit(trial.order[0])
        trial.say(trial.order[1], DevicePhase.DOWNLOADING)
        trial.tick(100.0)
        assert trial.offered == trial.order[:2]
        trial.commit(trial.order[1])
        trial.tick()
        assert trial.offered == trial.order

    def test_wave_in_which_nobody_commits_pauses_the_campaign(self) -> None:
        trial = Trial(4, online=False, waves="1,100%", soak_s=0, limits={"offered_s": 50})
        trial.tick(51.0)
        assert trial.phase(trial.order[0]) is DevicePhase.UNREACHABLE
        assert trial.campaign.record.phase is CampaignPhase.PAUSED
        assert "no device of wave 1 has committed" in trial.campaign.record.reason
        trial.come(*trial.order[1:])
        trial.take(trial.campaign.resume(trial.now_s))
        trial.tick()
        assert trial.offered == trial.order[1:], "the operator let the wave pass"

    def test_resuming_does_not_excuse_a_wave_that_is_not_over(self) -> None:
        trial = Trial(2, waves="1,100%", soak_s=0, max_failed=1)
        trial.tick()
        trial.take(trial.campaign.pause(trial.now_s))
        trial.take(trial.campaign.resume(trial.now_s))
        trial.say(trial.order[0], DevicePhase.FAILED)
        assert trial.campaign.record.phase is CampaignPhase.PAUSED

    def test_devices_that_are_away_are_offered_when_they_come(self) -> None:
        trial = Trial(2, online=False, waves="100%")
        trial.tick()
        assert trial.offered == []
        trial.come(trial.order[1])
        trial.tick(1.0)
        assert trial.offered == [trial.order[1]]

    def test_rate_limits_offers(self) -> None:
        trial = Trial(100, waves="100%", rate_per_min=60)
        for _ in range(10):
            trial.tick(1.0)
        assert 9 <= len(trial.offered) <= 12
        for _ in range(40):
            trial.tick(0.25)
        assert 19 <= len(trial.offered) <= 22

    def test_rate_holds_over_a_restart(self) -> None:
        trial = Trial(10, waves="100%", rate_per_min=1)
        trial.tick()
        trial.commit_offered()
        trial.restart()
        trial.come(*trial.order)
        trial.tick(30.0)
        assert len(trial.offered) == 1
        trial.tick(30.0)
        assert len(trial.offered) == 2

    def test_soak_begins_anew_when_somebody_joins(self) -> None:
        trial = Trial(1, waves="100%", include_new=True)
        trial.tick()
        trial.commit_offered()
        trial.tick(59.0)
        trial.come("gw-new")
        trial.take(trial.campaign.join("gw-new", trial.now_s))
        trial.tick(1.0)
        assert trial.campaign.record.phase is CampaignPhase.RUNNING
        assert trial.offered[-1] == "gw-new"
        trial.finish()
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED
        assert trial.counts == {"committed": 2}

    def test_nobody_joins_unless_asked_for(self) -> None:
        trial = Trial(1)
        assert trial.campaign.join("gw-new", trial.now_s) == []
        assert "gw-new" not in trial.campaign.ledger

    def test_unreachable_device_joins_again_where_new_ones_do(self) -> None:
        trial = Trial(2, include_new=True, waves="100%", limits={"offered_s": 50})
        late = trial.order[1]
        trial.leave(late)
        trial.tick()
        trial.commit(trial.order[0])
        trial.tick(51.0)
        assert trial.phase(late) is DevicePhase.UNREACHABLE
        trial.come(late)
        trial.tick(1.0)
        assert trial.phase(late) is DevicePhase.OFFERED
        assert trial.attempts[late] == 1


class TestLimits:
    @pytest.mark.parametrize(
        ("said", "limit"),
        [
            (DevicePhase.DOWNLOADING, "download_s"),
            (DevicePhase.TESTING, "self_test_s"),
            (DevicePhase.TRIAL, "commit_s"),
        ],
    )
    def test_each_phase_has_its_own(self, said: DevicePhase, limit: str) -> None:
        trial = Trial(1, waves="100%", limits={limit: 20})
        trial.tick()
        for phase in STAGES[: STAGES.index(said) + 1]:
            trial.say(trial.order[0], phase)
        trial.tick(29.0)
        assert trial.phase(trial.order[0]) is said, "devices are left time to say so themselves"
        trial.tick(2.0)
        entry = trial.campaign.ledger[trial.order[0]]
        assert entry.phase is DevicePhase.TIMED_OUT
        assert entry.detail == f"{said.value} for more than 30 s"
        assert trial.cancelled == [(trial.order[0], True)], "it must not go on by itself"

    def test_offer_without_an_answer(self) -> None:
        trial = Trial(1, waves="100%", limits={"offered_s": 100})
        trial.tick()
        trial.tick(REPEAT_S + 1)
        trial.tick(REPEAT_S + 1)
        assert trial.offered == [trial.order[0]] * 3, "it is there, so it is told again"
        trial.tick(40.0)
        assert trial.phase(trial.order[0]) is DevicePhase.TIMED_OUT

    def test_offered_device_that_goes_away_was_out_of_reach(self) -> None:
        trial = Trial(1, waves="100%", limits={"offered_s": 100})
        trial.tick()
        trial.leave(trial.order[0])
        trial.tick(101.0)
        assert trial.phase(trial.order[0]) is DevicePhase.UNREACHABLE
        assert trial.offered == [trial.order[0]]

    def test_device_that_was_never_seen_ends_too(self) -> None:
        trial = Trial(3, online=False, waves="100%", limits={"offered_s": 100}, soak_s=0)
        trial.tick(99.0)
        assert trial.counts == {"planned": 3}
        trial.tick(1.0)
        assert trial.counts == {"unreachable": 3}
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED

    def test_downloading_again_gives_no_new_time(self) -> None:
        trial = Trial(1, waves="100%", limits={"download_s": 1000, "self_test_s": 50})
        trial.tick()
        name = trial.order[0]
        for _ in range(6):
            trial.say(name, DevicePhase.DOWNLOADING)
            trial.say(name, DevicePhase.TESTING)
            trial.tick(10.0)
        assert trial.phase(name) is DevicePhase.TIMED_OUT

    def test_waiting_behind_the_rate_is_not_the_devices_fault(self) -> None:
        trial = Trial(5, waves="100%", rate_per_min=1, limits={"offered_s": 100})
        for _ in range(300):
            trial.tick(1.0)
            trial.commit_offered()
        assert trial.counts == {"committed": 5}

    def test_limits_begin_anew_after_the_coordinator_was_away(self) -> None:
        trial = Trial(1, waves="100%", limits={"download_s": 100})
        trial.tick()
        trial.say(trial.order[0], DevicePhase.DOWNLOADING)
        trial.now_s += 5000.0
        trial.restart()
        trial.come(trial.order[0])
        trial.tick(50.0)
        assert trial.phase(trial.order[0]) is DevicePhase.DOWNLOADING
        trial.tick(61.0)
        assert trial.phase(trial.order[0]) is DevicePhase.TIMED_OUT


class TestVerdict:
    def test_failed_canary_stops_everything(self) -> None:
        trial = Trial(10)
        trial.tick()
        trial.say(trial.order[0], DevicePhase.FAILED, "golden output differs")
        assert trial.campaign.record.phase is CampaignPhase.ABORTED
        assert trial.campaign.record.reason.startswith("wave 1: 1 of 1 devices failed")
        trial.tick(1000.0)
        assert trial.offered == trial.order[:1]
        assert trial.counts == {"failed": 1, "cancelled": 9}

    def test_share_below_the_threshold_goes_on(self) -> None:
        trial = Trial(10, waves="100%", max_failed=0.2, soak_s=0)
        trial.tick()
        for name in trial.order[:2]:
            trial.say(name, DevicePhase.REFUSED)
        trial.commit_offered()
        trial.tick()
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED
        assert trial.counts == {"refused": 2, "committed": 8}

    def test_devices_out_of_reach_do_not_dilute_failures(self) -> None:
        trial = Trial(10, waves="100%", max_failed=0.2, limits={"offered_s": 60})
        away = trial.order[2:]
        trial.leave(*away)
        trial.tick()
        trial.say(trial.order[0], DevicePhase.FAILED)
        trial.say(trial.order[1], DevicePhase.DOWNLOADING)
        assert trial.campaign.is_open
        trial.tick(61.0)
        assert trial.campaign.record.reason.startswith("wave 1: 1 of 2 devices failed")

    def test_devices_that_go_offline_with_the_bundle_abort(self) -> None:
        trial = Trial(4, waves="50%,100%", max_lost=0.4, lost_after_s=120, soak_s=300)
        trial.tick()
        trial.commit(*trial.order[:2])
        trial.leave(trial.order[0])
        trial.tick(119.0)
        assert trial.campaign.record.phase is CampaignPhase.SOAKING
        trial.tick(1.0)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED
        assert "1 of 2 updated devices are offline" in trial.campaign.record.reason

    def test_device_that_restarts_with_the_bundle_is_not_lost(self) -> None:
        trial = Trial(1, max_lost=0, lost_after_s=120, soak_s=300)
        trial.tick()
        trial.commit_offered()
        trial.leave(trial.order[0])
        trial.tick(100.0)
        trial.come(trial.order[0])
        trial.tick(200.0)
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED

    def test_going_back_after_the_commit_counts_in_a_later_wave(self) -> None:
        trial = Trial(4, waves="1,100%", soak_s=0)
        trial.tick()
        trial.commit_offered()
        trial.tick()
        assert len(trial.offered) == 4
        trial.say(trial.order[0], DevicePhase.REVERTED, "crash loop")
        assert trial.campaign.record.phase is CampaignPhase.ABORTING

    def test_abort_reverts_where_the_settings_say_so(self) -> None:
        trial = Trial(4, waves="1,100%", soak_s=0, revert_on_abort=True)
        trial.tick()
        trial.commit_offered()
        trial.tick()
        trial.say(trial.order[1], DevicePhase.FAILED)
        assert (trial.order[0], True) in trial.cancelled
        for name in (trial.order[0], *trial.order[2:]):
            trial.say(name, DevicePhase.REVERTED)
        assert trial.campaign.record.phase is CampaignPhase.ABORTED
        assert trial.counts == {"failed": 1, "reverted": 3}

    def test_nothing_is_judged_before_presence_is_known(self) -> None:
        trial = Trial(2, waves="100%", max_lost=0, lost_after_s=1, soak_s=100)
        trial.tick()
        trial.commit_offered()
        trial.restart()
        trial.leave(*trial.order)  # retained states of before, births come behind them
        trial.tick(SETTLE_S - 1)
        assert trial.campaign.is_open
        trial.come(*trial.order)
        trial.tick(100.0)
        assert trial.campaign.record.phase is CampaignPhase.COMPLETED


@pytest.mark.parametrize("seed", range(30))
def test_random_campaign_ends_with_every_device_accounted_for(seed: int) -> None:
    """Devices come, go, fail, repeat themselves; the coordinator is killed; orders are given."""
    chance = random.Random(seed)
    trial = Trial(
        12,
        waves="1,25%,100%",
        soak_s=5,
        max_failed=chance.choice([0.2, 1.0]),
        max_lost=chance.choice([0.3, 1.0]),
        lost_after_s=60,
        revert_on_abort=chance.random() < 0.5,
        include_new=chance.random() < 0.5,
        limits={"offered_s": 200, "download_s": 100, "self_test_s": 50, "commit_s": 150},
    )
    for _ in range(400):
        _random_event(trial, chance)
    for _ in range(60):  # then nobody says anything any more
        if trial.campaign.record.phase is CampaignPhase.PAUSED:
            trial.take(trial.campaign.resume(trial.now_s))
        trial.tick(100.0)
    assert trial.campaign.is_ended, trial.campaign.record
    assert all(entry.phase in TERMINAL_PHASES for entry in trial.campaign.ledger)
    assert sum(trial.counts.values()) == len(trial.campaign.ledger)
    trial.restart()
    assert trial.campaign.ledger.counts() == trial.counts


def _random_event(trial: Trial, chance: random.Random) -> None:
    name = chance.choice(device_names(12))
    match chance.randrange(12):
        case 0:
            trial.leave(name)
        case 1:
            trial.come(name)
        case 2:
            trial.restart()
            trial.come(*chance.sample(device_names(12), 8))
        case 3 if chance.random() < 0.1:
            order = chance.choice(["pause", "resume", "retry", "abort"])
            arguments = {"revert": chance.random() < 0.5} if order == "abort" else {}
            with contextlib.suppress(CampaignError):
                trial.take(getattr(trial.campaign, order)(trial.now_s, **arguments))
        case 4 | 5 | 6:
            trial.tick(chance.choice([0.1, 1.0, 10.0]))
        case _ if trial.phase(name) is not DevicePhase.PLANNED:
            phases = [*STAGES, *STAGES, DevicePhase.FAILED, DevicePhase.CANCELLED]
            trial.say(name, chance.choice([*phases, DevicePhase.REVERTED]))
