"""Which campaign an order is for where the operator has named none. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rollout.campaign import Campaign, CampaignError
from coordinator.rollout.records import CampaignPhase
from coordinator.rollout.requests import Order

MOST_LISTED = 10

# Orders that take a campaign that is over; the others are for one under way.
_AFTER_ITS_END = {
    Order.ROLLBACK: frozenset({CampaignPhase.COMPLETED, CampaignPhase.ABORTED}),
    Order.RETRY: frozenset({CampaignPhase.COMPLETED}),
}


def choose_campaign(order: Order, campaigns: Sequence[Campaign]) -> Campaign:
    """The only one under way; where none is, the only one that the order can follow the end of.

    Raises CampaignError with those that come into question if there is more than one, or none.
    """
    candidates = [campaign for campaign in campaigns if not campaign.is_ended]
    if not candidates:
        phases = _AFTER_ITS_END.get(order, frozenset())
        candidates = [campaign for campaign in campaigns if campaign.record.phase in phases]
    if len(candidates) == 1:
        return candidates[0]
    why = f"{len(candidates)} come into question" if candidates else "none is under way"
    raise CampaignError(
        f"expected the name of a campaign for {order}, {why}: {_list(candidates or campaigns)}"
    )


def _list(campaigns: Sequence[Campaign]) -> str:
    """Names with their phases, the newest first."""
    newest = sorted(campaigns, key=lambda campaign: -campaign.record.created_s)
    shown = [f"{each.name} ({each.record.phase})" for each in newest[:MOST_LISTED]]
    more = ["…"] if len(newest) > MOST_LISTED else []
    return ", ".join([*shown, *more]) or "the fleet has had no campaign"
