"""The campaigns of a fleet in a running coordinator: messages in, records and messages out.

Owned by the service's one thread. What a message changes is kept in memory until ``flush`` has
written it down in one transaction; only then are offers, cancels and acknowledgements sent. A
coordinator that is killed in between has said nothing that it does not know any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from coordinator.outgoing import Publish
from coordinator.registry import Device, Registry
from coordinator.rollout.actions import Action, Announce, Report, SendCancel, SendOffer
from coordinator.rollout.campaign import Campaign
from coordinator.rollout.campaign_journal import CampaignJournal
from coordinator.rollout.delivery import Delivery
from coordinator.rollout.records import (
    ACTIVE_PHASES,
    ENDED_PHASES,
    BundleFacts,
    CampaignPhase,
    CampaignRecord,
    CampaignSettings,
    DevicePhase,
    SelfTest,
)
from coordinator.rollout.selection import (
    CampaignPlan,
    Candidate,
    campaign_id,
    is_selected,
    obstacle,
    plan_campaign,
)
from wire.errors import ConfigError, PeerProtocolError, Refusal, TransportError
from wire.messages import RolloutPhase, RolloutStatus
from wire.topics import NAME_RULE, is_valid_name

logger = logging.getLogger(__name__)

TICK_S = 0.25
FLUSH_S = 0.05  # how long changes may be collected into one transaction
KEPT_ENDED = 5  # campaigns that are over and stay in memory: their devices may still report

_PHASES = {
    RolloutPhase.WANTED: DevicePhase.DOWNLOADING,
    RolloutPhase.VERIFIED: DevicePhase.TESTING,
    RolloutPhase.INSTALLED: DevicePhase.TRIAL,
    RolloutPhase.COMMITTED: DevicePhase.COMMITTED,
    RolloutPhase.REFUSED: DevicePhase.REFUSED,
    RolloutPhase.FAILED: DevicePhase.FAILED,
    RolloutPhase.REVERTED: DevicePhase.REVERTED,
    RolloutPhase.CANCELLED: DevicePhase.CANCELLED,
}

RunMembers = Callable[[], tuple[str, frozenset[str]]]


def no_run() -> tuple[str, frozenset[str]]:
    """Digest and devices of the run, where none is on."""
    return "", frozenset()


class RolloutDesk:
    """All campaigns of a fleet; ``run_members`` tells bundle and devices of the run that is on."""

    def __init__(
        self,
        journal: CampaignJournal,
        registry: Registry,
        publish: Publish,
        *,
        fleet: str,
        run_members: RunMembers = no_run,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self.delivery = Delivery(publish, journal.bundle)
        self.fleet = fleet
        self._registry = registry
        self._run_members = run_members
        self._clock = clock
        self._monotonic = monotonic
        self._began_s = clock()
        self._campaigns: dict[str, Campaign] = {}
        self._actions: list[tuple[Campaign, Action]] = []
        self._words: list[tuple[str, RolloutStatus]] = []
        self._unwritten: dict[str, bytes | None] = {}
        self._is_store_lost = False
        self._tick_s = 0.0
        self._flush_s = 0.0
        self._load()

    # What others may ask

    def campaigns(self) -> list[Campaign]:
        """Those in memory: all that are not over, and the newest that are."""
        return list(self._campaigns.values())

    def find(self, name: str) -> Campaign | None:
        """A campaign of the fleet, from memory or store."""
        campaign = self._campaigns.get(name)
        if campaign is None and (record := self.journal.record(name)) is not None:
            campaign = self._take_up(record)
        return campaign

    def hold_on(self, device: str) -> str:
        """Why a run must not hand its own bundle to a device now; empty if it may.

        A campaign that has begun with a device ends first; and what a campaign has committed since
        this process began is not undone by a run that was already on.
        """
        for campaign in self._campaigns.values():
            entry = campaign.ledger.get(device)
            if entry is None:
                continue
            is_busy = entry.phase in ACTIVE_PHASES or entry.phase is DevicePhase.CANCELLING
            is_recent = entry.phase is DevicePhase.COMMITTED and entry.since_s >= self._began_s
            if is_busy or is_recent or campaign.has_updated(device):
                bundle = campaign.record.bundle
                return f"rollout {campaign.name} of {bundle.name} {bundle.version}: {entry.phase}"
        return ""

    def candidates(self) -> Iterator[Candidate]:
        """Every device that the coordinator knows, as a campaign sees it."""
        run_bundle, members = self._run_members()
        for device in self._registry.devices.values():
            if device.birth is not None:
                in_run = run_bundle if device.name in members else ""
                yield self._candidate(device, in_run)

    def plan(self, bundle: BundleFacts, settings: CampaignSettings, name: str = "") -> CampaignPlan:
        """Who would come when; raises ConfigError for waves or an id that cannot be."""
        taken = set(self.journal.names()) | set(self._campaigns)
        if name and not is_valid_name(name):
            raise ConfigError(f"expected {NAME_RULE}; received {name!r}", field="name")
        if name in taken:
            raise ConfigError(f"expected a new campaign, {name!r} is there already", field="name")
        return plan_campaign(
            name or campaign_id(bundle, taken), bundle, settings, self.candidates()
        )

    # Events

    def device_changed(self, device: Device) -> None:
        """A birth or state came."""
        now_s = self._clock()
        for campaign in list(self._campaigns.values()):
            present = campaign.device_present(device.name, online=device.is_online, now_s=now_s)
            self._queue(campaign, present)
            self._offer_to_join(campaign, device, now_s)

    def answer(self, device: Device, status: RolloutStatus) -> None:
        """Take a status of a campaign; raises PeerProtocolError for one that belongs to none."""
        campaign = self.find(status.campaign)
        if status.phase is not RolloutPhase.WANTED:
            self._words.append((device.name, status))  # else it is repeated for ever
        if (
            campaign is None
            or device.name not in campaign.ledger
            or status.digest != campaign.record.bundle.digest
        ):
            raise PeerProtocolError(
                Refusal.FOREIGN_BUNDLE,
                f"rollout {status.campaign[:64]!r} has not offered {status.digest[:12]}",
            )
        report = _report(status)
        self._queue(campaign, campaign.device_reported(device.name, report, self._clock()))
        self._serve(campaign, device.name, status)

    def connected(self) -> None:
        """The broker is there (again): nobody could be heard meanwhile."""
        for campaign in self._campaigns.values():
            campaign.rearm(self._clock())

    def turn(self, now_s: float) -> None:
        """Do what is due (monotonic time); call it in each turn of the loop while connected."""
        if now_s >= self._tick_s:
            self._tick_s = now_s + TICK_S
            self._tick()
            self.flush()
        elif now_s >= self._flush_s and (self._actions or self._words):
            self._flush_s = now_s + FLUSH_S
            self.flush()
        self.delivery.send_due(now_s)

    @property
    def is_sending(self) -> bool:
        """Whether the loop should turn often."""
        return self.delivery.is_sending or bool(self._actions or self._words)

    # Orders

    def begin(self, plan: CampaignPlan, settings: CampaignSettings) -> Campaign:
        """Start a campaign; its first offers go out with the next turn."""
        now_s = self._clock()
        campaign = Campaign.begin(plan, settings, fleet=self.fleet, now_s=now_s)
        self._campaigns[campaign.name] = campaign
        self._tell_presence(campaign)
        bundle = plan.bundle
        logger.info(
            "%s: %s %s for %d devices in %d waves",
            campaign.name,
            bundle.name,
            bundle.version,
            len(plan.devices),
            len(plan.waves),
        )
        return campaign

    def order(self, campaign: Campaign, perform: Callable[[float], list[Action]]) -> None:
        """Perform an operator's order; raises CampaignError if it does not fit."""
        self._queue(campaign, perform(self._clock()))

    def flush(self) -> bool:
        """Write down what has changed, then do what follows from it; False if the store fails."""
        for campaign in self._campaigns.values():
            record, entries = campaign.take_changes()
            self._unwritten |= self.journal.encode(campaign.name, record, entries)
        try:
            self.journal.write(self._unwritten)
        except TransportError as exc:
            level = logging.DEBUG if self._is_store_lost else logging.WARNING
            logger.log(level, "rollouts wait: %s", exc)
            self._is_store_lost = True
            return False
        self._is_store_lost = False
        self._unwritten.clear()
        actions, self._actions = self._actions, []
        words, self._words = self._words, []
        for campaign, action in actions:
            self._perform(campaign, action)
        for device, status in words:
            self.delivery.acknowledge(device, status)
        return True

    def close(self, *, write: bool = True) -> None:
        """Write down what is left, unless that is another's by now, and close the store."""
        if write:
            self.flush()
        self.journal.close()

    # Inside

    def _load(self) -> None:
        records = [self.journal.record(name) for name in self.journal.names()]
        known = sorted((r for r in records if r is not None), key=lambda r: -r.created_s)
        ended = [record for record in known if record.phase in ENDED_PHASES]
        for record in known:
            if record.phase not in ENDED_PHASES or record in ended[:KEPT_ENDED]:
                self._take_up(record)

    def _take_up(self, record: CampaignRecord) -> Campaign:
        entries = self.journal.entries(record.campaign)
        campaign = Campaign(record, entries, started_s=self._clock())
        self._campaigns[record.campaign] = campaign
        self._tell_presence(campaign)
        if campaign.is_open:
            logger.info("%s: goes on, %s", campaign.name, record.phase)
            self._check_bundle(campaign)
        return campaign

    def _check_bundle(self, campaign: Campaign) -> None:
        """Without its bundle a campaign can do nothing; an operator has to know."""
        if self.journal.has_bundle(campaign.record.bundle.digest):
            return
        if campaign.record.phase is not CampaignPhase.PAUSED:
            reason = "the file of its bundle is gone from the coordinator"
            self._queue(campaign, campaign.pause(self._clock(), reason))

    def _tell_presence(self, campaign: Campaign) -> None:
        now_s = self._clock()
        for device in self._registry.devices.values():
            if device.birth is not None:
                self._queue(
                    campaign,
                    campaign.device_present(device.name, online=device.is_online, now_s=now_s),
                )

    def _candidate(self, device: Device, run_bundle: str, ignoring: str = "") -> Candidate:
        birth = device.birth
        assert birth is not None
        holders = (c.name for c in self._campaigns.values() if c.name != ignoring)
        return Candidate(
            device=device.name,
            online=device.is_online,
            bundle=birth.bundle or "",
            labels=birth.labels,
            sample_shape=birth.sample_shape,
            classes=len(birth.label_counts),
            can_train=bool(birth.capabilities.backward),
            run_bundle=run_bundle,
            held_by=next((n for n in holders if self._campaigns[n].holds(device.name)), ""),
        )

    def _offer_to_join(self, campaign: Campaign, device: Device, now_s: float) -> None:
        record = campaign.record
        if not record.settings.include_new or not campaign.is_open or device.birth is None:
            return
        if device.name in campaign.ledger or not device.is_online:
            return
        run_bundle, members = self._run_members()
        in_run = run_bundle if device.name in members else ""
        candidate = self._candidate(device, in_run, campaign.name)
        is_wanted = is_selected(candidate, record.settings.selection)
        if is_wanted and not obstacle(candidate, record.bundle, record.settings):
            self._queue(campaign, campaign.join(device.name, now_s))

    def _serve(self, campaign: Campaign, device: str, status: RolloutStatus) -> None:
        """Send chunks to a device that downloads; stop for one that does not."""
        entry = campaign.ledger[device]
        is_current = status.attempt == entry.attempt
        if status.phase is RolloutPhase.WANTED:
            if entry.phase is DevicePhase.DOWNLOADING and is_current:
                now_s = self._monotonic()
                self.delivery.want(campaign.record, device, status.offset_bytes, now_s)
        elif is_current:
            self.delivery.forget(campaign.record, device)

    def _tick(self) -> None:
        now_s = self._clock()
        run_bundle, members = self._run_members()
        for campaign in self._campaigns.values():
            settings = campaign.record.settings
            is_foreign = run_bundle != campaign.record.bundle.digest
            busy = members if is_foreign and not settings.take_from_run else frozenset()
            self._queue(campaign, campaign.tick(now_s, busy))

    def _queue(self, campaign: Campaign, actions: list[Action]) -> None:
        self._actions += [(campaign, action) for action in actions]

    def _perform(self, campaign: Campaign, action: Action) -> None:
        record = campaign.record
        match action:
            case SendOffer(device=device, attempt=attempt):
                self.delivery.offer(record, device, attempt)
            case SendCancel(device=device, revert=revert, attempt=attempt):
                self.delivery.forget(record, device)
                self.delivery.cancel(record, device, attempt, revert=revert)
            case Announce(text=text):
                logger.info("%s: %s", campaign.name, text)


def _report(status: RolloutStatus) -> Report:
    test = status.self_test
    return Report(
        phase=_PHASES[status.phase],
        attempt=status.attempt,
        sequence=status.sequence,
        detail=status.detail,
        self_test=None
        if test is None
        else SelfTest(
            seconds=test.seconds,
            peak_bytes=test.peak_bytes,
            max_error=test.max_error,
            gradient_error=test.gradient_error,
        ),
    )
