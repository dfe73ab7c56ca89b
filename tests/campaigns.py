"""A campaign and its devices in memory, for tests of the state machine."""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.rollout.actions import Action, Announce, Report, SendCancel, SendOffer
from coordinator.rollout.campaign import Campaign
from coordinator.rollout.records import (
    BundleFacts,
    CampaignRecord,
    CampaignSettings,
    DeviceEntry,
    DevicePhase,
)
from coordinator.rollout.selection import Candidate, plan_campaign

FACTS = BundleFacts(digest="ab" * 32, size_bytes=300_000, name="gait", version="7")

STAGES = (
    DevicePhase.DOWNLOADING,
    DevicePhase.TESTING,
    DevicePhase.TRIAL,
    DevicePhase.COMMITTED,
)


def device_names(count: int) -> list[str]:
    return [f"gw-{number:03}" for number in range(count)]


def build_settings(**settings: Any) -> CampaignSettings:
    defaults: dict[str, Any] = {"soak_s": 60.0, "trial_s": 10.0}
    return msgspec.convert(defaults | settings, CampaignSettings)


class Trial:
    """A campaign with a clock of its own; ``offered`` and ``cancelled`` list what devices got."""

    def __init__(self, devices: int = 10, *, online: bool = True, **settings: Any) -> None:
        self.now_s = 1_000_000.0
        self.offered: list[str] = []
        self.attempts: dict[str, int] = {}
        self.cancelled: list[tuple[str, bool]] = []
        self.said: list[str] = []
        self.sequence: dict[str, int] = {}
        self.stored: dict[str, DeviceEntry] = {}
        self.stored_record: CampaignRecord | None = None
        names = device_names(devices)
        plan = plan_campaign(
            "c-1",
            FACTS,
            build_settings(**settings),
            [Candidate(device=name, online=online) for name in names],
        )
        self.order = [device.device for device in plan.devices]
        self.campaign = Campaign.begin(
            plan, build_settings(**settings), fleet="lab", now_s=self.now_s
        )
        self.store()
        if online:
            self.come(*names)

    def store(self) -> None:
        """Keep what the campaign wants written down."""
        record, entries = self.campaign.take_changes()
        self.stored_record = record or self.stored_record
        self.stored |= {entry.device: entry for entry in entries}

    def take(self, actions: list[Action]) -> None:
        self.store()  # before anything is done, as the service does it
        for action in actions:
            match action:
                case SendOffer(device=device, attempt=attempt):
                    self.offered.append(device)
                    self.attempts[device] = attempt
                case SendCancel(device=device, revert=revert, attempt=attempt):
                    assert attempt == self.attempts.get(device, 0), "not the attempt that is on"
                    self.cancelled.append((device, revert))
                case Announce(text=text):
                    self.said.append(text)

    def restart(self) -> None:
        """kill -9 and start: all that is left is what was stored."""
        assert self.stored_record is not None
        self.campaign = Campaign(self.stored_record, self.stored.values(), started_s=self.now_s)

    def come(self, *names: str) -> None:
        for name in names:
            self.take(self.campaign.device_present(name, online=True, now_s=self.now_s))

    def leave(self, *names: str) -> None:
        for name in names:
            self.take(self.campaign.device_present(name, online=False, now_s=self.now_s))

    def tick(self, seconds: float = 0.0) -> None:
        self.now_s += seconds
        self.take(self.campaign.tick(self.now_s))

    def say(self, name: str, phase: DevicePhase, detail: str = "", **report: Any) -> None:
        self.sequence[name] = self.sequence.get(name, 0) + 1
        said = Report(
            phase=phase,
            detail=detail,
            **{"attempt": self.attempts.get(name, 0), "sequence": self.sequence[name]} | report,
        )
        self.take(self.campaign.device_reported(name, said, self.now_s))

    def commit(self, *names: str) -> None:
        for name in names:
            for phase in STAGES:
                self.say(name, phase)

    def commit_offered(self) -> None:
        """Every device that has an offer goes all the way."""
        active = (DevicePhase.OFFERED, DevicePhase.DOWNLOADING, DevicePhase.TRIAL)
        self.commit(*(entry.device for entry in self.campaign.ledger.in_phases(active)))

    def finish(self) -> None:
        """Commit all, wave by wave, until the campaign is over."""
        for _ in range(2 * self.campaign.record.waves + 2):
            self.tick(1.0)
            self.commit_offered()
            self.tick(self.campaign.record.settings.soak_s)

    def phase(self, name: str) -> DevicePhase:
        return self.campaign.ledger[name].phase

    @property
    def counts(self) -> dict[str, int]:
        return self.campaign.ledger.counts()
