"""When a bundle on trial is committed or given up."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent.trial import TrialWatch, Verdict
from wire.messages import RolloutOffer


def _watch(campaign: str = "c", **fields: Any) -> TrialWatch:
    offer = RolloutOffer(digest="1" * 64, size_bytes=1, chunk_bytes=1, campaign=campaign, **fields)
    return TrialWatch(offer, began_s=100.0)


def test_offer_without_conditions_is_committed_at_once() -> None:
    assert _watch().verdict(100.0) is Verdict.PASSED


def test_good_steps_commit() -> None:
    watch = _watch(good_steps=2)
    assert watch.verdict(1e6 - 1) is not Verdict.PASSED
    watch.good_steps = 1
    assert watch.verdict(101.0) is Verdict.OPEN
    watch.good_steps = 2
    assert watch.verdict(101.0) is Verdict.PASSED


def test_soak_counts_connected_time_alone() -> None:
    watch = _watch(soak_s=10.0)
    assert watch.verdict(1000.0) is Verdict.OPEN
    watch.connected(1000.0)
    watch.connected(1001.0)
    watch.disconnected(1006.0)
    watch.disconnected(1007.0)
    assert watch.verdict(2000.0) is Verdict.OPEN
    watch.connected(2000.0)
    assert watch.verdict(2003.9) is Verdict.OPEN
    assert watch.verdict(2004.0) is Verdict.PASSED


@pytest.mark.parametrize("steps", [True, False])
def test_whichever_comes_first_commits(*, steps: bool) -> None:
    watch = _watch(good_steps=1, soak_s=10.0)
    if steps:
        watch.good_steps = 1
    else:
        watch.connected(100.0)
    assert watch.verdict(110.0) is Verdict.PASSED


def test_trial_that_takes_too_long_expires_in_a_campaign_only() -> None:
    assert _watch(good_steps=1, commit_limit_s=5.0).verdict(104.9) is Verdict.OPEN
    assert _watch(good_steps=1, commit_limit_s=5.0).verdict(105.0) is Verdict.EXPIRED
    assert _watch("", good_steps=1, commit_limit_s=5.0).verdict(1e9) is Verdict.OPEN
