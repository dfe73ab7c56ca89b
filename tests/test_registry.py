"""What the coordinator knows of devices: presence by boot counter, fitness, counted refusals."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from coordinator.registry import Registry, Requirements
from wire.errors import PeerProtocolError, Refusal
from wire.messages import Birth, Capabilities, DeviceState, Precision

REQUIRED = Requirements(
    bundle="digest",
    input_shape=(1, 8, 8),
    classes=3,
    trainable=True,
    precision=Precision.FP16,
)


def _birth(boot: int = 1, **changes: object) -> Birth:
    birth = Birth(
        boot=boot,
        samples=6,
        label_counts=(1, 2, 3),
        sample_shape=(1, 8, 8),
        capabilities=Capabilities(backward=("torch",)),
        bundle="digest",
    )
    return msgspec.structs.replace(birth, **changes)


def test_device_is_online_by_its_birth_alone() -> None:
    registry = Registry()
    assert not registry.device("a").is_online
    assert registry.on_birth("a", _birth()).is_online


def test_state_without_a_birth_makes_nobody_online() -> None:
    registry = Registry()
    assert not registry.on_state("a", DeviceState(boot=1, online=True)).is_online
    with pytest.raises(PeerProtocolError, match="sent no birth") as caught:
        registry.known("a")
    assert caught.value.reason is Refusal.UNKNOWN_DEVICE


def test_last_will_of_the_same_boot_takes_the_device_off() -> None:
    registry = Registry()
    registry.on_birth("a", _birth(4))
    device = registry.on_state("a", DeviceState(boot=4, online=False))
    assert not device.is_online
    assert registry.on_birth("a", _birth(5)).is_online


def test_last_will_of_an_earlier_boot_is_late_and_changes_nothing() -> None:
    registry = Registry()
    registry.on_birth("a", _birth(5))
    with pytest.raises(PeerProtocolError) as caught:
        registry.on_state("a", DeviceState(boot=4, online=False))
    assert caught.value.reason is Refusal.LATE
    assert registry.device("a").is_online
    assert registry.device("a").state is None


def test_will_that_came_before_the_next_birth_is_not_about_it() -> None:
    registry = Registry()
    registry.on_state("a", DeviceState(boot=4, online=False))
    assert registry.on_birth("a", _birth(5)).is_online


def test_offline_message_that_overtook_its_own_birth_still_counts() -> None:
    registry = Registry()
    registry.on_state("a", DeviceState(boot=5, online=False))
    assert not registry.on_birth("a", _birth(5)).is_online


def test_birth_of_an_earlier_boot_is_late_and_changes_nothing() -> None:
    registry = Registry()
    newest = _birth(5)
    registry.on_birth("a", newest)
    with pytest.raises(PeerProtocolError) as caught:
        registry.on_birth("a", _birth(4, bundle=None))
    assert caught.value.reason is Refusal.LATE
    assert registry.device("a").birth == newest


def test_birth_of_the_same_boot_replaces_the_one_before() -> None:
    registry = Registry()
    registry.on_birth("a", _birth(5, bundle=None))
    assert registry.on_birth("a", _birth(5)).has_bundle(REQUIRED)


def test_birth_that_contradicts_itself_is_malformed_and_changes_nothing() -> None:
    registry = Registry()
    with pytest.raises(PeerProtocolError, match="sum to 6, samples is 7") as caught:
        registry.on_birth("a", _birth(samples=7))
    assert caught.value.reason is Refusal.MALFORMED
    assert "a" not in registry.devices


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sample_shape": (8, 8)}, "samples have shape (8, 8), expected (1, 8, 8)"),
        ({"label_counts": (1, 1, 1, 3)}, "4 classes, expected at most 3"),
        ({"capabilities": Capabilities(reason="no PyTorch here")}, "no PyTorch here"),
        ({"capabilities": Capabilities()}, "no backward pass"),
        (
            {
                "capabilities": Capabilities(
                    backward=("torch",), precisions=(Precision.FP32, Precision.INT8)
                )
            },
            "precision fp16 is not supported",
        ),
    ],
)
def test_device_that_cannot_take_part_says_why(changes: dict[str, object], problem: str) -> None:
    device = Registry().on_birth("a", _birth(**changes))
    assert problem in device.shortcoming(REQUIRED)


def test_fit_device_has_no_shortcoming_and_a_frozen_run_needs_no_backward_pass() -> None:
    registry = Registry()
    assert registry.on_birth("a", _birth()).shortcoming(REQUIRED) == ""
    frozen = Requirements(
        bundle="digest",
        input_shape=(1, 8, 8),
        classes=3,
        trainable=False,
        precision=Precision.FP16,
    )
    forward_only = registry.on_birth("b", _birth(capabilities=Capabilities()))
    assert forward_only.shortcoming(frozen) == ""
    assert registry.device("nobody").shortcoming(frozen) == "no birth message yet"


def test_member_has_all_classes_and_the_smaller_of_both_limits() -> None:
    registry = Registry()
    birth = _birth(label_counts=(2, 4), max_batch=16)
    device = registry.on_birth("a", birth)
    assert device.member(4, 100).label_counts == (2, 4, 0, 0)
    assert device.member(4, 100).samples == 6
    assert device.member(4, 100).max_batch == 16
    assert device.member(4, 10).max_batch == 10
    assert registry.on_birth("b", _birth()).member(3, 10).max_batch == 10


def test_refusals_are_counted_by_device_and_reason() -> None:
    registry = Registry()
    registry.on_birth("a", _birth())
    assert [registry.count_refusal("a", Refusal.LATE) for _ in range(3)] == [1, 2, 3]
    registry.count_refusal("a", Refusal.SHAPE)
    registry.count_refusal("stranger", Refusal.SHAPE)
    registry.count_refusal(None, Refusal.UNKNOWN_TOPIC)
    assert registry.device("a").refused == {"late": 3, "shape": 1}
    assert registry.refused == {"shape": 1, "unknown-topic": 1}
    assert registry.refused_in_all() == {"late": 3, "shape": 2, "unknown-topic": 1}
    assert "stranger" not in registry.devices  # strangers cost no memory


def test_device_that_cannot_take_samples_by_class_is_left_out_where_classes_are_planned() -> None:
    by_class = replace(REQUIRED, by_class=True)
    registry = Registry()
    old = registry.on_birth("old", _birth())
    assert old.shortcoming(REQUIRED) == ""
    assert "cannot take samples by class" in old.shortcoming(by_class)
    knows = Capabilities(backward=("torch",), orders=("shuffled", "by-class", "of-tomorrow"))
    new = registry.on_birth("new", _birth(capabilities=knows))
    assert new.shortcoming(by_class) == new.shortcoming(REQUIRED) == ""
