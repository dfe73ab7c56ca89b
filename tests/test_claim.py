"""Who coordinates a fleet: of any two, exactly one is left, whatever the broker remembers."""

from __future__ import annotations

from coordinator.claim import FleetClaim
from wire.messages import Claim


class Retained:
    """The broker's retained claim, and the coordinator that is connected."""

    def __init__(self) -> None:
        self.claim: Claim | None = None

    def connect(self, claim: FleetClaim) -> None:
        """All that happens in one connection: what is retained comes, then our own words."""
        due = [self.claim] if self.claim is not None else []
        says = claim.is_due
        while due or says:
            if says:
                self.claim = claim.own
                due.append(claim.own)
            says = bool(due) and claim.seen(due.pop(0))


def test_later_coordinator_pushes_the_earlier_one_out_for_good() -> None:
    broker, first, second = Retained(), FleetClaim("a", "", 100.0), FleetClaim("b", "", 200.0)
    for claim in (first, second, first):
        broker.connect(claim)
    assert (first.winner, second.winner) == (second.own, None)
    broker.connect(second)
    assert second.winner is None


def test_claim_of_one_that_is_gone_does_not_count_even_from_a_clock_ahead() -> None:
    broker = Retained()
    broker.claim = Claim(instance="gone", number=900)
    claim = FleetClaim("a", "", 100.0)
    broker.connect(claim)
    broker.connect(claim)
    assert claim.winner is None
    assert broker.claim == claim.own
    assert claim.own.number == 901


def test_later_coordinator_wins_with_a_clock_behind() -> None:
    broker, first, second = Retained(), FleetClaim("a", "", 500.0), FleetClaim("b", "", 100.0)
    for claim in (first, second, first):
        broker.connect(claim)
    assert first.winner == second.own
    assert second.winner is None


def test_earlier_claim_that_a_broker_brings_back_is_answered_and_not_obeyed() -> None:
    broker, claim = Retained(), FleetClaim("b", "", 200.0)
    broker.connect(claim)
    broker.claim = Claim(instance="older", number=150)
    broker.connect(claim)
    assert claim.winner is None
    assert broker.claim == claim.own


def test_of_two_with_one_number_one_is_left() -> None:
    broker, first, second = Retained(), FleetClaim("a", "", 100.0), FleetClaim("b", "", 100.0)
    for claim in (first, second, first, second):
        broker.connect(claim)
    assert [first.winner, second.winner].count(None) == 1


def test_coordinator_whose_claim_was_forgotten_by_the_broker_goes_on() -> None:
    broker, claim = Retained(), FleetClaim("a", "", 100.0)
    broker.connect(claim)
    broker.claim = None
    broker.connect(claim)
    assert claim.winner is None
