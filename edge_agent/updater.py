"""Brings bundles into use: what the coordinator says, and when it is done.

A thin shell round ``Incoming`` (not in use yet) and ``BundleInUse``; the daemon hands it messages,
time and the ends of steps. Nothing here blocks but flushing files and loading a bundle. Times are
monotonic seconds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import msgspec

from edge_agent import journal as journals
from edge_agent.admission import check_offer
from edge_agent.in_use import BundleInUse
from edge_agent.incoming import Incoming
from edge_agent.journal import build_status
from edge_agent.ledger import Ledger
from edge_agent.slots import SlotStore
from edge_agent.update_host import Host, Policy, UpdateEndedError
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.messages import (
    ChunkHeader,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
)

logger = logging.getLogger(__name__)

_USED = (RolloutPhase.INSTALLED, RolloutPhase.COMMITTED)


class Updater:
    """The device's bundles."""

    def __init__(self, store: SlotStore, policy: Policy, host: Host) -> None:
        self._store = store
        self._policy = policy
        self._host = host
        self._ledger = Ledger(store, host.say)
        self._incoming = Incoming(store, self._ledger, policy, host)
        self._in_use = BundleInUse(store, self._ledger, policy, host)
        self._connected = False

    @property
    def committed(self) -> str | None:
        """Digest of the bundle in use for good."""
        return self._in_use.committed

    def start(self, now_s: float) -> None:
        """Load the bundle in use, before anything is said."""
        self._in_use.start(now_s)

    def stop(self) -> None:
        """The process is about to end, cleanly."""
        self._incoming.stop()
        self._in_use.stop()

    # What the coordinator says

    def connected(self, now_s: float) -> None:
        """Say again what is owed, go on with what is under way."""
        self._connected = True
        self._in_use.connected(now_s)
        self._ledger.say_owed(now_s)
        pending = self._ledger.journal.pending
        if pending is not None and self._incoming.offer is None:
            with self._ending():
                self._incoming.begin(pending, now_s)
        else:
            self._incoming.ask(now_s)

    def disconnected(self, now_s: float) -> None:
        """Nothing can be said now."""
        self._connected = False
        self._in_use.disconnected(now_s)

    def offer(self, offer: RolloutOffer, now_s: float) -> None:
        """Take an offer, or say why not, or how far it is; PeerProtocolError for an old one."""
        if self._answer_known(offer, now_s) or self._is_under_way(offer):
            return
        if self._in_use.digest == offer.digest:
            self._replace_others(offer)
            self._in_use.adopt(offer, now_s)
            return
        with self._ending():
            self._check(offer)
            if self._in_use.committed == offer.digest:  # on trial with another one
                self._replace_others(offer)
                self._in_use.go_back("replaced by the bundle before it", blocked_for="")
                self._in_use.adopt(offer, now_s)
                return
            self._replace_others(offer)
            if offer.campaign:
                self._ledger.keep(journals.expect(self._ledger.journal, offer))
            self._incoming.begin(offer, now_s)

    def cancel(self, cancel: RolloutCancel, now_s: float) -> None:
        """Stop what is not in use; with ``revert``, leave what is. PeerProtocolError for an attempt
        that another has followed."""
        record = self._ledger.journal.record_of(cancel.campaign)
        attempt = self._check_attempt(cancel)
        pending = self._ledger.journal.pending
        if pending is not None and _is_same(pending, cancel):
            self._end(UpdateEndedError(pending, RolloutPhase.CANCELLED, "stopped on request"))
        elif record is None or record.status.digest != cancel.digest:
            self._note_unheard(cancel, attempt)
        elif cancel.revert and self._in_use.digest == cancel.digest:
            self._in_use.go_back("called back", blocked_for="called back by a rollout")
        elif cancel.revert and record.status.phase in _USED:
            status = record.status
            detail = "called back; another bundle had taken its place"
            self._ledger.note(
                msgspec.structs.replace(status, phase=RolloutPhase.REVERTED, detail=detail)
            )
        elif record.status.phase not in _USED and record.status.attempt < attempt:
            self._note_unheard(cancel, attempt)  # its offer was lost, or comes behind it
        else:
            self._ledger.say_again(cancel.campaign, now_s)

    def _check_attempt(self, cancel: RolloutCancel) -> int:
        """The attempt that is cancelled; raises PeerProtocolError if a later one is known."""
        record, pending = (
            self._ledger.journal.record_of(cancel.campaign),
            self._ledger.journal.pending,
        )
        known = 0 if record is None else record.status.attempt
        if pending is not None and pending.campaign == cancel.campaign:
            known = max(known, pending.attempt)
        if cancel.attempt is None:
            return known
        if cancel.attempt < known:
            raise PeerProtocolError(Refusal.LATE, f"attempt {known} has followed {cancel.attempt}")
        return cancel.attempt

    def _note_unheard(self, cancel: RolloutCancel, attempt: int) -> None:
        """What is cancelled was never offered here, as far as is known."""
        status = RolloutStatus(
            digest=cancel.digest,
            phase=RolloutPhase.CANCELLED,
            detail="nothing of it was here",
            campaign=cancel.campaign,
            attempt=attempt,
        )
        self._ledger.note(status)

    def acknowledge(self, message: RolloutAcknowledge) -> None:
        """A status is written down at the coordinator."""
        self._ledger.acknowledge(message)

    def chunk(self, header: ChunkHeader, data: bytes, *, shared: bool, now_s: float) -> None:
        """Take a chunk; raises PeerProtocolError for one that is not missing."""
        with self._ending():
            self._incoming.take(header, data, shared=shared, now_s=now_s)

    # Time and steps

    def tick(self, now_s: float, *, mid_step: bool) -> None:
        """Do what is due; call it in each turn of the loop, before work is begun."""
        with self._ending():
            ready = self._incoming.tick(now_s, mid_step=mid_step)
            if ready is not None:
                self._in_use.install(ready, now_s)
        self._in_use.tick(now_s)
        if self._connected:
            self._ledger.tick(now_s)

    def good_step(self, now_s: float) -> None:
        """A range has been answered with the bundle in use."""
        self._in_use.good_step(now_s)

    def bad_step(self, exc: ModelError) -> bool:
        """A pass has failed; True if that ended a trial, so that the agent goes on without it."""
        return self._in_use.bad_step(exc)

    # Offers

    def _answer_known(self, offer: RolloutOffer, now_s: float) -> bool:
        """Whether this attempt has a status already; it is said again."""
        record = self._ledger.journal.record_of(offer.campaign) if offer.campaign else None
        if record is None or record.status.digest != offer.digest:
            return False
        if offer.attempt < record.status.attempt:
            raise PeerProtocolError(Refusal.LATE, f"attempt {record.status.attempt} is known")
        if offer.attempt > record.status.attempt:
            return False
        self._ledger.say_again(offer.campaign, now_s)
        return True

    def _is_under_way(self, offer: RolloutOffer) -> bool:
        held = self._incoming.offer
        return held is not None and (held.digest, held.campaign, held.attempt) == (
            offer.digest,
            offer.campaign,
            offer.attempt,
        )

    def _check(self, offer: RolloutOffer) -> None:
        try:
            check_offer(offer, self._ledger.journal, max_bundle_bytes=self._policy.max_bundle_bytes)
        except ModelError as exc:
            raise UpdateEndedError(offer, RolloutPhase.REFUSED, str(exc)) from exc

    def _replace_others(self, offer: RolloutOffer) -> None:
        """What was under way ends; another campaign is told by what."""
        self._incoming.stop()
        pending = self._ledger.journal.pending
        if pending is not None and pending.campaign != offer.campaign:
            reason = f"replaced by rollout {offer.campaign}"
            self._ledger.note(build_status(pending, RolloutPhase.CANCELLED, reason))

    # Ends

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except UpdateEndedError as end:
            self._end(end)

    def _end(self, end: UpdateEndedError) -> None:
        """An update is over without its bundle in use; the one in use stays."""
        held = self._incoming.offer
        if held is None or _is_same(held, end.offer):
            self._incoming.stop()
            self._discard()
        logger.warning(
            "%s: bundle %s %s: %s: %s",
            self._policy.device,
            end.offer.name,
            end.offer.digest[:12],
            end.phase.value,
            end.reason,
        )
        self._ledger.note(build_status(end.offer, end.phase, end.reason))
        if end.offer.campaign:
            self._host.announce()  # a run whose bundle was refused meanwhile offers it again

    def _discard(self) -> None:
        try:
            self._store.part.discard()
        except OSError as exc:
            logger.warning("what is left of a download cannot be removed: %s", exc)


def _is_same(offer: RolloutOffer, other: RolloutOffer | RolloutCancel) -> bool:
    return (offer.digest, offer.campaign) == (other.digest, other.campaign)
