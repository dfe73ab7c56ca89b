"""Who comes in which wave, in which order, and who is left out and why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rollout.records import CampaignSettings, Selection
from coordinator.rollout.selection import (
    CampaignPlan,
    Candidate,
    campaign_id,
    plan_campaign,
)
from coordinator.rollout.waves import order_devices, wave_sizes
from tests.campaigns import FACTS, build_settings, device_names
from wire.errors import ConfigError


class TestWaves:
    @pytest.mark.parametrize(
        ("waves", "devices", "sizes"),
        [
            ("1,10%,50%,100%", 100, (1, 9, 40, 50)),
            ("1,10%,50%,100%", 3, (1, 1, 1)),
            ("1,10%,50%,100%", 1, (1,)),
            ("100%", 7, (7,)),
            ("33.3%,100%", 10, (4, 6)),
            ("5", 100, (5,)),
            ("1, 5, 20%, 100%", 30, (1, 4, 1, 24)),
            ("10,100", 4, (4,)),
            ("1,100%", 0, ()),
        ],
    )
    def test_totals_become_sizes(self, waves: str, devices: int, sizes: tuple[int, ...]) -> None:
        assert wave_sizes(waves, devices) == sizes

    @pytest.mark.parametrize(
        "waves", ["", "a", "0", "0%", "101%", "10%,5%", "5,5", "1.5", "1,,2", "-1", "1e3"]
    )
    def test_others_are_refused_with_an_example(self, waves: str) -> None:
        with pytest.raises(ConfigError, match=r"waves: expected"):
            wave_sizes(waves, 10)

    @given(st.lists(st.integers(1, 100), min_size=1, unique=True), st.integers(0, 5000))
    def test_waves_add_up_to_the_last_total(self, percents: list[int], devices: int) -> None:
        sizes = wave_sizes(",".join(f"{p}%" for p in sorted(percents)), devices)
        assert all(size > 0 for size in sizes)
        assert sum(sizes) == -(-devices * max(percents) // 100)


class TestOrder:
    def test_same_campaign_same_order(self) -> None:
        names = device_names(50)
        assert order_devices("c", names) == order_devices("c", reversed(names))
        assert order_devices("c", names) != order_devices("d", names)
        assert sorted(order_devices("c", names)) == names

    def test_another_device_does_not_change_the_order_of_the_rest(self) -> None:
        names = device_names(50)
        longer = order_devices("c", [*names, "new"])
        assert [name for name in longer if name != "new"] == order_devices("c", names)

    def test_first_ones_come_first(self) -> None:
        assert order_devices("c", device_names(9), ["gw-007", "gw-001", "gw-007"])[:2] == [
            "gw-007",
            "gw-001",
        ]


def _plan(candidates: list[Candidate], **settings: Any) -> CampaignPlan:
    return plan_campaign("c", FACTS, build_settings(**settings), candidates)


class TestSelection:
    def test_patterns_and_labels_choose(self) -> None:
        plan = _plan(
            [
                Candidate(device="pi-1", labels={"site": "north"}),
                Candidate(device="pi-2", labels={"site": "south"}),
                Candidate(device="nuc-1", labels={"site": "north"}),
                Candidate(device="pi-3"),
            ],
            selection={"patterns": ["pi-*"], "labels": {"site": "n*"}},
        )
        assert [device.device for device in plan.devices] == ["pi-1"]
        assert set(plan.left_out.values()) == {"not selected"}

    def test_device_asked_for_by_name_comes_even_if_it_was_never_seen(self) -> None:
        plan = _plan(
            [Candidate(device="pi-1"), Candidate(device="pi-2")],
            selection={"devices": ["pi-2", "pi-9"]},
            waves="100%",
        )
        assert {d.device: d.seen for d in plan.devices} == {"pi-2": True, "pi-9": False}
        assert plan.left_out == {"pi-1": "not selected"}

    @pytest.mark.parametrize(
        ("candidate", "reason"),
        [
            (Candidate(device="d", held_by="other"), "in campaign other"),
            (Candidate(device="d", bundle=FACTS.digest), "has this bundle"),
            (Candidate(device="d", run_bundle="cd" * 32), "takes part in a run of another bundle"),
            (
                Candidate(device="d", sample_shape=(3, 64)),
                "samples of shape [3, 64], not [3, 128]",
            ),
            (Candidate(device="d", sample_shape=(3, 128), classes=9), "9 classes, not 4"),
            (Candidate(device="d", sample_shape=(3, 128), can_train=False), "cannot train"),
        ],
    )
    def test_left_out_with_a_reason(self, candidate: Candidate, reason: str) -> None:
        is_fit = "shape" in reason or "classes" in reason or "train" in reason
        facts = FACTS
        if is_fit:
            facts = FACTS.__class__(
                digest=FACTS.digest,
                size_bytes=1,
                name="n",
                version="1",
                input_shape=(3, 128),
                classes=4,
            )
        plan = plan_campaign("c", facts, build_settings(), [candidate])
        assert plan.left_out == {"d": reason}
        assert plan.reasons() == {reason: 1}

    def test_devices_of_a_run_are_taken_where_asked_for(self) -> None:
        candidate = Candidate(device="d", run_bundle="cd" * 32)
        assert [d.device for d in _plan([candidate], take_from_run=True).devices] == ["d"]

    def test_beyond_the_last_wave(self) -> None:
        plan = _plan([Candidate(device=name) for name in device_names(5)], waves="1,2")
        assert [device.wave for device in plan.devices] == [0, 1]
        assert list(plan.left_out.values()) == ["beyond the last wave"] * 3

    def test_nobody(self) -> None:
        assert _plan([]).waves == ()


class TestNames:
    def test_plan_and_start_get_the_same_id_until_it_is_taken(self) -> None:
        name = campaign_id(FACTS, [])
        assert name == "gait-7-abababab"
        assert campaign_id(FACTS, [name]) == "gait-7-abababab-2"
        assert campaign_id(FACTS, [name, f"{name}-2"]) == "gait-7-abababab-3"

    @pytest.mark.parametrize("odd", ["../é x", "", "....", "a" * 200])
    def test_odd_names_give_plain_ids(self, odd: str) -> None:
        from wire.topics import is_valid_name

        facts = FACTS.__class__(digest=FACTS.digest, size_bytes=1, name=odd, version="")
        assert is_valid_name(campaign_id(facts, []))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"max_failed": 1.5}, "max_failed from 0 to 1"),
            ({"max_lost": float("nan")}, "max_lost from 0 to 1"),
            ({"soak_s": -1}, "soak_s >= 0"),
            ({"rate_per_min": -1}, "rate_per_min >= 0"),
            ({"limits": {"download_s": 0}}, "limits.download_s > 0"),
            ({"trial_s": 7200}, "limits.commit_s above trial_s"),
            ({"selection": {"devices": ["a b"]}}, "expected devices"),
        ],
    )
    def test_values_that_make_no_sense(self, settings: dict[str, Any], expected: str) -> None:
        import msgspec

        with pytest.raises(msgspec.ValidationError, match=expected):
            build_settings(**settings)

    def test_defaults_are_fit(self) -> None:
        assert CampaignSettings().selection == Selection()
