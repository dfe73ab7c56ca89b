"""The desk in memory: nothing is said that is not written down; chunks reach who asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rollout_devices import Behaviour, SimulatedDevice, build_sample_bundle
from coordinator.registry import Device, Registry
from coordinator.rollout.bundle_facts import describe_bundle
from coordinator.rollout.campaign import Campaign
from coordinator.rollout.campaign_journal import CampaignJournal
from coordinator.rollout.chunks import GATHER_S, IN_FLIGHT_S, QUIET_S, Chunk, ChunkSchedule
from coordinator.rollout.delivery import CHUNK_BYTES
from coordinator.rollout.desk import RolloutDesk
from coordinator.rollout.records import CampaignPhase, DevicePhase
from tests.campaigns import build_settings, device_names
from wire.errors import ConfigError, PeerProtocolError, Refusal, TransportError
from wire.messages import (
    Birth,
    DeviceState,
    Message,
    RolloutPhase,
    RolloutStatus,
    decode_message,
    encode_message,
)
from wire.topics import Channel

BUNDLE = build_sample_bundle(300_000)
FACTS = describe_bundle(BUNDLE)


class Memory:
    """A desk and simulated devices that hand each other their messages."""

    def __init__(
        self, directory: Path, devices: int = 4, behaviours: dict[str, Behaviour] | None = None
    ) -> None:
        self.directory = directory
        self.now_s = 1_000_000.0
        self.run_bundle = ""
        self.members: frozenset[str] = frozenset()
        self.published: Counter[Channel] = Counter()
        self.listening: set[str] = set()
        self.devices = {
            name: SimulatedDevice(
                name,
                send=self._sender(name),
                listen=lambda _digest, begin, name=name: (
                    self.listening.add(name) if begin else self.listening.discard(name)
                ),
                behaviour=(behaviours or {}).get(name, Behaviour()),
            )
            for name in device_names(devices)
        }
        self.is_broker_up = True
        self.open()

    def open(self) -> None:
        """A coordinator starts; devices are retained at the broker."""
        self.registry = Registry()
        url = f"sqlite:///{self.directory / 'state.sqlite'}"
        self.journal = CampaignJournal("lab", self.directory, url)
        self.desk = RolloutDesk(
            self.journal,
            self.registry,
            self._publish,
            fleet="lab",
            run_members=lambda: (self.run_bundle, self.members),
            clock=lambda: self.now_s,
            monotonic=lambda: self.now_s,
        )
        for device in self.devices.values():
            device.announce()

    def kill(self) -> None:
        """kill -9: what the desk holds in memory is gone."""
        self.journal.close()
        self.open()

    def begin(self, name: str = "c-1", **settings: Any) -> Campaign:
        self.journal.put_bundle(FACTS.digest, BUNDLE)
        wanted = build_settings(**{"soak_s": 0, "trial_s": 0, **settings})
        campaign = self.desk.begin(self.desk.plan(FACTS, wanted, name), wanted)
        self.desk.flush()
        return campaign

    def turn(self, seconds: float = 0.3) -> None:
        """Time passes; desk and devices do what is due, chunks and statuses cross at once."""
        self.now_s += seconds
        self.desk.turn(self.now_s)
        for _ in range(8):
            self.now_s += 0.3
            self.desk.turn(self.now_s)
            for device in self.devices.values():
                while device.next_s <= self.now_s:
                    device.tick(self.now_s)

    def run_until_over(self, campaign: str = "c-1") -> Campaign:
        for _ in range(60):
            self.turn()
            found = self.desk.find(campaign)
            assert found is not None
            if found.is_ended:
                return found
        raise AssertionError(found.record, found.ledger.counts())

    def say(self, name: str, message: Message, channel: Channel = Channel.ROLLOUT_STATUS) -> None:
        self._sender(name)(channel, message)

    def _sender(self, name: str) -> Any:
        def send(channel: Channel, message: Message) -> None:
            payload = encode_message(message)
            if channel is Channel.BIRTH:
                device = self.registry.on_birth(name, decode_message(payload, Birth))
                self.desk.device_changed(device)
            elif channel is Channel.STATE:
                device = self.registry.on_state(name, decode_message(payload, DeviceState))
                self.desk.device_changed(device)
            else:
                self.desk.answer(self.registry.known(name), decode_message(payload, RolloutStatus))

        return send

    def _publish(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        bundle: str | None = None,
        expiry_s: float | None = None,
    ) -> None:
        self.published[channel] += 1
        if not self.is_broker_up:
            return
        names = sorted(self.listening) if device is None else [device]
        for name in names:
            self.devices[name].receive(channel, bytes(payload), self.now_s)


def phases(campaign: Campaign) -> dict[str, int]:
    return campaign.ledger.counts()


def test_whole_fleet_commits_and_shared_chunks_go_out_once_a_wave(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 8)
    memory.begin(waves="4,100%")
    campaign = memory.run_until_over()
    assert campaign.record.phase is CampaignPhase.COMPLETED
    assert phases(campaign) == {"committed": 8}
    assert all(device.bundle == FACTS.digest for device in memory.devices.values())
    chunks = -(-len(BUNDLE) // CHUNK_BYTES)
    assert memory.published[Channel.SHARED_BUNDLE] == 2 * chunks
    assert memory.published[Channel.BUNDLE] == 0
    assert not any(device.owed for device in memory.devices.values()), "all are acknowledged"


def test_single_device_and_individual_campaigns_use_no_shared_topic(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 3)
    memory.begin(waves="1,100%", shared=False)
    memory.run_until_over()
    assert memory.published[Channel.SHARED_BUNDLE] == 0
    assert memory.published[Channel.BUNDLE] == 3 * -(-len(BUNDLE) // CHUNK_BYTES)


def test_device_that_loses_chunks_gets_them_again_alone(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 4, {"gw-002": Behaviour(loses=2)})
    memory.begin(waves="100%")
    assert phases(memory.run_until_over()) == {"committed": 4}
    chunks = -(-len(BUNDLE) // CHUNK_BYTES)
    assert memory.published[Channel.SHARED_BUNDLE] == chunks
    assert 2 <= memory.published[Channel.BUNDLE] <= chunks


def test_what_no_message_follows_from_is_written_down_too(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 1, {"gw-000": Behaviour(is_silent=True)})
    memory.begin(waves="100%")
    memory.turn()
    wanted = RolloutStatus(digest=FACTS.digest, campaign="c-1", phase=RolloutPhase.WANTED)
    memory.say("gw-000", wanted)
    memory.turn()
    assert [entry.phase for entry in memory.journal.entries("c-1")] == [DevicePhase.DOWNLOADING]


def test_self_test_and_details_stand_in_the_account(tmp_path: Path) -> None:
    memory = Memory(
        tmp_path, 2, {"gw-001": Behaviour(ends=RolloutPhase.FAILED, detail="golden output off")}
    )
    memory.begin(waves="100%", max_failed=1)
    campaign = memory.run_until_over()
    committed, failed = campaign.ledger["gw-000"], campaign.ledger["gw-001"]
    assert committed.self_test is not None
    assert committed.self_test.peak_bytes == 1_000_000
    assert (failed.phase, failed.detail) == (DevicePhase.FAILED, "golden output off")


class TestWrittenBeforeSaid:
    def test_nothing_is_said_while_the_store_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = Memory(tmp_path, 2)
        memory.begin(waves="100%")

        def refuse(_items: object) -> None:
            raise TransportError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(memory.journal, "write", refuse)
            memory.turn()
            memory.turn()
            assert memory.published[Channel.ROLLOUT] == 0
        campaign = memory.run_until_over()
        assert phases(campaign) == {"committed": 2}
        assert all(len(device.offers) == 1 for device in memory.devices.values())

    def test_killed_coordinator_goes_on_in_the_same_wave_and_offers_nobody_twice(
        self, tmp_path: Path
    ) -> None:
        memory = Memory(tmp_path, 6)
        memory.begin(waves="2,4,100%")
        for _ in range(40):
            memory.kill()
            memory.turn(6.0)
            if memory.desk.campaigns()[0].is_ended:
                break
            memory.turn(20.0)
        campaign = memory.run_until_over()
        assert phases(campaign) == {"committed": 6}
        assert [len(device.offers) for device in memory.devices.values()] == [1] * 6

    def test_pause_outlives_a_kill(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 4)
        campaign = memory.begin(waves="1,100%")
        memory.desk.order(campaign, lambda now_s: campaign.pause(now_s, "inventory"))
        memory.desk.flush()
        memory.kill()
        for _ in range(5):
            memory.turn(30.0)
        found = memory.desk.find("c-1")
        assert found is not None
        assert (found.record.phase, found.record.reason) == (CampaignPhase.PAUSED, "inventory")
        assert not any(device.offers for device in memory.devices.values())

    def test_campaign_whose_bundle_file_is_gone_pauses_with_the_reason(
        self, tmp_path: Path
    ) -> None:
        memory = Memory(tmp_path, 2)
        memory.begin(waves="1,100%")
        (tmp_path / "bundles" / f"{FACTS.digest}.bundle").unlink()
        memory.kill()
        campaign = memory.desk.campaigns()[0]
        assert campaign.record.phase is CampaignPhase.PAUSED
        assert "file of its bundle is gone" in campaign.record.reason


class TestStrangers:
    @pytest.mark.parametrize(
        "status",
        [
            RolloutStatus(digest=FACTS.digest, campaign="nobody", phase=RolloutPhase.COMMITTED),
            RolloutStatus(digest="cd" * 32, campaign="c-1", phase=RolloutPhase.COMMITTED),
        ],
    )
    def test_status_of_no_campaign_is_refused_and_yet_acknowledged(
        self, tmp_path: Path, status: RolloutStatus
    ) -> None:
        memory = Memory(tmp_path, 1)
        memory.begin(waves="100%")
        with pytest.raises(PeerProtocolError) as caught:
            memory.say("gw-000", status)
        assert caught.value.reason is Refusal.FOREIGN_BUNDLE
        before = memory.published[Channel.ROLLOUT]
        memory.desk.flush()
        assert memory.published[Channel.ROLLOUT] == before + 1

    @pytest.mark.parametrize("offset", [len(BUNDLE), 1, 10 * len(BUNDLE)])
    def test_chunk_that_there_is_not_is_refused(self, tmp_path: Path, offset: int) -> None:
        memory = Memory(tmp_path, 1, {"gw-000": Behaviour(is_silent=True)})
        memory.begin(waves="100%")
        memory.turn()
        status = RolloutStatus(
            digest=FACTS.digest,
            campaign="c-1",
            phase=RolloutPhase.WANTED,
            offset_bytes=offset,
        )
        with pytest.raises(PeerProtocolError) as caught:
            memory.say("gw-000", status)
        assert caught.value.reason is Refusal.MALFORMED

    def test_ids_of_campaigns_are_names_and_new(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 1)
        memory.begin("c-1")
        for name in ("c-1", "a b", "../x"):
            with pytest.raises(ConfigError, match="name: expected"):
                memory.desk.plan(FACTS, build_settings(), name)


class TestPair:
    def test_devices_of_a_run_of_another_bundle_are_left_out(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 3)
        memory.run_bundle, memory.members = "ef" * 32, frozenset({"gw-001"})
        plan = memory.desk.plan(FACTS, build_settings())
        assert plan.left_out == {"gw-001": "takes part in a run of another bundle"}

    def test_device_that_joins_a_run_meanwhile_waits_until_that_is_over(
        self, tmp_path: Path
    ) -> None:
        memory = Memory(tmp_path, 3)
        memory.begin(waves="1,100%")
        memory.run_bundle, memory.members = "ef" * 32, frozenset(device_names(3))
        for _ in range(5):
            memory.turn(10.0)
        assert not any(device.offers for device in memory.devices.values())
        memory.members = frozenset()
        assert phases(memory.run_until_over()) == {"committed": 3}

    def test_device_in_a_run_for_ever_is_accounted_for(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 1)
        memory.begin(waves="100%", limits={"offered_s": 100})
        memory.run_bundle, memory.members = "ef" * 32, frozenset({"gw-000"})
        for _ in range(12):
            memory.turn(10.0)
        entry = memory.desk.campaigns()[0].ledger["gw-000"]
        assert entry.phase is DevicePhase.UNREACHABLE
        assert entry.detail == "in a run for more than 100 s"

    def test_devices_of_a_run_are_taken_where_the_operator_says_so(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 2)
        memory.run_bundle, memory.members = "ef" * 32, frozenset(device_names(2))
        memory.begin(waves="100%", take_from_run=True)
        assert phases(memory.run_until_over()) == {"committed": 2}

    def test_run_hands_nothing_to_a_device_that_a_rollout_has_in_hand(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 2, {"gw-000": Behaviour(is_silent=True)})
        assert memory.desk.hold_on("gw-000") == ""
        memory.begin(waves="1,100%", selection={"first": ["gw-000"]})
        memory.turn()
        assert memory.desk.hold_on("gw-000") == "rollout c-1 of gait 7: offered"
        assert memory.desk.hold_on("gw-001") == "", "it was not offered anything yet"

    def test_committed_by_a_rollout_is_not_undone_by_the_run_that_is_on(
        self, tmp_path: Path
    ) -> None:
        memory = Memory(tmp_path, 1)
        memory.begin(waves="100%")
        memory.run_until_over()
        assert memory.desk.hold_on("gw-000").endswith("committed")
        memory.kill()
        memory.now_s += 1.0
        assert memory.desk.hold_on("gw-000") == "", "a run that starts now may have it"

    def test_device_in_another_campaign_is_left_out(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path, 2)
        memory.begin("c-1", waves="100%", selection={"devices": ["gw-000"]})
        plan = memory.desk.plan(FACTS, build_settings())
        assert plan.left_out == {"gw-000": "in campaign c-1"}


def test_late_joiner_is_offered_the_bundle(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 3)
    late = memory.devices.pop("gw-002")
    memory.kill()
    memory.begin(waves="100%", include_new=True, soak_s=30)
    memory.turn()
    memory.devices["gw-002"] = late
    late.announce()
    for _ in range(20):
        memory.turn(5.0)
    assert phases(memory.desk.campaigns()[0]) == {"committed": 3}


class TestChunks:
    def test_those_who_ask_together_are_served_once(self) -> None:
        schedule = ChunkSchedule(1000, 100)
        for name in ("a", "b", "c"):
            schedule.want(name, 0, 0.0)
        assert schedule.due(0.0) == [], "others may be about to ask"
        assert _drain(schedule, QUIET_S) == [Chunk(offset) for offset in range(0, 1000, 100)]
        assert schedule.is_idle

    def test_stream_begins_although_somebody_new_asks_all_the_time(self) -> None:
        schedule = ChunkSchedule(100, 100)
        now_s = 0.0
        while not schedule.due(now_s):
            schedule.want(f"d{now_s}", 0, now_s)
            now_s += 0.1
        assert now_s <= GATHER_S + 0.2

    def test_who_comes_late_gets_the_beginning_in_a_shorter_stream(self) -> None:
        schedule = ChunkSchedule(64 << 20, 1 << 20)
        schedule.want("a", 0, 0.0)
        schedule.want("b", 0, 0.0)
        first = schedule.due(1.0)
        schedule.want("c", 0, 1.0)
        schedule.want("d", 0, 1.0)
        rest = _drain(schedule, 1.0)
        assert [chunk.offset >> 20 for chunk in first + rest[: 64 - len(first)]] == list(range(64))
        assert [chunk.offset >> 20 for chunk in rest[64 - len(first) :]] == list(range(len(first)))

    def test_lost_chunk_is_sent_to_its_device_alone(self) -> None:
        schedule = ChunkSchedule(1000, 100)
        for name in ("a", "b"):
            schedule.want(name, 0, 0.0)
        _drain(schedule, 1.0)
        schedule.want("a", 300, 1.0 + IN_FLIGHT_S / 2)
        assert schedule.due(2.0) == [], "it went out a moment ago"
        schedule.want("a", 300, 60.0)
        assert schedule.due(60.0) == [Chunk(300, "a")]

    def test_stream_is_paced(self) -> None:
        schedule = ChunkSchedule(64 << 20, 1 << 20)
        for name in ("a", "b"):
            schedule.want(name, 0, 0.0)
        sent = sum(len(schedule.due(tenth / 10)) for tenth in range(3, 13))
        assert 4 <= sent <= 7

    def test_who_gives_up_is_forgotten(self) -> None:
        schedule = ChunkSchedule(1000, 100)
        schedule.want("a", 0, 0.0)
        schedule.forget("a")
        assert schedule.is_idle
        assert _drain(schedule, 10.0) == []


def _drain(schedule: ChunkSchedule, now_s: float) -> list[Chunk]:
    chunks = []
    for _ in range(1000):
        chunks += schedule.due(now_s)
        now_s += 0.05
    return chunks


def test_fleet_without_rollouts_has_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    journal = CampaignJournal("lab", folder, f"sqlite:///{folder / 'state.sqlite'}")
    assert (journal.names(), journal.record("c-1"), journal.entries("c-1")) == ([], None, [])
    assert not folder.exists()


def test_campaigns_in_a_store_of_the_settings_are_found_without_the_folder(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 1)
    memory.begin(waves="100%")
    memory.desk.close()
    url = f"sqlite:///{tmp_path / 'state.sqlite'}"
    journal = CampaignJournal("lab", tmp_path / "gone", url, at_once=True)
    assert journal.names() == ["c-1"]
    journal.close()


def test_device_without_a_birth_is_no_candidate(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 1)
    memory.registry.devices["ghost"] = Device("ghost")
    assert [candidate.device for candidate in memory.desk.candidates()] == ["gw-000"]
