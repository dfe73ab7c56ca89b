"""Which campaign an order is for where none is named."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.rollout.campaign import Campaign, CampaignError
from coordinator.rollout.choice import MOST_LISTED, choose_campaign
from coordinator.rollout.records import CampaignPhase
from coordinator.rollout.requests import Order
from tests.campaigns import Trial


def campaign(name: str, phase: str, created_s: float = 0.0) -> Campaign:
    one: Any = Trial(1).campaign
    one.record = replace(one.record, campaign=name, phase=CampaignPhase(phase), created_s=created_s)
    assert isinstance(one, Campaign)
    return one


@pytest.mark.parametrize("order", list(Order))
def test_only_campaign_under_way_is_meant_whatever_is_over(order: Order) -> None:
    mine = campaign("mine", "paused")
    others = [campaign("old", "completed"), campaign("older", "aborted")]
    assert choose_campaign(order, [*others, mine]) is mine


@pytest.mark.parametrize("order", list(Order))
def test_of_several_under_way_none_is_taken_and_all_are_listed(order: Order) -> None:
    both = [campaign("a", "running", 1.0), campaign("b", "soaking", 2.0)]
    with pytest.raises(CampaignError) as caught:
        choose_campaign(order, [*both, campaign("old", "completed")])
    assert str(caught.value) == (
        f"expected the name of a campaign for {order}, 2 come into question: "
        "b (soaking), a (running)"
    )


@pytest.mark.parametrize(
    ("order", "phase"),
    [(Order.ROLLBACK, "completed"), (Order.ROLLBACK, "aborted"), (Order.RETRY, "completed")],
)
def test_with_none_under_way_the_only_one_to_undo_or_repeat_is_meant(
    order: Order, phase: str
) -> None:
    over = campaign("over", phase)
    assert choose_campaign(order, [over, campaign("gone", "rolled-back")]) is over


@pytest.mark.parametrize("order", [Order.PAUSE, Order.RESUME, Order.ABORT])
def test_campaigns_that_are_over_are_listed_and_not_taken(order: Order) -> None:
    with pytest.raises(CampaignError, match=r"none is under way: over \(completed\)"):
        choose_campaign(order, [campaign("over", "completed")])


def test_fleet_without_campaigns_is_told_so() -> None:
    with pytest.raises(CampaignError, match="the fleet has had no campaign"):
        choose_campaign(Order.PAUSE, [])


def test_long_list_is_cut() -> None:
    many = [campaign(f"c-{n}", "running", float(n)) for n in range(MOST_LISTED + 1)]
    with pytest.raises(CampaignError) as caught:
        choose_campaign(Order.PAUSE, many)
    assert "c-1 (running), …" in str(caught.value)
    assert "c-0 " not in str(caught.value)
