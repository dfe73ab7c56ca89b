"""Messages of every wrong kind thrown at both sides of a real run: dropped, counted, harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from edge_agent.datasets.samples import digits_train
from tests.brokers import HOST, Client
from tests.fleet import Fleet, assert_trained_exactly_once, running_fleet
from wire.codec import decode_tensors, encode_tensors, exact
from wire.messages import (
    ActivationsHeader,
    Allocation,
    CutGradientHeader,
    GradientsHeader,
    Slot,
    WeightsHeader,
    build_metadata,
    parse_header,
)

pytestmark = [pytest.mark.broker, pytest.mark.processes]

SAMPLES = {"d0": 30, "d1": 30}
EPOCHS = 3


class Attacker:
    """Listens to the run, so that its messages fit but for the one thing that is wrong."""

    def __init__(self, client: Client, fleet: str) -> None:
        self._client = client
        self._root = f"splitfleet/v1/{fleet}"
        self.allocation: Allocation | None = None
        self.go: WeightsHeader | None = None

    def up(self, level: str, payload: bytes | bytearray, device: str = "d0") -> None:
        self._client.publish(f"{self._root}/dev/{device}/up/{level}", bytes(payload))

    def down(self, level: str, payload: bytes | bytearray, device: str = "d0") -> None:
        self._client.publish(f"{self._root}/dev/{device}/down/{level}", bytes(payload))

    def listen(self, fleet: Fleet) -> None:
        """Wait for an allocation of d0 with slots in front of us."""
        self._client.subscribe(f"{self._root}/dev/d0/down/allocation")
        self._client.subscribe(f"{self._root}/fleet/weights")
        fleet.wait_until(self._has_allocation, "an allocation")

    def _has_allocation(self) -> bool:
        self._read()
        return self.allocation is not None and bool(self.allocation.slots)

    def next_go(self, fleet: Fleet) -> dict[str, int]:
        """Wait for the go of a step that d0 has a slot in: the header fields of its answer."""
        fleet.wait_until(self._has_go, "a step of d0")
        assert self.go is not None
        slot, go, self.go = self._slot_of(self.go.step), self.go, None
        assert slot is not None
        return {
            "epoch": go.epoch,
            "step": go.step,
            "offset": slot.offset,
            "count": slot.count,
            "weights_version": go.version,
        }

    def _has_go(self) -> bool:
        self._read()
        return self.go is not None and self._slot_of(self.go.step) is not None

    def _slot_of(self, step: int) -> Slot | None:
        assert self.allocation is not None
        return next((slot for slot in self.allocation.slots if slot.step == step), None)

    def _read(self) -> None:
        for message in self._client.received():
            if message.topic.endswith("/allocation"):
                self.allocation = msgspec.json.decode(message.payload, type=Allocation)
            else:
                metadata = decode_tensors(message.payload).metadata
                self.go = parse_header(metadata, WeightsHeader)

    def activations(self, tensors: dict[str, Any] | None = None, **changed: Any) -> bytearray:
        allocation = self.allocation
        assert allocation is not None
        slot = allocation.slots[-1]
        fields = {
            "run": allocation.run,
            "epoch": allocation.epoch,
            "step": slot.step,
            "offset": slot.offset,
            "count": slot.count,
            "weights_version": 0,
            "bundle": allocation.bundle,
            **changed,
        }
        if tensors is None:
            tensors = {
                "activations": np.zeros((slot.count, 256), np.float32),
                "labels": np.zeros(slot.count, np.int64),
            }
        parts = {name: exact(array) for name, array in tensors.items()}
        return encode_tensors(parts, build_metadata(ActivationsHeader(**fields)))


def _start(fleet: Fleet) -> Any:
    x, y = digits_train()
    for index, (device, count) in enumerate(SAMPLES.items()):
        part = slice(30 * index, 30 * index + count)
        path = fleet.write_data(device, x[part], y[part])
        # Slow answers leave the attacker time to meet steps that are open.
        fleet.agent(device, {"npz": {"path": path}, "classes": 10}, trial_delay={"fixed_s": 0.4})
    return fleet.local_coordinator(
        network={"name": "mlp", "input_shape": [1, 8, 8], "classes": 10},
        epochs=EPOCHS,
        global_batch=10,
        min_devices=2,
        policy={"name": "fls"},
        optimiser={"name": "sgd", "lr": 0.05},
        mqtt={"port": fleet.port, "max_payload_bytes": 4_000_000},
        deadline={"min_s": 10},
    )


def test_run_survives_every_wrong_message_with_nothing_lost(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    with (
        running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes,
        Client(HOST, shared_mosquitto.port) as client,
    ):
        coordinator = _start(processes)
        attacker = Attacker(client, fleet)
        attacker.listen(processes)
        processes.wait_for_steps(1)
        _throw_at_coordinator(attacker)
        _throw_at_open_steps(attacker, processes)
        _throw_at_device(attacker)
        assert coordinator.wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=EPOCHS)
        summary = processes.summary()
        log = (tmp_path / "d0.log").read_text()
    refused = summary["refused"]
    for reason in (
        "unknown-topic",
        "unknown-device",
        "oversized",
        "malformed",
        "foreign-run",
        "foreign-bundle",
        "late",
        "early",
        "not-allocated",
        "label-range",
        "shape",
        "dtype",
        "non-finite",
    ):
        assert refused.get(reason, 0) >= 1, f"{reason}: {refused}"
    assert np.isfinite([step.loss for step in processes.steps()]).all()
    by_name = {device["device"]: device["refused"] for device in summary["devices"]}
    assert sum(by_name["d0"].values()) > 10
    assert not by_name["d1"]
    assert "d0: dropped a message" in log


def _throw_at_coordinator(attacker: Attacker) -> None:
    attacker.up("nonsense", b"x")
    attacker.up("activations", attacker.activations(), device="stranger")
    attacker.up("activations", bytes(4_100_000))
    for payload in (b"", b"\x00" * 7, b"{}", b"\xff" * 300, (2**62).to_bytes(8, "little") + b"{}"):
        attacker.up("activations", payload)
        attacker.up("gradients", payload)
    for level in ("birth", "state", "rollout", "telemetry"):
        attacker.up(level, b"[" * 50_000)
        attacker.up(level, b'{"boot": "x"}')
    attacker.up("activations", attacker.activations(run="another"))
    attacker.up("activations", attacker.activations(bundle="0" * 64))
    attacker.up("activations", attacker.activations(step=0, epoch=0))
    attacker.up("activations", attacker.activations(step=10_000))
    attacker.up("activations", attacker.activations(epoch=9))
    gradients = GradientsHeader(
        run=attacker.allocation.run if attacker.allocation else "",
        epoch=0,
        step=10_000,
        offset=0,
        count=1,
        weights_version=0,
    )
    attacker.up("gradients", encode_tensors({}, build_metadata(gradients)))


def _throw_at_open_steps(attacker: Attacker, fleet: Fleet, steps: int = 3) -> None:
    """Range and tensors are looked at for the step that is open: be there before d0 answers."""
    wrong: list[dict[str, Any]] = [
        {"activations": np.zeros((5, 3), np.float32), "labels": np.zeros(5, np.int64)},
        {"activations": np.zeros((5, 256), np.float64), "labels": np.zeros(5, np.int64)},
        {"activations": np.zeros((5, 256), np.float32), "labels": np.full(5, 10)},
        {"activations": np.full((5, 256), np.nan, np.float32), "labels": np.zeros(5, np.int64)},
        {"labels": np.zeros(5, np.int64)},
    ]
    for _ in range(steps):
        place = attacker.next_go(fleet)
        for tensors in wrong:
            attacker.up("activations", attacker.activations(tensors, **place))
        attacker.up("activations", attacker.activations(**(place | {"offset": 29})))


def _throw_at_device(attacker: Attacker) -> None:
    assert attacker.allocation is not None
    run = attacker.allocation.run
    for level in ("allocation", "cut-gradient", "rollout", "bundle", "nonsense"):
        for payload in (b"", b"{", b"[]", b"\xff" * 64, b"[" * 50_000):
            attacker.down(level, payload)
    header = CutGradientHeader(run=run, epoch=0, step=10_000, offset=0, count=5)
    gradient = {"gradient": exact(np.zeros((5, 256), np.float32))}
    attacker.down("cut-gradient", encode_tensors(gradient, build_metadata(header)))
    beyond = b'{"run":"%s","epoch":0,"seed":1,"plan":99,"bundle":"b","slots":[[1,25,100]]}'
    attacker.down("allocation", beyond % run.encode())
