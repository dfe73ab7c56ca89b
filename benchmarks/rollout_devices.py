"""Simulated devices for rollouts: the protocol's messages, many to a process, no model.

Each has an MQTT connection of its own with birth and last will, asks for chunks as an agent does,
checks the digest, and reports until it is acknowledged. The self-test and the trial are waits.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from wire.bundle import (
    CLIENT_FORWARD,
    CLIENT_TORCH,
    WEIGHTS,
    ArraySpec,
    Manifest,
    TensorSpec,
    build_bundle,
    encode_weights,
)
from wire.codec import decode_tensors
from wire.messages import (
    SCHEMA,
    Birth,
    Capabilities,
    ChunkHeader,
    DeviceState,
    Message,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
    SelfTestReport,
    decode_rollout,
    encode_message,
    parse_header,
)
from wire.topics import Channel, build_client_id, build_topic, device_subscriptions, parse_topic

REPEAT_S = 10.0
SHARED_PATIENCE_S = 2.0
PATIENCE_S = 10.0
SAMPLE_SHAPE = (1, 8, 8)

Send = Callable[[Channel, Message], None]
Listen = Callable[[str, bool], None]  # digest; begin or end


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a device takes a bundle. ``ends`` is how it ends: any final phase."""

    test_s: float = 0.0
    ends: RolloutPhase = RolloutPhase.COMMITTED
    detail: str = ""
    is_silent: bool = False
    loses: int = 0  # chunks that never arrive, each once


@dataclass(slots=True)
class SimulatedDevice:
    """One device's side of rollouts, without a socket: messages and time in, messages out."""

    name: str
    send: Send
    listen: Listen
    behaviour: Behaviour = field(default_factory=Behaviour)
    labels: dict[str, str] = field(default_factory=dict)
    sample_shape: tuple[int, ...] = SAMPLE_SHAPE
    boot: int = 1
    bundle: str | None = None
    last_good: str | None = None
    offer: RolloutOffer | None = None
    chunks: dict[int, bytes] = field(default_factory=dict)
    owed: RolloutStatus | None = None
    sequence: int = 0
    offers: list[RolloutOffer] = field(default_factory=list)
    history: list[RolloutPhase] = field(default_factory=list)
    _ask_s: float | None = None
    _test_until_s: float | None = None
    _trial_until_s: float | None = None
    _repeat_s: float = 0.0
    _lost: set[int] = field(default_factory=set)

    def birth(self) -> Birth:
        return Birth(
            boot=self.boot,
            samples=1,
            label_counts=(1,),
            sample_shape=self.sample_shape,
            capabilities=Capabilities(backward=("none",)),
            bundle=self.bundle,
            agent="simulated",
            labels=self.labels,
        )

    def announce(self) -> None:
        """Say what the device is, as after each connection."""
        self.send(Channel.BIRTH, self.birth())
        self.send(Channel.STATE, DeviceState(boot=self.boot, online=True))

    @property
    def next_s(self) -> float:
        """When ``tick`` has something to do (monotonic); infinity if never."""
        times = (self._ask_s, self._test_until_s, self._trial_until_s)
        due = [time_s for time_s in times if time_s is not None]
        return min([*due, self._repeat_s] if self.owed else due, default=float("inf"))

    def receive(self, channel: Channel, payload: bytes, now_s: float) -> None:
        """Take a message of the coordinator."""
        if channel in (Channel.BUNDLE, Channel.SHARED_BUNDLE):
            self._take_chunk(payload, now_s, shared=channel is Channel.SHARED_BUNDLE)
        elif channel is Channel.ROLLOUT and not self.behaviour.is_silent:
            match decode_rollout(payload):
                case RolloutOffer() as offer:
                    self._take_offer(offer, now_s)
                case RolloutCancel() as cancel:
                    self._cancel(cancel, now_s)
                case RolloutAcknowledge(sequence=sequence):
                    if self.owed is not None and self.owed.sequence <= sequence:
                        self.owed = None

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        if self._ask_s is not None and now_s >= self._ask_s:
            self._ask(now_s)
        if self._test_until_s is not None and now_s >= self._test_until_s:
            self._test_until_s = None
            self._end_test(now_s)
        if self._trial_until_s is not None and now_s >= self._trial_until_s:
            self._trial_until_s = None
            self._end_trial(now_s)
        if self.owed is not None and now_s >= self._repeat_s:
            self._repeat_s = now_s + REPEAT_S
            self.send(Channel.ROLLOUT_STATUS, self.owed)

    def _take_offer(self, offer: RolloutOffer, now_s: float) -> None:
        self.offers.append(offer)
        known = self.offer
        if known is not None and (known.campaign, known.attempt) == (offer.campaign, offer.attempt):
            return
        self.offer = offer
        self.chunks = {}
        self._lost = set()
        if offer.shared:
            self.listen(offer.digest, True)
        self._ask(now_s)

    def _ask(self, now_s: float) -> None:
        offer = self.offer
        assert offer is not None
        missing = (o for o in range(0, offer.size_bytes, offer.chunk_bytes) if o not in self.chunks)
        self._ask_s = now_s + (SHARED_PATIENCE_S if offer.shared else PATIENCE_S)
        status = self._status(RolloutPhase.WANTED, offset_bytes=next(missing))
        self.send(Channel.ROLLOUT_STATUS, status)

    def _take_chunk(self, payload: bytes, now_s: float, *, shared: bool) -> None:
        offer = self.offer
        if offer is None or self._ask_s is None:
            return
        tensors = decode_tensors(payload)
        header = parse_header(tensors.metadata, ChunkHeader)
        offset = header.offset_bytes
        if header.digest != offer.digest or offset in self.chunks:
            return
        if len(self._lost) < self.behaviour.loses and offset not in self._lost:
            self._lost.add(offset)
            return
        self.chunks[offset] = tensors.require("data").tobytes()
        if len(self.chunks) * offer.chunk_bytes >= offer.size_bytes:
            self._verify(offer, now_s)
        elif shared:
            self._ask_s = now_s + SHARED_PATIENCE_S
        else:
            self._ask(now_s)

    def _verify(self, offer: RolloutOffer, now_s: float) -> None:
        self._ask_s = None
        if offer.shared:
            self.listen(offer.digest, False)
        data = b"".join(self.chunks[offset] for offset in sorted(self.chunks))
        self.chunks = {}
        if hashlib.sha256(data).hexdigest() != offer.digest:
            self._say(RolloutPhase.FAILED, now_s, detail="another digest")
        elif self.behaviour.ends is RolloutPhase.REFUSED:
            self._say(RolloutPhase.REFUSED, now_s, detail=self.behaviour.detail)
        else:
            self._say(RolloutPhase.VERIFIED, now_s)
            self._test_until_s = now_s + self.behaviour.test_s

    def _end_test(self, now_s: float) -> None:
        offer = self.offer
        assert offer is not None
        if self.behaviour.ends is RolloutPhase.FAILED:
            self._say(RolloutPhase.FAILED, now_s, detail=self.behaviour.detail)
            return
        self.last_good, self.bundle = self.bundle, offer.digest
        self.announce()
        report = SelfTestReport(seconds=self.behaviour.test_s, peak_bytes=1_000_000, max_error=0.0)
        self._say(RolloutPhase.INSTALLED, now_s, self_test=report)
        self._trial_until_s = now_s + offer.soak_s

    def _end_trial(self, now_s: float) -> None:
        if self.behaviour.ends is RolloutPhase.REVERTED:
            self._go_back(now_s, self.behaviour.detail)
        else:
            self._say(RolloutPhase.COMMITTED, now_s)

    def _cancel(self, cancel: RolloutCancel, now_s: float) -> None:
        offer = self.offer
        if offer is None or offer.campaign != cancel.campaign:
            return
        if self.bundle == offer.digest:
            if cancel.revert:
                self._trial_until_s = None
                self._go_back(now_s, "called back on request")
        elif self._ask_s is not None or self._test_until_s is not None:
            self._ask_s = self._test_until_s = None
            self._say(RolloutPhase.CANCELLED, now_s)

    def _go_back(self, now_s: float, detail: str) -> None:
        self.bundle, self.last_good = self.last_good, None
        self.announce()
        self._say(RolloutPhase.REVERTED, now_s, detail=detail)

    def _say(self, phase: RolloutPhase, now_s: float, **fields: Any) -> None:
        self.sequence += 1
        self.history.append(phase)
        self.owed = self._status(phase, sequence=self.sequence, **fields)
        self._repeat_s = now_s + REPEAT_S
        self.send(Channel.ROLLOUT_STATUS, self.owed)

    def _status(self, phase: RolloutPhase, **fields: Any) -> RolloutStatus:
        offer = self.offer
        assert offer is not None
        return RolloutStatus(
            digest=offer.digest,
            phase=phase,
            campaign=offer.campaign,
            attempt=offer.attempt,
            **fields,
        )


class SimulatedFleet:
    """Devices with real connections, all served by one thread."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        fleet: str,
        port: int,
        behaviours: dict[str, Behaviour] | None = None,
        host: str = "127.0.0.1",
        sample_shape: tuple[int, ...] = SAMPLE_SHAPE,
    ) -> None:
        self.fleet = fleet
        self.bytes_received = 0
        self.devices: dict[str, SimulatedDevice] = {}
        self._clients: dict[str, paho.Client] = {}
        self._selector = selectors.DefaultSelector()
        self._address = (host, port)
        for name in names:
            device = SimulatedDevice(
                name,
                send=self._sender(name),
                listen=self._listener(name),
                behaviour=(behaviours or {}).get(name, Behaviour()),
                sample_shape=sample_shape,
            )
            self.devices[name] = device

    def connect(self, *names: str) -> None:
        """Connect these devices, or all."""
        for name in names or self.devices:
            self._connect(name)

    def disconnect(self, name: str) -> None:
        """Lose a device's connection without a word; the broker says so by its last will."""
        client = self._clients.pop(name)
        sock = client.socket()
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()

    def turn(self, seconds: float = 0.05) -> None:
        """Read and write for so long, then look after each device's timers."""
        until_s = time.monotonic() + seconds
        while (rest_s := until_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(rest_s, 0.02)):
                self._serve(key.data)
            for client in self._clients.values():
                while client.want_write():
                    client.loop_write()
            self._tick()

    def run_until(self, is_over: Callable[[], bool], timeout_s: float) -> None:
        """Turn until something holds; TimeoutError if it does not in time."""
        deadline_s = time.monotonic() + timeout_s
        while not is_over():
            if time.monotonic() > deadline_s:
                raise TimeoutError("the simulated devices wait for something that does not come")
            self.turn()

    def close(self) -> None:
        """Disconnect all."""
        for client in self._clients.values():
            client.disconnect()
            client.loop_write()
            sock = client.socket()
            if sock is not None:
                sock.close()
        self._selector.close()

    def _serve(self, name: str) -> None:
        client = self._clients.get(name)
        if client is not None:
            client.loop_read()

    def _tick(self) -> None:
        now_s = time.monotonic()
        for name, client in self._clients.items():
            client.loop_misc()
            if self.devices[name].next_s <= now_s:
                self.devices[name].tick(now_s)

    def _connect(self, name: str) -> None:
        device = self.devices[name]
        device.boot += 1
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=build_client_id(self.fleet, name),
            protocol=paho.MQTTv5,
        )
        will = DeviceState(boot=device.boot, online=False, detail="lost")
        topic = build_topic(self.fleet, Channel.STATE, name)
        client.will_set(topic, encode_message(will), qos=1, retain=True)
        client.on_connect = lambda *_: self._connected(name)
        client.on_message = lambda _c, _u, message: self._received(name, message)
        client.connect(*self._address, keepalive=60)
        sock = client.socket()
        assert sock is not None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients[name] = client
        self._selector.register(sock, selectors.EVENT_READ, name)

    def _connected(self, name: str) -> None:
        options = SubscribeOptions(qos=1)
        topics = [(topic, options) for topic in device_subscriptions(self.fleet, name)]
        self._clients[name].subscribe(topics)
        self.devices[name].announce()

    def _received(self, name: str, message: paho.MQTTMessage) -> None:
        self.bytes_received += len(message.payload)
        channel = parse_topic(message.topic).channel
        self.devices[name].receive(channel, message.payload, time.monotonic())

    def _sender(self, name: str) -> Send:
        def send(channel: Channel, message: Message) -> None:
            client = self._clients.get(name)
            if client is None:
                return
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = channel.payload.value
            properties.UserProperty = ("schema", SCHEMA)
            topic = build_topic(self.fleet, channel, name)
            client.publish(
                topic,
                msgspec.json.encode(message),
                qos=channel.qos,
                retain=channel.retain,
                properties=properties,
            )

        return send

    def _listener(self, name: str) -> Listen:
        def listen(digest: str, begin: bool) -> None:
            client = self._clients.get(name)
            topic = build_topic(self.fleet, Channel.SHARED_BUNDLE, bundle=digest)
            if client is not None and begin:
                client.subscribe([(topic, SubscribeOptions(qos=1))])
            elif client is not None:
                client.unsubscribe(topic)

        return listen


def build_sample_bundle(size_bytes: int, *, name: str = "gait", version: str = "7") -> bytes:
    """A bundle of about this size that is in order and that no model stands behind."""
    weights = {"weight": np.zeros(max(1, (size_bytes - 2_000) // 4), np.float32)}
    rng = np.random.default_rng(size_bytes)
    weights["weight"][:] = rng.normal(size=weights["weight"].shape)
    manifest = Manifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00+00:00",
        network="mlp",
        cut_layer="block1",
        classes=10,
        frozen=False,
        input=ArraySpec(shape=SAMPLE_SHAPE),
        activation=ArraySpec(shape=(16,)),
        parameters=(TensorSpec(name="weight", shape=weights["weight"].shape),),
        opset=18,
        forward_bytes_per_sample=100,
        backward_bytes_per_sample=300,
    )
    files = {
        CLIENT_FORWARD: b"graph",
        CLIENT_TORCH: b'{"schema": 1}',
        WEIGHTS: encode_weights(weights),
    }
    return build_bundle(manifest, files)
