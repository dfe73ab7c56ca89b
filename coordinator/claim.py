"""One coordinator for a fleet: the one that came last. Pure: no broker, no clock.

Two with one client id push each other off the broker for ever, and not every broker says why. So
each coordinator says, in a retained message, that the fleet is its own. One that comes back and
finds a later claim in place of its own knows that it was pushed off, and ends.

Claims are ordered by a number: the time of the start, or one more than that of the claim that was
there, whichever is higher. A broker that has lost its newest messages may show an earlier claim
again: that one does not count, and ours is said once more.
"""

from __future__ import annotations

from wire.messages import Claim


class FleetClaim:
    """A coordinator's claim to its fleet; ``now_s`` is Unix time."""

    def __init__(self, instance: str, where: str, now_s: float) -> None:
        self.own = Claim(instance=instance, where=where, number=int(now_s))
        self.winner: Claim | None = None  # who came later than we
        self._is_known = False  # the broker has given our claim back to us

    @property
    def is_due(self) -> bool:
        """Whether our claim is to be said in a new connection."""
        return not self._is_known

    def seen(self, claim: Claim) -> bool:
        """A claim came from the broker; tell whether ours is to be said (again)."""
        if claim.instance == self.own.instance:
            self._is_known |= claim == self.own
            return False
        if not self._is_known:
            return self._outbid(claim)
        if (claim.number, claim.instance) < (self.own.number, self.own.instance):
            return True
        self.winner = claim
        return False

    def _outbid(self, claim: Claim) -> bool:
        """A claim from before ours: whoever made it is gone, or is to end."""
        if claim.number < self.own.number:
            return False
        self.own = Claim(instance=self.own.instance, where=self.own.where, number=claim.number + 1)
        return True
