"""What the rollout commands make of their options, without a coordinator."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.rollout_devices import build_sample_bundle
from coordinator.cli import rollout_options as options
from coordinator.rollout.bundle_facts import describe_bundle
from coordinator.rollout.campaign import Campaign
from coordinator.rollout.records import CampaignPhase, DevicePhase
from coordinator.rollout.requests import (
    CampaignView,
    DeviceView,
    ListRequest,
    RequestEnvelope,
    decode_envelope,
    encode_envelope,
)
from coordinator.rollout.views import (
    campaign_facts,
    campaigns_table,
    describe_counts,
    devices_table,
    plan_facts,
    plan_table,
    waves_table,
)
from coordinator.tables import build_console
from tests.campaigns import Trial, build_settings
from tests.commands import RunCommand
from wire.errors import ConfigError, PeerProtocolError
from wire.exit_codes import ExitCode


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5 m", 90), ("2h", 7200), ("1d", 86_400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert options.parse_duration(text, "--soak") == seconds


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), ("100 %", 1), ("0", 0)])
def test_shares(text: str, share: float) -> None:
    assert options.parse_share(text, "--max-failed") == pytest.approx(share)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "a.bundle"
    path.write_bytes(build_sample_bundle(10_000))
    return path


@pytest.fixture
def rollout(run_coordinator: RunCommand) -> RunCommand:
    return partial(run_coordinator, "rollout")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--soak", "soon"], "--soak: expected a time such as 90s"),
        (["--trial", "-1s"], "--trial: expected a time"),
        (["--max-failed", "200%"], "--max-failed: expected a share from 0% to 100%"),
        (["--max-lost", "many"], "--max-lost: expected a share"),
        (["--limit", "lunch=1h"], "--limit: expected one of offered, download, self-test, commit"),
        (["--limit", "commit=1x"], "--limit: expected a time"),
        (["--label", "north"], "--label: expected NAME=PATTERN"),
        (["--waves", "50%,10%"], "--waves: expected growing counts or percentages"),
        (["--trial", "5h"], "expected limits.commit_s above trial_s"),
        (["--device", "a b"], "expected devices: 1 to 64 letters"),
        (["--fleet", "a b"], "expected fleet: 1 to 64 letters"),
        (["--port", "0"], "expected a port from 1 to 65535"),
        (["-c", "/no/such.yaml"], "/no/such.yaml: expected a readable YAML file"),
    ],
)
def test_wrong_option_is_named_with_what_was_expected(
    arguments: list[str],
    said: str,
    bundle: Path,
    rollout: RunCommand,
) -> None:
    ended = rollout("start", bundle, "--yes", *arguments)
    assert ended.code == ExitCode.CONFIG
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


def test_damaged_and_missing_bundles_are_named(tmp_path: Path, rollout: RunCommand) -> None:
    cut = tmp_path / "cut.bundle"
    cut.write_bytes(build_sample_bundle(10_000)[:5_000])
    ended = rollout("plan", cut)
    assert ended.code == ExitCode.DATA
    assert str(cut) in ended.err
    ended = rollout("plan", tmp_path / "none.bundle")
    assert ended.code == ExitCode.CONFIG
    assert "none.bundle: expected a readable bundle" in ended.err


@pytest.mark.parametrize("arguments", [[], ["--failed", "--device", "gw-1"]])
def test_retry_needs_to_know_whom(arguments: list[str], rollout: RunCommand) -> None:
    ended = rollout("retry", "c-1", *arguments)
    assert ended.code == ExitCode.USAGE
    assert "expected --failed or --device ID" in ended.err


def test_no_broker_ends_with_69(
    free_port: int, monkeypatch: pytest.MonkeyPatch, rollout: RunCommand
) -> None:
    monkeypatch.setattr("coordinator.rollout.client.CONNECT_S", 0.5)
    ended = rollout("list", "--port", free_port)
    assert ended.code == ExitCode.UNAVAILABLE
    assert "no broker answers" in ended.err


@pytest.mark.broker
def test_no_coordinator_ends_with_69(
    shared_mosquitto: Any,
    fleet: str,
    monkeypatch: pytest.MonkeyPatch,
    rollout: RunCommand,
) -> None:
    monkeypatch.setattr("coordinator.rollout.client.ANSWER_S", 0.5)
    ended = rollout("list", "--port", shared_mosquitto.port, "--fleet", fleet)
    assert ended.code == ExitCode.UNAVAILABLE
    assert "no coordinator answers" in ended.err


class TestMessages:
    def test_requests_come_back_as_they_went(self) -> None:
        envelope = RequestEnvelope(number="1", request=ListRequest())
        assert decode_envelope(encode_envelope(envelope), RequestEnvelope) == envelope

    @pytest.mark.parametrize(
        "payload", [b"", b"{", b"[]", b'{"number":"1","request":{"kind":"dance"}}', b"\xff"]
    )
    def test_others_are_refused(self, payload: bytes) -> None:
        with pytest.raises(PeerProtocolError):
            decode_envelope(payload, RequestEnvelope)

    def test_settings_that_make_no_sense_are_refused_on_arrival_too(self) -> None:
        payload = (
            b'{"number":"1","request":{"kind":"plan","bundle":{"digest":"%s","size_bytes":1,'
            b'"name":"n","version":"1"},"settings":{"max_failed":7}}}' % (b"ab" * 32)
        )
        with pytest.raises(PeerProtocolError, match="max_failed from 0 to 1"):
            decode_envelope(payload, RequestEnvelope)


def _view(campaign: Campaign) -> CampaignView:
    waves = range(campaign.record.waves)
    return CampaignView(
        record=campaign.record,
        counts=campaign.ledger.counts(),
        wave_sizes=tuple(campaign.ledger.size(wave) for wave in waves),
        wave_counts=tuple({"committed": campaign.ledger.size(wave)} for wave in waves),
        devices=tuple(DeviceView(entry=entry, online=True) for entry in campaign.ledger),
        now_s=campaign.record.since_s + 3,
    )


class TestViews:
    def _text(self, *shown: Any) -> str:
        import io

        console = build_console(io.StringIO())
        with console.capture() as capture:
            for item in shown:
                console.print(item)
        return capture.get()

    def test_hundreds_of_devices_are_cut_down_to_those_that_matter(self) -> None:
        trial = Trial(300, waves="100%", max_failed=1)
        trial.tick()
        last = trial.order[-1]
        trial.say(last, DevicePhase.FAILED, "golden\x1b[31m output off")
        text = self._text(devices_table(_view(trial.campaign), every=False))
        assert last in text
        assert "\x1b" not in text
        assert "are not shown" in text
        whole = self._text(devices_table(_view(trial.campaign), every=True))
        assert all(name in whole for name in trial.order)

    def test_state_says_why_and_what_comes_next(self) -> None:
        trial = Trial(2)
        trial.tick()
        trial.commit_offered()
        facts = dict(campaign_facts(_view(trial.campaign)))
        assert facts["state"] == "soaking for 3.00 s, 57.0 s to go"
        trial.take(trial.campaign.pause(trial.now_s, "inventory"))
        facts = dict(campaign_facts(_view(trial.campaign)))
        assert facts["state"] == "paused for 3.00 s: inventory"
        assert "c-1" in self._text(campaigns_table([_view(trial.campaign)]))
        assert "1 <" in self._text(waves_table(_view(trial.campaign)))
        assert trial.campaign.record.phase is CampaignPhase.PAUSED

    def test_counts_stand_in_the_order_of_a_devices_life(self) -> None:
        counts = {"committed": 2, "failed": 1, "planned": 3}
        assert describe_counts(counts) == "6: 3 planned, 2 committed, 1 failed"

    def test_plan_shows_waves_and_who_is_left_out(self) -> None:
        from coordinator.rollout.selection import Candidate, plan_campaign

        facts = describe_bundle(build_sample_bundle(10_000))
        candidates = [
            Candidate(device="gw-1", online=True, sample_shape=(1, 8, 8)),
            Candidate(device="gw-2", sample_shape=(3, 3)),
        ]
        wanted = build_settings(selection={"patterns": ["gw-*"], "devices": ["gw-9"]})
        plan = plan_campaign("c", facts, wanted, candidates)
        text = self._text(plan_table(plan))
        assert "gw-9 (never seen)" in text
        assert ("left out", "1 samples of shape [3, 3], not [1, 8, 8]: gw-2") in plan_facts(plan)


def test_files_hold_settings_of_the_fleet(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_bytes(msgspec.yaml.encode({"fleet": "lab-7", "mqtt": {"port": 1999}}))
    settings = options.FleetOptions(config=str(path), host="broker").load()
    assert (settings.fleet, settings.mqtt.host, settings.mqtt.port) == ("lab-7", "broker", 1999)
    with pytest.raises(ConfigError):
        options.FleetOptions(config=str(path), fleet="a b").load()
