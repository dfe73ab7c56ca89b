"""A training run paired with its devices in memory equals the undivided network, come what may."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.actions import Phase
from coordinator.run import TrainingError
from tests.pairs import Pair, largest_difference, make_samples, train_undivided
from tests.round_owner import fingerprint
from wire.codec import Part, decode_tensors, encode_tensors, exact
from wire.command import exit_code_of
from wire.exit_codes import ExitCode
from wire.topics import Channel

SAMPLES = make_samples(a=30, b=25, c=20)
SGD = {"name": "sgd", "lr": 0.1}
MOMENTUM = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.01}
LDS = {"name": "lds", "delta": 0.5, "refit_every": 2, "delays_s": {"a": 0.1, "b": 1.0, "c": 0.3}}

CLASS_TARGETED = {"name": "class-targeted", "refit_every": 2, "delays_s": {"a": 0.1, "b": 1.0}}


def _pair(tmp_path: Path, *, frozen: bool = False, attempt: int = 1, **settings: Any) -> Pair:
    return Pair(tmp_path, SAMPLES, settings, frozen, attempt)


def _assert_undivided(pair: Pair, tolerance: float = 1e-6, *, frozen: bool = False) -> None:
    losses, reference = train_undivided(pair, frozen=frozen)
    np.testing.assert_allclose([r.loss for r in pair.reporter.steps], losses, rtol=10 * tolerance)
    assert largest_difference(pair.weights(), reference) <= tolerance


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("optimiser", "tolerance"),
    [(SGD, 1e-6), (MOMENTUM, 1e-6), (ADAM, 1e-5)],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("policy", [{"name": "ugs"}, LDS, CLASS_TARGETED], ids=lambda p: p["name"])
def test_fleet_equals_the_undivided_network(
    tmp_path: Path, optimiser: dict[str, Any], policy: dict[str, Any], tolerance: float
) -> None:
    pair = _pair(tmp_path, optimiser=optimiser, policy=policy, epochs=3).begin().train()
    assert [record.samples for record in pair.reporter.steps] == [12, 12, 12, 12, 12, 12, 3] * 3
    assert pair.reporter.steps[-1].loss < pair.reporter.steps[0].loss
    assert pair.refused() == {}
    _assert_undivided(pair, tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("int8", 3e-2)])
def test_smaller_payloads_stay_close_to_the_undivided_network(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    pair = _pair(tmp_path, precision=precision).begin().train()
    _, reference = train_undivided(pair)
    assert 0 < largest_difference(pair.weights(), reference) <= tolerance


def test_frozen_client_stays_as_it_was_and_the_server_equals_the_undivided_one(
    tmp_path: Path,
) -> None:
    pair = _pair(tmp_path, frozen=True, ahead=2).begin()
    before = pair.weights()
    pair.train(shuffle=1)
    after = pair.weights()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if not name.startswith("block1")}
    assert pair.refused() == {}
    _assert_undivided(pair, frozen=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_order_of_delivery_never_shows_in_the_weights(tmp_path: Path, frozen: bool) -> None:
    reference = _pair(tmp_path / "0", frozen=frozen, policy=LDS).begin().train().weights()
    for seed in range(1, 5):
        pair = _pair(tmp_path / str(seed), frozen=frozen, policy=LDS).begin().train(shuffle=seed)
        assert _same(pair.weights(), reference)


def test_everything_delivered_twice_changes_nothing_but_the_count(tmp_path: Path) -> None:
    reference = _pair(tmp_path / "once").begin().train().weights()
    pair = _pair(tmp_path / "twice").begin()
    while not pair.run.is_done:
        name, channel = pair.waiting[0]
        pair.queues[name, channel].appendleft(pair.queues[name, channel][0])
        pair.deliver(name, channel)
        pair.deliver(name, channel)
    assert _same(pair.weights(), reference)
    assert set(pair.refused()) <= {"duplicate", "late", "early"}
    assert pair.refused()["duplicate"] > 0


# Losses


def test_device_lost_after_the_server_pass_leaves_the_exact_mean_of_the_others(
    tmp_path: Path,
) -> None:
    pair = _pair(tmp_path, optimiser=MOMENTUM).begin().train(until=Phase.BACKWARD, step=3)
    pair.disconnect("a")
    pair.train(until=Phase.FORWARD, step=4)
    record = pair.reporter.steps[2]
    assert record.step == 3
    assert {slot[0] for slot in record.slots} == {"b", "c"}
    pair.connect("a")
    pair.train()
    assert pair.run.rounds.missed == {}
    assert sum(record.samples for record in pair.reporter.steps) == 2 * 75
    _assert_undivided(pair)


def test_device_lost_before_the_server_pass_leaves_a_smaller_batch(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    pair.disconnect("b")
    pair.train(until=Phase.FORWARD, step=3)
    assert {slot[0] for slot in pair.reporter.steps[1].slots} == {"a", "c"}
    pair.connect("b")
    pair.train()
    assert pair.run.rounds.missed == {}
    _assert_undivided(pair)


@pytest.mark.parametrize(
    ("phase", "frozen"),
    [(Phase.FORWARD, False), (Phase.BACKWARD, False), (Phase.FORWARD, True)],
)
def test_devices_restart_at_any_moment_and_every_sample_is_trained(
    tmp_path: Path, phase: Phase, frozen: bool
) -> None:
    pair = _pair(tmp_path, frozen=frozen).begin()
    for step, name in ((1, "a"), (3, "b"), (4, "c"), (9, "a")):
        pair.train(until=phase, step=step, shuffle=step)
        pair.restart(name)
    pair.train(shuffle=0)
    assert pair.run.rounds.missed == {}
    assert sum(record.samples for record in pair.reporter.steps) == 2 * 75
    _assert_undivided(pair, frozen=frozen)


def test_restarted_device_answers_the_cut_gradient_that_it_is_sent_again(tmp_path: Path) -> None:
    """Its last will never came: the coordinator only sees a new birth."""
    pair = _pair(tmp_path).begin().train(until=Phase.BACKWARD, step=2)
    assert "a" in pair.run.rounds.waited_for
    pair.queues = {key: queue for key, queue in pair.queues.items() if key[0] != "a"}
    pair.agents["a"].boot += 1
    pair.agents["a"].restart()
    pair.connect("a")
    pair.train()
    assert {slot[0] for slot in pair.reporter.steps[1].slots} == {"a", "b", "c"}
    # The new process ran its range forward anew; the coordinator had it.
    assert pair.refused() == {"duplicate": 1}
    _assert_undivided(pair)


def test_broker_that_lost_everything_is_told_again(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin()
    for phase, step in ((Phase.FORWARD, 2), (Phase.BACKWARD, 4), (Phase.FORWARD, 9)):
        pair.train(until=phase, step=step)
        pair.queues.clear()
        for agent in pair.agents.values():
            agent.restart()  # else they would wait for an answer to what was lost
            agent.receive(Channel.WEIGHTS, pair.retained[Channel.WEIGHTS])
        pair.run.reconnected()
    pair.train()
    _assert_undivided(pair)


# Hostile and broken messages


def _changed(payload: bytes, metadata: dict[str, str], arrays: dict[str, Any]) -> bytes:
    """The same message with other metadata and tensors; None takes a tensor out."""
    tensors = decode_tensors(payload)
    kept = {k: v for k, v in (tensors.arrays | arrays).items() if v is not None}
    parts: dict[str, Part] = {name: exact(np.asarray(array)) for name, array in kept.items()}
    return bytes(encode_tensors(parts, tensors.metadata | metadata))


def _nan(shape: tuple[int, ...], value: float = np.nan) -> Any:
    array = np.zeros(shape, np.float32)
    array.reshape(-1)[-1] = value
    return array


def _message(pair: Pair, name: str, channel: Channel) -> bytes:
    """The device's next message on this channel, which is then on its way no longer."""
    while not pair.queues.get((name, channel)):
        pair.deliver(*next(key for key in pair.waiting if key != (name, channel)))
    return pair.queues[name, channel].popleft()


BAD_METADATA = [
    ({"run": "run.2"}, "foreign-run"),
    ({"run": "other.1"}, "foreign-run"),
    ({"epoch": "1"}, "early"),
    ({"step": "1"}, "late"),
    ({"step": "3"}, "early"),
    ({"step": "two"}, "malformed"),
    ({"step": "-2"}, "malformed"),
    ({"count": "0"}, "malformed"),
    ({"offset": "9007199254740992"}, "malformed"),
    ({"offset": "9007199254740991"}, "not-allocated"),
    ({"weights_version": "0"}, "stale-weights"),
    ({"weights_version": "2"}, "stale-weights"),
]
BAD_ACTIVATIONS: list[tuple[dict[str, Any], str]] = [
    ({"activations": None}, "malformed"),
    ({"labels": None}, "malformed"),
    ({"activations": np.zeros((1, 8), np.float32)}, "shape"),
    ({"activations": np.zeros((1 << 10, 8), np.float32)}, "shape"),
    ({"activations": np.zeros((4, 2), np.float64)}, "shape"),
    ({"labels": np.zeros(1, np.int64)}, "shape"),
    ({"labels": np.zeros(100, np.float32)}, "dtype"),
]


def _refused_and_unchanged(pair: Pair, name: str, channel: Channel, payload: bytes) -> str | None:
    before, weights = fingerprint(pair.run.rounds), pair.weights()
    count = sum(pair.registry.device(name).refused.values())
    reason = pair.send_up(name, channel, payload)
    assert reason is not None
    # A late answer teaches how slow a device is; all else stays.
    assert fingerprint(pair.run.rounds)[:-1] == before[:-1]
    assert _same(pair.weights(), weights)
    assert sum(pair.registry.device(name).refused.values()) == count + 1
    assert pair.registry.device(name).refused[reason] > 0
    return reason


def test_bad_activations_are_refused_by_reason_and_never_change_weights(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    good = _message(pair, "a", Channel.ACTIVATIONS)
    count = len(decode_tensors(good).require("labels"))
    cases = [(_changed(good, metadata, {}), reason) for metadata, reason in BAD_METADATA]
    cases += [(_changed(good, {}, arrays), reason) for arrays, reason in BAD_ACTIVATIONS]
    cases += [
        (_changed(good, {"bundle": "0" * 64}, {}), "foreign-bundle"),
        (_changed(good, {}, {"activations": np.zeros((count, 8), np.int64)}), "dtype"),
        (_changed(good, {}, {"activations": _nan((count, 8))}), "non-finite"),
        (_changed(good, {}, {"activations": _nan((count, 8), -np.inf)}), "non-finite"),
        (_changed(good, {}, {"labels": np.full(count, 3)}), "label-range"),
        (_changed(good, {}, {"labels": np.full(count, -1)}), "label-range"),
        (_changed(good, {"scale_exponents": '{"activations": 500}'}, {}), "malformed"),
        (_changed(good, {"scale_exponents": "[1]"}, {}), "malformed"),
        (
            _changed(
                good,
                {"scale_exponents": '{"activations": -120}'},
                {"activations": np.full((count, 8), 1e4, np.float32)},
            ),
            "non-finite",
        ),
        (good[:-1], "malformed"),
        (good + b"\0", "malformed"),
        (b"", "malformed"),
        (b"\xff" * 100, "malformed"),
    ]
    for payload, reason in cases:
        assert _refused_and_unchanged(pair, "a", Channel.ACTIVATIONS, payload) == reason
    assert pair.send_up("a", Channel.ACTIVATIONS, good) is None
    pair.train()
    _assert_undivided(pair)


def test_bad_gradients_are_refused_by_reason_and_never_change_weights(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.BACKWARD, step=2)
    good = _message(pair, "a", Channel.GRADIENTS)
    name, shape = "block1.linear.weight", (8, 5)
    cases = [(_changed(good, metadata, {}), reason) for metadata, reason in BAD_METADATA]
    cases += [
        (_changed(good, {}, {name: None}), "malformed"),
        (_changed(good, {}, {name: np.zeros((5, 8), np.float32)}), "shape"),
        (_changed(good, {}, {name: np.zeros(shape, np.int32)}), "dtype"),
        (_changed(good, {}, {name: _nan(shape)}), "non-finite"),
        (_changed(good, {}, {name: _nan(shape, np.inf)}), "non-finite"),
        (good[: len(good) // 2], "malformed"),
    ]
    for payload, reason in cases:
        assert _refused_and_unchanged(pair, "a", Channel.GRADIENTS, payload) == reason
    assert pair.send_up("a", Channel.GRADIENTS, good) is None
    assert _refused_and_unchanged(pair, "a", Channel.GRADIENTS, good) in ("duplicate", "late")
    pair.train()
    _assert_undivided(pair)


def test_another_devices_range_cannot_be_answered_for_it(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    message = _message(pair, "a", Channel.ACTIVATIONS)
    reason = _refused_and_unchanged(pair, "b", Channel.ACTIVATIONS, message)
    assert reason == "not-allocated"


HUGE = 3e38


@pytest.fixture
def unlimited_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let values through that the range check stops before they can do harm."""
    monkeypatch.setattr("wire.precision.LARGEST_VALUE", math.inf)


def _poison(pair: Pair, name: str) -> None:
    """From now on the device's activations are finite and make the loss infinite."""
    worker = pair.agents[name].worker
    honest = worker.activations
    # Of the sign of the server's largest row of weights, so that nothing cancels out.
    rows = pair.weights()["block2.linear.weight"].numpy()
    signs = np.sign(rows[np.abs(rows).sum(axis=1).argmax()])

    def poisoned(work: Any) -> bytearray:
        payload = bytes(honest(work))
        shape = decode_tensors(payload).require("activations").shape
        huge = np.broadcast_to(signs * HUGE, shape).astype(np.float32)
        return bytearray(_changed(payload, {}, {"activations": huge}))

    worker.activations = poisoned  # type: ignore[method-assign]


@pytest.mark.usefixtures("unlimited_values")
def test_poisoned_device_is_named_refused_and_its_samples_missed(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    _poison(pair, "b")
    pair.train(shuffle=2)
    assert pair.registry.device("b").refused["non-finite"] >= 3
    assert any(note.startswith("b: its activations of step 2") for note in pair.reporter.notes)
    assert all(torch.isfinite(tensor).all() for tensor in pair.weights().values())
    trained = pair.run.rounds.trained
    assert (trained["a"], trained["c"]) == (60, 40)
    assert pair.run.rounds.missed == {"b": 50 - trained["b"]}
    _assert_undivided(pair)


@pytest.mark.usefixtures("unlimited_values")
def test_device_that_is_well_again_is_trained_on_again(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    honest = pair.agents["b"].worker.activations
    _poison(pair, "b")
    pair.train(until=Phase.FORWARD, step=3)
    pair.agents["b"].worker.activations = honest  # type: ignore[method-assign]
    pair.disconnect("b")
    pair.connect("b")
    pair.train()
    assert pair.run.rounds.missed == {}
    _assert_undivided(pair)


@pytest.mark.usefixtures("unlimited_values")
def test_run_that_has_diverged_ends_with_a_word_on_it(tmp_path: Path) -> None:
    pair = _pair(tmp_path).begin()
    for name in pair.agents:
        _poison(pair, name)
    with pytest.raises(
        TrainingError, match=r"the run has diverged \(a smaller optimiser.lr"
    ) as end:
        pair.train()
    assert exit_code_of(end.value) is ExitCode.DATA, "a restart finds the same weights"
    assert pair.run.rounds.version == 0


# Checkpoints


@pytest.mark.parametrize("optimiser", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("policy", [{"name": "ugs"}, LDS], ids=["ugs", "lds"])
def test_resumed_run_ends_with_the_same_weights_to_the_bit(
    tmp_path: Path, optimiser: dict[str, Any], policy: dict[str, Any]
) -> None:
    settings = {"optimiser": optimiser, "policy": policy}
    reference = _pair(tmp_path / "whole", **settings).begin().train()
    for number, (phase, step) in enumerate(
        [(Phase.FORWARD, 1), (Phase.BACKWARD, 4), (Phase.FORWARD, 7), (Phase.FORWARD, 8)]
    ):
        folder = tmp_path / str(number)
        ended = _pair(folder, **settings).begin().train(until=phase, step=step, shuffle=number)
        ended.run.suspend()
        checkpoint = ended.checkpoint()
        ended.run.log.close()
        resumed = _pair(folder, attempt=2, **settings)
        resumed.run.restore(checkpoint, time.monotonic())
        resumed.begin().train(shuffle=number)
        assert _same(resumed.weights(), reference.weights())
        seen = ended.reporter.steps + resumed.reporter.steps
        assert [r.slots for r in seen] == [r.slots for r in reference.reporter.steps]


def test_messages_of_the_attempt_before_are_foreign(tmp_path: Path) -> None:
    ended = _pair(tmp_path).begin().train(until=Phase.FORWARD, step=2)
    message = _message(ended, "a", Channel.ACTIVATIONS)
    ended.run.suspend()
    checkpoint = ended.checkpoint()
    ended.run.log.close()
    resumed = _pair(tmp_path, attempt=2)
    resumed.run.restore(checkpoint, time.monotonic())
    resumed.begin()
    assert _refused_and_unchanged(resumed, "a", Channel.ACTIVATIONS, message) == "foreign-run"
