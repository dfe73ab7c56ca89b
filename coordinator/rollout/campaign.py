"""A campaign as a state machine: events in, actions out.

    RUNNING ──► SOAKING ──► RUNNING (next wave) … ──► COMPLETED ──► ROLLING_BACK ──► ROLLED_BACK
       │  ▲        │
       ▼  │        ▼        too many failed or lost, or the operator says so
      PAUSED ──► ABORTING ──► ABORTED

No sockets, clock, files or threads: time is an argument (Unix seconds, so that limits hold over a
restart). What has changed is taken by the owner and written down before it performs the actions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from coordinator.rollout.actions import Action, Announce, Report
from coordinator.rollout.device_care import LEAST_REPEAT_S, DeviceCare, is_news
from coordinator.rollout.records import (
    ACTIVE_PHASES,
    CLOSING_PHASES,
    OPEN_PHASES,
    RETRIED_PHASES,
    CampaignPhase,
    CampaignRecord,
    CampaignSettings,
    DeviceEntry,
    DevicePhase,
)
from coordinator.rollout.selection import CampaignPlan
from coordinator.rollout.verdict import find_fault

SETTLE_S = 15.0  # after a start of the coordinator: until then presence is not known


class CampaignError(ValueError):
    """An order that does not fit where the campaign is; the text says where that is."""


class Campaign(DeviceCare):
    """State of one campaign; one owner calls it and performs the actions."""

    def __init__(
        self, record: CampaignRecord, entries: Iterable[DeviceEntry], *, started_s: float
    ) -> None:
        """``started_s`` is when this process took the campaign up."""
        super().__init__(record, entries, started_s=started_s)
        self._written: CampaignRecord | None = record

    @classmethod
    def begin(
        cls, plan: CampaignPlan, settings: CampaignSettings, *, fleet: str, now_s: float
    ) -> Campaign:
        """A new campaign from its plan; nothing is offered before the first ``tick``."""
        record = CampaignRecord(
            campaign=plan.campaign,
            fleet=fleet,
            bundle=plan.bundle,
            settings=settings,
            phase=CampaignPhase.RUNNING,
            waves=max(1, len(plan.waves)),
            planned_waves=max(1, len(plan.waves)),
            created_s=now_s,
            since_s=now_s,
            wave_since_s=now_s,
            left_out=len(plan.left_out),
        )
        campaign = cls(record, (), started_s=now_s - SETTLE_S)
        campaign._written = None
        for rank, device in enumerate(plan.devices):
            campaign.ledger.put(
                DeviceEntry(device=device.device, wave=device.wave, rank=rank, since_s=now_s)
            )
        return campaign

    # What the owner may ask

    @property
    def name(self) -> str:
        return self.record.campaign

    @property
    def is_open(self) -> bool:
        """Whether it goes on by itself, or waits for an operator."""
        return self.record.phase in OPEN_PHASES

    def holds(self, device: str) -> bool:
        """Whether the campaign is not over with the device: no other may have it."""
        entry = self.ledger.get(device)
        return entry is not None and not self.is_ended and not entry.is_terminal

    def has_updated(self, device: str) -> bool:
        """Whether the device runs the bundle because of this campaign, which is still on."""
        return not self.is_ended and self.ledger.uses_bundle(device)

    def take_changes(self) -> tuple[CampaignRecord | None, list[DeviceEntry]]:
        """What to write down: the record if it changed, and the entries that did."""
        record = None if self.record is self._written else self.record
        self._written = self.record
        return record, self.ledger.take_changed()

    # Events

    def rearm(self, now_s: float) -> None:
        """The coordinator was away: devices could not be heard, and get their time again."""
        self._started_s = now_s

    def device_present(self, device: str, *, online: bool, now_s: float) -> list[Action]:
        """A device came, left, or said again that it is there."""
        if online:
            self._online.add(device)
            self._offline_since.pop(device, None)
        else:
            self._online.discard(device)
            self._offline_since.setdefault(device, now_s)
        entry = self.ledger.get(device)
        if not online or entry is None:
            return []
        owes = (DevicePhase.CANCELLING, DevicePhase.TIMED_OUT)
        if entry.is_cancelled and entry.phase in owes and now_s - entry.told_s > LEAST_REPEAT_S:
            return self._tell(entry, now_s)  # it may have been away when it was told
        if entry.phase is DevicePhase.UNREACHABLE and self._takes_new():
            return self._plan_again(entry, max(entry.wave, self.record.wave), now_s)
        return []

    def join(self, device: str, now_s: float) -> list[Action]:
        """A device that was not known when the plan was made; it comes with the last wave."""
        if device in self.ledger or not self._takes_new():
            return []
        rank = len(self.ledger)
        entry = DeviceEntry(device=device, wave=self.record.waves - 1, rank=rank, since_s=now_s)
        self.ledger.put(entry)
        return [Announce(f"{device} joins"), *self._advance(now_s)]

    def device_reported(self, device: str, report: Report, now_s: float) -> list[Action]:
        """A device of the campaign said where it is. Reports of old are no news."""
        entry = self.ledger[device]
        if report.attempt != entry.attempt or not is_news(entry, report):
            return []
        entry = replace(
            entry,
            sequence=max(entry.sequence, report.sequence),
            self_test=report.self_test or entry.self_test,
        )
        self.ledger.put(entry)
        return self._follow(entry, report, now_s) + self._judge(now_s) + self._advance(now_s)

    def tick(self, now_s: float, busy: frozenset[str] = frozenset()) -> list[Action]:
        """Offer what is due, act on limits, go on to the next wave.

        ``busy`` devices are not to be disturbed: they take part in a run of another bundle.
        """
        self._busy = busy
        actions: list[Action] = []
        if not self.is_ended:
            actions += self._time_out(now_s) + self._repeat(now_s)
        actions += self._judge(now_s) + self._advance(now_s)
        if self.record.phase is CampaignPhase.RUNNING:
            actions += self._offer_due(now_s)
        return actions

    # Orders of an operator

    def pause(self, now_s: float, reason: str = "by an operator") -> list[Action]:
        """Offer nothing more and open no wave; what has begun goes on."""
        if self.record.phase not in (CampaignPhase.RUNNING, CampaignPhase.SOAKING):
            raise CampaignError(f"expected a running campaign, {self.name} is {self.record.phase}")
        self._set(CampaignPhase.PAUSED, now_s, reason)
        return [Announce(f"paused: {reason}")]

    def resume(self, now_s: float) -> list[Action]:
        """Go on; a wave in which nobody committed is let pass."""
        if self.record.phase is not CampaignPhase.PAUSED:
            raise CampaignError(f"expected a paused campaign, {self.name} is {self.record.phase}")
        self._set(CampaignPhase.RUNNING, now_s, "")
        # Devices that are away could not be reached meanwhile: their time begins anew.
        self.record = replace(self.record, wave_since_s=now_s)
        if self.ledger.is_over(self.record.wave):
            self.record = replace(self.record, excused=self.record.wave)
        return [Announce("resumed"), *self._advance(now_s)]

    def abort(self, now_s: float, *, revert: bool, reason: str = "by an operator") -> list[Action]:
        """Stop; with ``revert`` devices that have committed, or are on trial, go back."""
        is_harder = revert and self.record.phase is CampaignPhase.ABORTING
        if not (self.is_open or (is_harder and not self.record.revert)):
            raise CampaignError(
                f"expected a campaign that is under way, {self.name} is {self.record.phase}"
            )
        return self._close(CampaignPhase.ABORTING, now_s, revert=revert, reason=reason)

    def roll_back(self, now_s: float, reason: str = "by an operator") -> list[Action]:
        """Call the bundle back from the devices of a campaign that is over."""
        if self.record.phase not in (CampaignPhase.COMPLETED, CampaignPhase.ABORTED):
            raise CampaignError(
                f"expected a campaign that is over, {self.name} is {self.record.phase}"
                + (": abort it with --revert" if self.is_open else "")
            )
        return self._close(CampaignPhase.ROLLING_BACK, now_s, revert=True, reason=reason)

    def retry(self, now_s: float, devices: Collection[str] = ()) -> list[Action]:
        """Offer again to devices that failed or were out of reach, as a wave of their own.

        To these ``devices`` alone if there are any; they too must have failed, all of them.
        """
        if not (self.is_open or self.record.phase is CampaignPhase.COMPLETED):
            raise CampaignError(
                f"expected a campaign that is open or completed, {self.name} is "
                f"{self.record.phase}: start a new one, devices that have the bundle are left out"
            )
        failed = self.ledger.in_phases(RETRIED_PHASES)
        if devices:
            failed = [entry for entry in failed if entry.device in devices]
            self._check_retried(devices)
        if not failed:
            raise CampaignError(f"expected devices that failed in {self.name}, there are none")
        wave = self.record.waves
        for entry in failed:
            self._plan_again(entry, wave, now_s)
        self.record = replace(self.record, waves=wave + 1)
        if self.record.phase is CampaignPhase.COMPLETED:
            self._set(CampaignPhase.RUNNING, now_s, "")
            self._open_wave(wave, now_s)
        return [Announce(f"{len(failed)} devices are tried again in wave {wave + 1}")]

    def _check_retried(self, devices: Collection[str]) -> None:
        """Raise CampaignError for the first device that did not fail here."""
        for device in sorted(devices):
            entry = self.ledger.get(device)
            if entry is None:
                raise CampaignError(f"expected a device of {self.name}, received {device}")
            if entry.phase not in RETRIED_PHASES:
                raise CampaignError(
                    f"expected a device that failed in {self.name}, {device} is {entry.phase}"
                )

    # The whole

    def _close(
        self, phase: CampaignPhase, now_s: float, *, revert: bool, reason: str
    ) -> list[Action]:
        """Stop everything that is under way; with ``revert`` also what is in use."""
        self._set(phase, now_s, reason)
        self.record = replace(self.record, revert=revert)
        for entry in self.ledger.in_phases([DevicePhase.PLANNED]):
            self._move(entry, DevicePhase.CANCELLED, now_s, "never offered")
        stopped = set(ACTIVE_PHASES) | {DevicePhase.CANCELLING}
        stopped |= {DevicePhase.COMMITTED} if revert else set()
        stopped -= set() if revert else {DevicePhase.TRIAL}
        actions: list[Action] = [Announce(f"{phase}: {reason}")]
        for entry in self.ledger.in_phases(stopped):
            actions += self._cancel(
                entry, now_s, revert=revert or entry.revert, because=entry.detail
            )
        return actions + self._advance(now_s)

    def _judge(self, now_s: float) -> list[Action]:
        """Abort if too many have failed, or were lost with the bundle."""
        if not self.is_open or now_s < self._started_s + SETTLE_S:
            return []
        lost_after_s = self.record.settings.lost_after_s
        lost = sum(
            self.ledger.uses_bundle(device)
            and now_s - max(since_s, self._started_s) >= lost_after_s
            for device, since_s in self._offline_since.items()
        )
        fault = find_fault(self.record, self.ledger, lost=lost)
        if not fault:
            return []
        revert = self.record.settings.revert_on_abort
        return self._close(CampaignPhase.ABORTING, now_s, revert=revert, reason=fault)

    def _advance(self, now_s: float) -> list[Action]:
        """Go on to where the devices allow."""
        phase = self.record.phase
        if phase in CLOSING_PHASES:
            return self._end_if_over(now_s)
        if phase is CampaignPhase.SOAKING and not self.ledger.is_over(self.record.wave):
            self._set(CampaignPhase.RUNNING, now_s, "")  # somebody joined, or is tried again
        if phase is CampaignPhase.RUNNING and self.ledger.is_over(self.record.wave):
            return self._end_wave(now_s)
        if self.record.phase is CampaignPhase.SOAKING:
            return self._end_soak(now_s)
        return []

    def _end_if_over(self, now_s: float) -> list[Action]:
        if not self.ledger.is_over(self.record.waves - 1):
            return []
        is_abort = self.record.phase is CampaignPhase.ABORTING
        self._set(
            CampaignPhase.ABORTED if is_abort else CampaignPhase.ROLLED_BACK,
            now_s,
            self.record.reason,
        )
        return [Announce(self.record.phase.value)]

    def _end_wave(self, now_s: float) -> list[Action]:
        wave = self.record.wave
        is_last = wave + 1 >= self.record.waves
        committed = self.ledger.count([DevicePhase.COMMITTED], wave)
        if not committed and not is_last and self.record.excused != wave:
            return self.pause(now_s, f"no device of wave {wave + 1} has committed")
        self._set(CampaignPhase.SOAKING, now_s, "")
        size = self.ledger.size(wave)
        return [
            Announce(f"wave {wave + 1}: {committed} of {size} committed"),
            *self._end_soak(now_s),
        ]

    def _end_soak(self, now_s: float) -> list[Action]:
        """The wave was watched for long enough: open the next one."""
        soaked_s = now_s - self.record.since_s
        if soaked_s < self.record.settings.soak_s or now_s < self._started_s + SETTLE_S:
            return []
        if self.record.wave + 1 >= self.record.waves:
            self._set(CampaignPhase.COMPLETED, now_s, "")
            return [Announce(CampaignPhase.COMPLETED.value)]
        self._set(CampaignPhase.RUNNING, now_s, "")
        self._open_wave(self.record.wave + 1, now_s)
        return [Announce(f"wave {self.record.wave + 1} of {self.record.waves} is open")]

    def _open_wave(self, wave: int, now_s: float) -> None:
        self.record = replace(self.record, wave=wave, wave_since_s=now_s)

    def _takes_new(self) -> bool:
        return self.record.settings.include_new and self.is_open

    def _plan_again(self, entry: DeviceEntry, wave: int, now_s: float) -> list[Action]:
        self.ledger.put(
            DeviceEntry(
                device=entry.device,
                wave=wave,
                rank=entry.rank,
                since_s=now_s,
                attempt=entry.attempt + 1,
            )
        )
        return self._advance(now_s)
