"""What a device knows about its bundles across restarts, and how that changes.

Two slots hold bundles. ``active`` is in use; while it is on trial, ``last_good`` is the one to go
back to. After the commit ``last_good`` is the one before, so that a revert on request still finds
it. Every change is a function from one journal to the next; ``edge_agent.slots`` writes them.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from wire.messages import RolloutOffer, RolloutPhase, RolloutStatus, SelfTestReport

JOURNAL_SCHEMA = 1
TRIAL_DEATHS = 3  # a bundle on trial with which the process died this often is given up
COMMITTED_DEATHS = 5  # a committed one only after this many in a row, each soon after the start
KEPT_RECORDS = 8
KEPT_BLOCKS = 16


class SlotName(StrEnum):
    """The two places for bundles."""

    A = "a"
    B = "b"

    @property
    def other(self) -> SlotName:
        return SlotName.B if self is SlotName.A else SlotName.A


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a slot."""

    digest: str
    name: str
    version: str
    sequence: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The last status of a campaign, and whether the coordinator has written it down."""

    status: RolloutStatus
    acknowledged: bool = False


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must survive ``kill -9``.

    ``trial`` is the offer that the active bundle is on trial for. ``deaths`` counts ends of the
    process without a clean stop (``stopped``) since the active bundle came or was last seen
    healthy. ``highest`` has the highest committed sequence per bundle name, ``blocked`` why a
    bundle (by digest) is not taken from a run again. ``pending`` is a campaign's offer under way.
    """

    schema: int = JOURNAL_SCHEMA
    slots: dict[SlotName, SlotRecord] = {}
    active: SlotName | None = None
    last_good: SlotName | None = None
    trial: RolloutOffer | None = None
    deaths: int = 0
    stopped: bool = False
    highest: dict[str, int] = {}
    blocked: dict[str, str] = {}
    pending: RolloutOffer | None = None
    sequence: int = 0
    records: tuple[Record, ...] = ()

    @property
    def in_use(self) -> SlotRecord | None:
        """The bundle to work with."""
        return None if self.active is None else self.slots.get(self.active)

    @property
    def committed(self) -> SlotRecord | None:
        """The bundle in use for good."""
        slot = self.active if self.trial is None else self.last_good
        return None if slot is None else self.slots.get(slot)

    @property
    def free_slot(self) -> SlotName:
        """Where the next bundle goes: never over one that may be gone back to."""
        kept = self.active if self.trial is None else self.last_good
        return SlotName.A if kept is None else kept.other

    def slot_of(self, digest: str) -> SlotName | None:
        """The slot that holds a bundle."""
        return next((slot for slot, held in self.slots.items() if held.digest == digest), None)

    def record_of(self, campaign: str) -> Record | None:
        """The last status of a campaign."""
        return next((r for r in self.records if r.status.campaign == campaign), None)

    @property
    def owed(self) -> tuple[RolloutStatus, ...]:
        """Statuses to repeat until they are acknowledged."""
        return tuple(record.status for record in self.records if not record.acknowledged)


def install(journal: Journal, offer: RolloutOffer, record: SlotRecord) -> Journal:
    """The bundle in the free slot is in use now, on trial."""
    slot = journal.free_slot
    return msgspec.structs.replace(
        journal,
        slots={**journal.slots, slot: record},
        active=slot,
        last_good=journal.active if journal.trial is None else journal.last_good,
        trial=offer,
        deaths=0,
        stopped=False,
        pending=None,
    )


def commit(journal: Journal) -> Journal:
    """The trial is over: the active bundle is in use for good."""
    record = journal.in_use
    assert record is not None, "only a bundle in use can be committed"
    highest = {**journal.highest}
    highest[record.name] = max(record.sequence, highest.get(record.name, 0))
    return msgspec.structs.replace(journal, trial=None, deaths=0, highest=highest)


def revert(journal: Journal, *, blocked_for: str = "") -> Journal:
    """Back to ``last_good``; the bundle that was active leaves its slot.

    With ``blocked_for``, a reason, no run can hand it to this device again.
    """
    left = journal.in_use
    slots = {slot: record for slot, record in journal.slots.items() if slot != journal.active}
    blocked = dict(journal.blocked)
    if blocked_for and left is not None:
        blocked.pop(left.digest, None)
        blocked = dict(list({**blocked, left.digest: blocked_for}.items())[-KEPT_BLOCKS:])
    return msgspec.structs.replace(
        journal,
        slots=slots,
        active=journal.last_good,
        last_good=None,
        trial=None,
        deaths=0,
        blocked=blocked,
    )


def start(journal: Journal) -> tuple[Journal, str]:
    """A process starts; with a reason, its bundle has killed too many before it."""
    if journal.active is None or journal.stopped:
        return msgspec.structs.replace(journal, stopped=False), ""
    deaths = journal.deaths + 1
    journal = msgspec.structs.replace(journal, deaths=deaths)
    if journal.trial is not None and deaths >= TRIAL_DEATHS:
        return journal, f"the agent died {deaths} times with it on trial"
    if journal.trial is None and deaths >= COMMITTED_DEATHS and journal.last_good is not None:
        return journal, f"the agent died {deaths} times in a row soon after its start"
    return journal, ""


def stop(journal: Journal) -> Journal:
    """A clean end of the process: not a death."""
    return msgspec.structs.replace(journal, stopped=True)


def survive(journal: Journal) -> Journal:
    """The process has lived for a while with a committed bundle."""
    return journal if journal.trial is not None else msgspec.structs.replace(journal, deaths=0)


def note(journal: Journal, status: RolloutStatus) -> Journal:
    """Keep a campaign's new status, numbered, to be repeated until it is acknowledged.

    What the self-test has measured stays with the attempt.
    """
    sequence = journal.sequence + 1
    before = journal.record_of(status.campaign)
    self_test = status.self_test
    if self_test is None and before is not None and before.status.attempt == status.attempt:
        self_test = before.status.self_test
    numbered = msgspec.structs.replace(status, sequence=sequence, self_test=self_test)
    record = Record(status=numbered)
    pending = journal.pending
    if pending is not None and pending.campaign == status.campaign and status.phase.is_final:
        pending = None
    others = [r for r in journal.records if r.status.campaign != status.campaign]
    return msgspec.structs.replace(
        journal,
        sequence=sequence,
        records=(*others, record)[-KEPT_RECORDS:],
        pending=pending,
    )


def acknowledge(journal: Journal, campaign: str, sequence: int) -> Journal:
    """The coordinator has written down the status of this number, and so those before it."""
    records = tuple(
        msgspec.structs.replace(record, acknowledged=True)
        if record.status.campaign == campaign and record.status.sequence <= sequence
        else record
        for record in journal.records
    )
    return journal if records == journal.records else _with_records(journal, records)


def owe_again(journal: Journal, campaign: str) -> Journal:
    """The coordinator has asked again: its account may lack the last status."""
    records = tuple(
        msgspec.structs.replace(record, acknowledged=False)
        if record.status.campaign == campaign
        else record
        for record in journal.records
    )
    return _with_records(journal, records)


def _with_records(journal: Journal, records: tuple[Record, ...]) -> Journal:
    return msgspec.structs.replace(journal, records=records)


def expect(journal: Journal, offer: RolloutOffer) -> Journal:
    """A campaign's offer is under way, and may be tried though it was given up before."""
    blocked = {held: why for held, why in journal.blocked.items() if held != offer.digest}
    return msgspec.structs.replace(journal, pending=offer, blocked=blocked)


def adopt(journal: Journal, offer: RolloutOffer) -> Journal:
    """The trial that is on counts for this offer of the same bundle from now on."""
    return msgspec.structs.replace(journal, trial=offer)


def forget(journal: Journal, slot: SlotName) -> Journal:
    """A slot's file is not what it should be."""
    slots = {held: record for held, record in journal.slots.items() if held is not slot}
    return msgspec.structs.replace(journal, slots=slots)


def build_status(
    offer: RolloutOffer,
    phase: RolloutPhase,
    detail: str = "",
    *,
    self_test: SelfTestReport | None = None,
) -> RolloutStatus:
    """A status that answers an offer."""
    return RolloutStatus(
        digest=offer.digest,
        phase=phase,
        detail=detail[:1000],
        campaign=offer.campaign,
        attempt=offer.attempt,
        self_test=self_test,
    )


def owner_of(journal: Journal, digest: str) -> RolloutOffer:
    """What to answer about a bundle in use: its trial, or the campaign that committed it."""
    if journal.trial is not None and journal.trial.digest == digest:
        return journal.trial
    offer = RolloutOffer(digest=digest, size_bytes=1, chunk_bytes=1)
    for record in reversed(journal.records):
        status = record.status
        if (status.digest, status.phase) == (digest, RolloutPhase.COMMITTED):
            return msgspec.structs.replace(offer, campaign=status.campaign, attempt=status.attempt)
    return offer
