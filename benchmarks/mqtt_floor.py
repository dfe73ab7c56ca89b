"""The floor: the messages of a training step over the broker, with nothing behind them.

Per step the coordinator publishes the weights (retained); each device answers with activations;
when all are there each gets its cut gradient and answers with parameter gradients; when all are
there the next weights follow. The bytes are those of the case's real messages, the client library
and its settings are the product's, every device is a process of its own. Handlers answer where
paho calls them: nothing is queued, decoded, checked or computed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, Variant, device_names, split_batch
from floor_device import DirectConnection
from processes import BenchmarkError, Processes
from samples import Sample, SteadyClock

from coordinator.broker import EmbeddedBroker
from wire.bundle import Manifest
from wire.client_choice import ClientName
from wire.codec import encode_tensors, exact
from wire.messages import (
    ActivationsHeader,
    CutGradientHeader,
    GradientsHeader,
    WeightsHeader,
    build_metadata,
)
from wire.mqtt import MqttSettings
from wire.precision import activation_parts, gradient_parts
from wire.topics import Channel, build_topic, coordinator_subscriptions

FLEET = "floor"
TIMEOUT_S = 300.0
_PROGRAM = Path(__file__).with_name("floor_device.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSizes:
    """Payload bytes of the four tensor messages of a step, the last three per device."""

    weights: int
    activations: int
    cut_gradient: int
    gradients: int


def message_sizes(manifest: Manifest, count: int, variant: Variant) -> MessageSizes:
    """Encode the messages of ``count`` samples as the product does, and measure them."""
    random = np.random.default_rng(0)
    rows = random.random((count, *manifest.activation.shape), np.float32)
    parameters = {spec.name: random.random(spec.shape, np.float32) for spec in manifest.parameters}
    place: dict[str, Any] = {
        "run": "benchmark.1",
        "epoch": 0,
        "step": 100,
        "offset": 10_000,
        "count": count,
    }
    digest = "0" * 64
    weights = WeightsHeader(run="benchmark.1", epoch=0, step=100, version=100, bundle=digest)
    activations = ActivationsHeader(**place, weights_version=100, bundle=digest)
    gradients = GradientsHeader(**place, weights_version=100)
    forward, forward_notes = activation_parts("activations", rows, variant.precision)
    forward["labels"] = exact(np.zeros(count, np.int64))
    cut, cut_notes = gradient_parts({"gradient": rows}, variant.precision)
    back, back_notes = gradient_parts(parameters, variant.precision)
    broadcast = {name: exact(array) for name, array in parameters.items()}
    cut_header = build_metadata(CutGradientHeader(**place)) | cut_notes
    return MessageSizes(
        weights=len(encode_tensors(broadcast, build_metadata(weights))),
        activations=len(encode_tensors(forward, build_metadata(activations) | forward_notes)),
        cut_gradient=len(encode_tensors(cut, cut_header)),
        gradients=len(encode_tensors(back, build_metadata(gradients) | back_notes)),
    )


class FloorCoordinator:
    """Counts answers and publishes what comes next, in paho's thread."""

    def __init__(self, settings: MqttSettings, sizes: Mapping[str, MessageSizes]) -> None:
        self._weights_topic = build_topic(FLEET, Channel.WEIGHTS)
        self._weights = os.urandom(next(iter(sizes.values())).weights)
        self._cut_gradients = {
            build_topic(FLEET, Channel.CUT_GRADIENT, device): os.urandom(size.cut_gradient)
            for device, size in sizes.items()
        }
        self._missing = len(sizes)
        self._is_forward = True
        self._clock: SteadyClock | None = None
        self.ended = threading.Event()
        self.connection = DirectConnection(
            settings,
            client_id=f"{FLEET}-coordinator",
            fleet=FLEET,
            subscriptions=coordinator_subscriptions(FLEET),
            answer=self._take,
        )

    def begin(self, clock: SteadyClock) -> None:
        """Open the first step; ``ended`` is set behind the last one."""
        self._clock = clock
        self._open_step()

    def forget_weights(self) -> None:
        """Take the retained message back."""
        self.connection.send(self._weights_topic, b"", retain=True)

    def _open_step(self) -> None:
        self.connection.send(self._weights_topic, self._weights, retain=True)

    def _take(self, _topic: str, _payload_bytes: int) -> None:
        self._missing -= 1
        if self._missing:
            return
        self._missing = len(self._cut_gradients)
        if self._is_forward:
            self._is_forward = False
            for topic, payload in self._cut_gradients.items():
                self.connection.send(topic, payload)
            return
        self._is_forward = True
        assert self._clock is not None
        if self._clock.tick():
            self.ended.set()
        else:
            self._open_step()


def floor_sizes(case: Case, variant: Variant, manifest: Manifest) -> dict[str, MessageSizes]:
    """Sizes by device where all contribute alike."""
    return {
        device: message_sizes(manifest, count, variant)
        for device, count in zip(device_names(case), split_batch(case), strict=True)
    }


def measure_floor(
    sizes: Mapping[str, MessageSizes],
    broker: EmbeddedBroker,
    client: ClientName,
    directory: Path,
    *,
    steps: int,
    warm_up: int,
) -> Sample:
    """Steps per second of the bare pattern, after ``warm_up`` steps."""
    settings = MqttSettings(host=broker.host, port=broker.port, client=client)
    coordinator = FloorCoordinator(settings, sizes)
    commands = {device: _device_command(settings, device, size) for device, size in sizes.items()}
    coordinator.connection.start()
    with Processes(commands, directory) as devices:
        _wait_for(lambda: coordinator.connection.is_connected, devices)
        roles = {"coordinator": [os.getpid()], "devices": devices.pids, "broker": [broker.pid or 0]}
        clock = SteadyClock(roles, warm_up=warm_up, steps=steps)
        coordinator.begin(clock)
        _wait_for(coordinator.ended.is_set, devices)
    coordinator.forget_weights()
    coordinator.connection.stop()
    assert clock.sample is not None
    return clock.sample


def _device_command(settings: MqttSettings, device: str, sizes: MessageSizes) -> list[str]:
    place = [settings.host, str(settings.port), settings.client, FLEET, device]
    return [sys.executable, str(_PROGRAM), *place, str(sizes.activations), str(sizes.gradients)]


def _wait_for(is_done: Callable[[], bool], devices: Processes) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_done():
        devices.raise_if_ended()
        if time.monotonic() > deadline_s:
            raise BenchmarkError(f"the floor's messages did not come round in {TIMEOUT_S:g} s")
        time.sleep(0.02)
