"""What a campaign does with each of its devices: follows, tells, gives up. Pure.

The part of ``Campaign`` that looks at one device at a time; phases and waves are in
``campaign.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from coordinator.rollout.actions import Action, Report, SendCancel, SendOffer
from coordinator.rollout.ledger import Ledger
from coordinator.rollout.records import (
    ACTIVE_PHASES,
    ENDED_PHASES,
    OPEN_PHASES,
    CampaignPhase,
    CampaignRecord,
    DeviceEntry,
    DevicePhase,
)

REPEAT_S = 30.0  # a device that is there and says nothing is told again
LEAST_REPEAT_S = 2.0  # a birth and its state come together: one word is enough
WORD_S = 10.0  # beyond the limits that devices keep themselves
BURST_S = 1.0  # offers that the rate allowed meanwhile and that may go out together

_STAGES = (
    DevicePhase.PLANNED,
    DevicePhase.OFFERED,
    DevicePhase.DOWNLOADING,
    DevicePhase.TESTING,
    DevicePhase.TRIAL,
)


class DeviceCare:
    """Record, devices and presence of a campaign, and the rules for a single device."""

    def __init__(
        self, record: CampaignRecord, entries: Iterable[DeviceEntry], *, started_s: float
    ) -> None:
        """``started_s`` is when this process took the campaign up."""
        self.record = record
        self.ledger = Ledger(entries)
        self._started_s = started_s
        self._online: set[str] = set()
        self._offline_since: dict[str, float] = {}
        self._busy: frozenset[str] = frozenset()

    def is_online(self, device: str) -> bool:
        """Whether the device is there, as far as is known."""
        return device in self._online

    @property
    def is_ended(self) -> bool:
        return self.record.phase in ENDED_PHASES

    def _set(self, phase: CampaignPhase, now_s: float, reason: str) -> None:
        self.record = replace(self.record, phase=phase, since_s=now_s, reason=reason)

    # What devices say

    def _follow(self, entry: DeviceEntry, report: Report, now_s: float) -> list[Action]:
        """Move the entry to where its device says that it is, or tell the device otherwise."""
        if entry.phase is DevicePhase.CANCELLING:
            return self._follow_cancelled(entry, report, now_s)
        if entry.phase is DevicePhase.COMMITTED and report.phase in ACTIVE_PHASES:
            return []
        if entry.is_terminal and report.phase in ACTIVE_PHASES:
            # Given up here, at work there: it is told to stop, and says what became of it.
            return self._cancel(entry, now_s, revert=True, because="went on after its end here")
        if report.phase is DevicePhase.COMMITTED and self._is_unwanted():
            return self._cancel(entry, now_s, revert=True, because="")
        self._move(entry, report.phase, now_s, report.detail)
        return []

    def _follow_cancelled(self, entry: DeviceEntry, report: Report, now_s: float) -> list[Action]:
        is_in_use = report.phase in (DevicePhase.TRIAL, DevicePhase.COMMITTED)
        if is_in_use and not entry.revert:
            # It was faster than the order to stop, and may keep what it has.
            self._move(entry, report.phase, now_s, report.detail)
            return []
        if is_in_use or report.phase in ACTIVE_PHASES:
            return self._tell(entry, now_s) if now_s - entry.told_s >= REPEAT_S else []
        self._move(entry, report.phase, now_s, report.detail)
        return []

    def _is_unwanted(self) -> bool:
        """Whether devices must not keep the bundle, however late they say that they have it."""
        return self.record.revert and self.record.phase not in OPEN_PHASES

    def _move(self, entry: DeviceEntry, phase: DevicePhase, now_s: float, detail: str) -> None:
        """Only a stage further than any before begins a new limit."""
        furthest, since_s = entry.furthest, entry.since_s
        if phase not in _STAGES or _STAGES.index(phase) > _STAGES.index(furthest):
            furthest, since_s = (phase if phase in _STAGES else furthest), now_s
        self.ledger.put(
            replace(entry, phase=phase, furthest=furthest, since_s=since_s, detail=detail)
        )

    # What devices are told

    def _offer_due(self, now_s: float) -> list[Action]:
        """Offers to devices of the open waves that are there, as fast as the rate allows."""
        actions: list[Action] = []
        if not self.ledger.count([DevicePhase.PLANNED]):
            return actions
        rate = self.record.settings.rate_per_min
        next_s = max(self.record.next_offer_s, now_s - BURST_S)
        for entry in self.ledger.in_phases([DevicePhase.PLANNED]):
            if entry.wave > self.record.wave or (rate and next_s > now_s):
                break
            if entry.device not in self._online or entry.device in self._busy:
                continue
            self._move(replace(entry, told_s=now_s), DevicePhase.OFFERED, now_s, "")
            actions.append(SendOffer(entry.device, entry.attempt))
            next_s += 60.0 / rate if rate else 0.0
        if actions:
            self.record = replace(self.record, next_offer_s=next_s)
        return actions

    def _repeat(self, now_s: float) -> list[Action]:
        """Tell devices again that are there, and that nothing has been heard of since."""
        actions: list[Action] = []
        stages = (DevicePhase.OFFERED, DevicePhase.CANCELLING)
        for entry in self.ledger.in_phases(stages):
            quiet_s = now_s - max(entry.told_s, self._started_s)
            if entry.device in self._online and quiet_s >= REPEAT_S:
                actions += self._tell(entry, now_s)
        return actions

    def _tell(self, entry: DeviceEntry, now_s: float) -> list[Action]:
        """Say to a device what holds for it."""
        self.ledger.put(replace(entry, told_s=now_s))
        if entry.is_cancelled:
            return [SendCancel(entry.device, entry.revert, entry.attempt)]
        return [SendOffer(entry.device, entry.attempt)]

    def _cancel(
        self, entry: DeviceEntry, now_s: float, *, revert: bool, because: str
    ) -> list[Action]:
        self.ledger.put(
            replace(
                entry,
                phase=DevicePhase.CANCELLING,
                since_s=now_s,
                told_s=now_s,
                is_cancelled=True,
                revert=revert,
                detail=because,
            )
        )
        if self.is_ended:
            self._set(_closing_phase(self.record.phase), now_s, self.record.reason)
        return [SendCancel(entry.device, revert, entry.attempt)]

    # Time

    def _time_out(self, now_s: float) -> list[Action]:
        """End what has taken too long."""
        actions: list[Action] = []
        for entry in self.ledger.in_phases((*ACTIVE_PHASES, DevicePhase.CANCELLING)):
            limit_s = self._limit_s(entry)
            if now_s - max(entry.since_s, self._started_s) >= limit_s:
                actions += self._give_up(entry, limit_s, now_s)
        if self.record.phase is CampaignPhase.RUNNING:
            self._give_up_absent(now_s)
        return actions

    def _limit_s(self, entry: DeviceEntry) -> float:
        """How long the device may stay; it keeps most limits itself, and is left time to say so."""
        limits = self.record.settings.limits
        if entry.phase is DevicePhase.CANCELLING or entry.furthest is DevicePhase.OFFERED:
            return limits.offered_s
        own_s = {
            DevicePhase.DOWNLOADING: limits.download_s,
            DevicePhase.TESTING: limits.self_test_s,
            DevicePhase.TRIAL: limits.commit_s,
        }[entry.furthest]
        return own_s + min(own_s, WORD_S)

    def _give_up(self, entry: DeviceEntry, limit_s: float, now_s: float) -> list[Action]:
        if entry.phase is DevicePhase.OFFERED and entry.device not in self._online:
            self._move(entry, DevicePhase.UNREACHABLE, now_s, "gone since it was offered")
            return []
        detail = f"{entry.phase} for more than {limit_s:g} s"
        if entry.phase is not DevicePhase.CANCELLING:
            # It must not go on: what is not committed goes back.
            entry = replace(entry, is_cancelled=True, revert=True, told_s=now_s)
        self._move(entry, DevicePhase.TIMED_OUT, now_s, detail)
        return [SendCancel(entry.device, entry.revert, entry.attempt)]

    def _give_up_absent(self, now_s: float) -> None:
        """Devices of the open waves that have been away for too long."""
        limit_s = self.record.settings.limits.offered_s
        for entry in self.ledger.in_phases([DevicePhase.PLANNED]):
            if entry.wave > self.record.wave:
                break
            is_busy = entry.device in self._busy
            if entry.device in self._online and not is_busy:
                continue
            away_s = now_s - max(
                entry.since_s,
                self.record.wave_since_s,
                self._started_s,
                self._offline_since.get(entry.device, 0.0),
            )
            if away_s >= limit_s:
                state = "in a run" if is_busy else "away"
                detail = f"{state} for more than {limit_s:g} s"
                self._move(entry, DevicePhase.UNREACHABLE, now_s, detail)


def is_news(entry: DeviceEntry, report: Report) -> bool:
    """Reports are repeated until they are acknowledged; requests for chunks are always news."""
    if report.phase is DevicePhase.DOWNLOADING:
        return entry.phase is not DevicePhase.DOWNLOADING
    return report.sequence > entry.sequence or (
        report.sequence == entry.sequence and report.phase is not entry.phase
    )


def _closing_phase(ended: CampaignPhase) -> CampaignPhase:
    """Where a campaign goes back to when a device turns up late."""
    if ended is CampaignPhase.ROLLED_BACK:
        return CampaignPhase.ROLLING_BACK
    return CampaignPhase.ABORTING
