"""The bundle in use: how it comes into use, its trial, and the way back. Times are monotonic
seconds."""

from __future__ import annotations

import logging

from edge_agent import journal as journals
from edge_agent.incoming import Ready
from edge_agent.journal import SlotRecord, build_status, owner_of
from edge_agent.ledger import Ledger
from edge_agent.slots import SlotStore
from edge_agent.trial import TrialWatch, Verdict
from edge_agent.update_host import Host, Policy, UpdateEndedError
from wire.bundle import Bundle, BundleError
from wire.errors import ConfigError, ModelError
from wire.messages import RolloutOffer, RolloutPhase

logger = logging.getLogger(__name__)

HEALTHY_S = 60.0  # a process that lives this long with a committed bundle is no crash loop
_UNUSABLE = (ModelError, ConfigError)


class BundleInUse:
    """What this device works with, and whether that is for good."""

    def __init__(self, store: SlotStore, ledger: Ledger, policy: Policy, host: Host) -> None:
        self._store = store
        self._ledger = ledger
        self._policy = policy
        self._host = host
        self._trial: TrialWatch | None = None
        self._connected = False
        self._healthy_s: float | None = None

    @property
    def digest(self) -> str | None:
        """The bundle in use."""
        record = self._ledger.journal.in_use
        return None if record is None else record.digest

    @property
    def committed(self) -> str | None:
        """The bundle in use for good."""
        record = self._ledger.journal.committed
        return None if record is None else record.digest

    # Start, connection, end

    def start(self, now_s: float) -> None:
        """Load the bundle in use, or the one before if it has killed too many processes."""
        journal, reason = journals.start(self._ledger.journal)
        self._ledger.keep(journal)
        if reason:
            self._give_up(reason, announce=False)
        elif journal.in_use is not None:
            self._load(journal.in_use)
        self._watch(now_s)
        if self._ledger.journal.active is not None:
            self._healthy_s = now_s + HEALTHY_S

    def connected(self, now_s: float) -> None:
        """The soak of a trial goes on."""
        self._connected = True
        if self._trial is not None:
            self._trial.connected(now_s)

    def disconnected(self, now_s: float) -> None:
        """It waits."""
        self._connected = False
        if self._trial is not None:
            self._trial.disconnected(now_s)

    def stop(self) -> None:
        """A clean end: not to be counted as a death of the bundle in use."""
        if self._ledger.journal.active is not None:
            self._ledger.keep(journals.stop(self._ledger.journal))

    def _load(self, record: SlotRecord) -> None:
        try:
            self._host.use(self._read(record))
        except _UNUSABLE as exc:
            if self._trial_offer is not None:
                self._give_up(str(exc), announce=False)
                return
            # It was good when it was committed: the data may have changed. An offer helps.
            logger.warning(
                "%s: bundle %s %s cannot be used: %s",
                self._policy.device,
                record.name,
                record.version,
                exc,
            )

    def _read(self, record: SlotRecord) -> Bundle:
        """A bundle from its slot, checked again as if it had just come."""
        slot = self._ledger.journal.slot_of(record.digest)
        data = None if slot is None else self._store.read(slot)
        if data is None:
            raise BundleError(f"{record.name} {record.version}: its file is damaged")
        limit = self._policy.max_bundle_bytes
        return Bundle.from_bytes(data, max_bytes=limit, trust=self._policy.trust)

    # Into use

    def install(self, ready: Ready, now_s: float) -> None:
        """Use a bundle that has passed its self-test; UpdateEndedError if it cannot be written."""
        offer, manifest = ready.offer, ready.bundle.manifest
        record = SlotRecord(
            digest=offer.digest,
            name=manifest.name,
            version=manifest.version,
            sequence=manifest.sequence,
        )
        trial = self._trial_offer
        try:
            # Before it is loaded: if loading kills the process, the next one must know with what.
            self._store.install(offer, record)
        except OSError as exc:
            reason = f"cannot write the bundle to the state directory ({exc.strerror or exc})"
            raise UpdateEndedError(offer, RolloutPhase.FAILED, reason) from exc
        self._tell_replaced(trial, offer)
        try:
            self._host.use(ready.bundle)
        except _UNUSABLE as exc:
            self._give_up(str(exc))
            return
        device = self._policy.device
        logger.info("%s: bundle %s %s is in use", device, record.name, record.version)
        self._host.announce()
        self._ledger.note(build_status(offer, RolloutPhase.INSTALLED, self_test=ready.report))
        self._watch(now_s)

    def adopt(self, offer: RolloutOffer, now_s: float) -> None:
        """The offered bundle is in use already: only the account of it changes."""
        trial = self._trial_offer
        if trial is None:
            self._ledger.note(build_status(offer, RolloutPhase.COMMITTED))
        elif offer.campaign:
            self._tell_replaced(trial, offer)
            self._ledger.keep(journals.adopt(self._ledger.journal, offer))
            self._ledger.note(build_status(offer, RolloutPhase.INSTALLED))
            self._watch(now_s)
        else:
            self._ledger.note(build_status(offer, RolloutPhase.INSTALLED))

    def _tell_replaced(self, trial: RolloutOffer | None, offer: RolloutOffer) -> None:
        """Tell the campaign whose trial this has ended that another one has taken its place."""
        if trial is not None and trial.campaign not in ("", offer.campaign):
            reason = f"replaced by rollout {offer.campaign}"
            self._ledger.note(build_status(trial, RolloutPhase.REVERTED, reason))

    # The trial

    def tick(self, now_s: float) -> None:
        """Commit or give up what is due."""
        if self._trial is not None:
            self._judge(self._trial, now_s)
        if self._healthy_s is not None and now_s >= self._healthy_s:
            self._healthy_s = None
            self._ledger.keep(journals.survive(self._ledger.journal))

    def good_step(self, now_s: float) -> None:
        """A range has been answered with the bundle in use."""
        if self._trial is not None:
            self._trial.good_steps += 1
            self._judge(self._trial, now_s)

    def bad_step(self, exc: ModelError) -> bool:
        """A pass has failed; True if that ended a trial, so that the agent goes on without it."""
        if self._trial is None:
            return False
        self._give_up(f"a pass failed: {exc}")
        return True

    @property
    def _trial_offer(self) -> RolloutOffer | None:
        return self._ledger.journal.trial

    def _watch(self, now_s: float) -> None:
        offer = self._trial_offer
        self._trial = None if offer is None else TrialWatch(offer, began_s=now_s)
        if self._trial is not None:
            if self._connected:
                self._trial.connected(now_s)
            self._judge(self._trial, now_s)

    def _judge(self, trial: TrialWatch, now_s: float) -> None:
        match trial.verdict(now_s):
            case Verdict.PASSED:
                self._commit(trial.offer)
            case Verdict.EXPIRED:
                limit_s = trial.offer.commit_limit_s
                self._give_up(f"not committed within {limit_s:g} s: {trial.good_steps} good steps")
            case Verdict.OPEN:
                pass

    def _commit(self, offer: RolloutOffer) -> None:
        self._trial = None
        self._ledger.keep(journals.commit(self._ledger.journal))
        self._ledger.note(build_status(offer, RolloutPhase.COMMITTED))
        if offer.campaign:
            self._host.announce()

    # The way back

    def go_back(self, reason: str, *, blocked_for: str, announce: bool = True) -> None:
        """To the bundle before, or none. ``blocked_for``: why no run may bring this one again."""
        journal = self._ledger.journal
        left = journal.in_use
        assert left is not None, "there is nothing to go back from"
        owner = owner_of(journal, left.digest)
        device = self._policy.device
        logger.warning("%s: leaving bundle %s %s: %s", device, left.name, left.version, reason)
        self._trial = None
        self._ledger.keep(journals.revert(journal, blocked_for=blocked_for))
        self._use_what_is_left()
        if announce:
            self._host.announce()
        self._ledger.note(build_status(owner, RolloutPhase.REVERTED, reason))

    def _give_up(self, reason: str, *, announce: bool = True) -> None:
        self.go_back(reason, blocked_for=reason, announce=announce)

    def _use_what_is_left(self) -> None:
        record = self._ledger.journal.in_use
        try:
            self._host.use(None if record is None else self._read(record))
        except _UNUSABLE as exc:
            device = self._policy.device
            logger.warning("%s: the bundle before cannot be used: %s", device, exc)
            self._host.use(None)
