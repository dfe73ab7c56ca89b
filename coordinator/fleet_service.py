"""The coordinator as the devices see it: connection, presence, rollouts. A thin shell.

One thread owns all state and takes events from the inbox; the network thread only fills it.
Signals set a flag: the service ends after the message in hand. On its own this is the service
between runs (``coordinator serve``); ``CoordinatorService`` adds a run.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid

from coordinator.claim import FleetClaim
from coordinator.config import RunSettings
from coordinator.offers import BundleOffers
from coordinator.registry import Device, Registry
from coordinator.rollout.campaign_journal import CampaignJournal
from coordinator.rollout.desk import RolloutDesk
from coordinator.rollout.operator_desk import OperatorDesk
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.exit_codes import ExitCode
from wire.inbox import Connected, Disconnected, Event, Inbox, Received
from wire.messages import (
    SCHEMA,
    Birth,
    Claim,
    DeviceState,
    RolloutStatus,
    Telemetry,
    decode_message,
    encode_message,
)
from wire.mqtt import BuildWill, MqttConnection, PayloadTooLargeError
from wire.notify import notify_ready, notify_status, notify_stopping, notify_watchdog
from wire.notify import watchdog_interval_s as read_watchdog_interval_s
from wire.topics import Channel, Direction, build_client_id, coordinator_subscriptions, parse_topic

logger = logging.getLogger(__name__)

IDLE_S = 0.25  # longest wait for an event: progress, deadlines and the watchdog are looked after
SENDING_S = 0.02  # while chunks are due
DATA_EXPIRY_S = 300.0  # a tensor message older than this is of no use to anybody
READING_TURNS = 200  # messages taken in a row before the rest of the turn has its share


class FleetService:
    """Serves the devices of a fleet until stopped. ``run`` returns the exit code."""

    def __init__(self, settings: RunSettings, *, source: str, broker: str = "") -> None:
        self._settings = settings
        self._source = source
        self._broker = broker or f"{settings.mqtt.host}:{settings.mqtt.port}"
        self._registry = Registry()
        self._inbox = Inbox()
        self._stop = threading.Event()
        self._watchdog_interval_s = read_watchdog_interval_s()
        self._watchdog_due_s = 0.0
        self._offers: BundleOffers | None = None
        campaigns = CampaignJournal(
            settings.fleet,
            settings.fleet_directory,
            settings.fleet_state_url,
            source=source,
            at_once=settings.state is not None,  # the store is there anyway
        )
        self._rollouts = RolloutDesk(
            campaigns,
            self._registry,
            self._publish,
            fleet=settings.fleet,
            run_members=self._run_members,
        )
        self._operators = OperatorDesk(self._rollouts, self._publish)
        self._connection = MqttConnection(
            settings.mqtt,
            client_id=build_client_id(settings.fleet),
            fleet=settings.fleet,
            subscriptions=coordinator_subscriptions(settings.fleet),
            inbox=self._inbox,
            next_boot=self._next_boot,
            build_will=self._last_will(),
            yields=True,
        )
        where = f"{socket.gethostname()}, process {os.getpid()}"
        self._claim = FleetClaim(uuid.uuid4().hex, where, time.time())

    def stop(self) -> None:
        """Ask the service to end; safe in a signal handler."""
        self._stop.set()
        self._inbox.wake()

    def run(self) -> ExitCode:
        """Serve until stopped, or until there is nothing more to do."""
        self._connection.start()
        notify_ready(f"{self._title}: waiting for devices")
        try:
            while (code := self._exit_code()) is None:
                self._turn()
        finally:
            self._end()
        return code

    def _exit_code(self) -> ExitCode | None:
        """What to end with, once there is a reason to."""
        if self._is_taken_over:
            winner = self._claim.winner
            logger.error(
                "%s: another coordinator has taken over%s: a fleet has one at a time. This one "
                "ends and writes nothing more down",
                self._title,
                f" ({winner.where})" if winner else "",
            )
            return ExitCode.TAKEN_OVER
        if self._stop.is_set():
            return ExitCode.OK
        if not self._connection.is_thread_alive:
            logger.error("the network thread has ended")
            return ExitCode.SOFTWARE
        return ExitCode.OK if self._is_done else None

    @property
    def _is_taken_over(self) -> bool:
        return self._connection.is_taken_over or self._claim.winner is not None

    # What a run adds

    @property
    def _title(self) -> str:
        """What the service manager shows."""
        return f"fleet {self._settings.fleet}"

    @property
    def _is_done(self) -> bool:
        return False

    def _next_boot(self) -> int:
        """Number of this start, for the last will."""
        return 0

    def _last_will(self) -> BuildWill | None:
        """What builds the last will of a start, if there is one."""
        return None

    def _run_members(self) -> tuple[str, frozenset[str]]:
        """Bundle and devices of the run that is on."""
        return "", frozenset()

    def _wait_s(self, _now_s: float) -> float:
        """How long a turn may wait for an event."""
        return IDLE_S

    def _receive_tensors(self, channel: Channel, name: str, message: Received) -> None:
        """Activations or gradients came."""
        what = f"{len(message.payload)} bytes of {channel.level} from {name}"
        raise PeerProtocolError(Refusal.FOREIGN_RUN, f"no run is on for {what}")

    def _work(self) -> None:
        """The rest of a turn, after the event."""

    # Loop

    def _turn(self) -> None:
        wait_s = self._wait_s(time.monotonic())
        if self._rollouts.is_sending:
            wait_s = min(wait_s, SENDING_S)
        event = self._inbox.get(wait_s)
        for _ in range(READING_TURNS):
            if event is None:
                break
            self._handle(event)
            if not self._rollouts.is_sending:
                break
            event = self._inbox.get(0.0)  # a fleet that downloads says much, and briefly
        self._work()
        if self._connection.is_connected:
            self._rollouts.turn(time.monotonic())
        self._housekeep(time.monotonic())

    def _handle(self, event: Event) -> None:
        match event:
            case Connected():
                self._connected()
            case Disconnected(reason=reason):
                self._disconnected(reason)
            case Received() as message:
                self._receive(message)

    def _connected(self) -> None:
        notify_status(f"{self._title}: connected to {self._broker}")
        if self._claim.is_due:
            self._say_claim()
        self._rollouts.connected()

    def _say_claim(self) -> None:
        self._publish(Channel.CLAIM, encode_message(self._claim.own))

    def _disconnected(self, reason: str) -> None:
        notify_status(f"{self._title}: offline ({reason})")

    def _receive(self, message: Received) -> None:
        name: str | None = None
        try:
            address = parse_topic(message.topic)
            name = address.device
            self._check(message)
            if address.channel is Channel.CLAIM:
                if self._claim.seen(decode_message(message.payload, Claim)):
                    self._say_claim()
            elif name is None:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, message.topic)
            elif address.channel.direction is Direction.OPERATOR:
                self._receive_from_operator(address.channel, name, message)
            else:
                self._dispatch(address.channel, name, message)
        except PeerProtocolError as refusal:
            number = self._registry.count_refusal(name, refusal.reason)
            level = logging.WARNING if number == 1 else logging.DEBUG
            logger.log(level, "%s: dropped a message on %s: %s", name, message.topic, refusal)

    def _check(self, message: Received) -> None:
        if len(message.payload) > self._settings.mqtt.max_payload_bytes:
            raise PeerProtocolError(
                Refusal.OVERSIZED,
                f"expected at most {self._settings.mqtt.max_payload_bytes} bytes, received "
                f"{len(message.payload)}",
            )
        if message.schema is not None and message.schema != SCHEMA:
            raise PeerProtocolError(
                Refusal.SCHEMA, f"expected schema {SCHEMA}, received {message.schema[:20]!r}"
            )

    def _receive_from_operator(self, channel: Channel, name: str, message: Received) -> None:
        if message.retained:  # somebody's mistake, and not what anybody asks now
            raise PeerProtocolError(Refusal.LATE, "a retained request")
        match channel:
            case Channel.OPERATOR_REQUEST:
                self._operators.request(name, message.payload)
            case Channel.OPERATOR_BUNDLE:
                self._operators.chunk(name, message.payload)
            case _:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, f"{message.topic} is not for us")

    def _dispatch(self, channel: Channel, name: str, message: Received) -> None:
        payload = message.payload
        match channel:
            case Channel.BIRTH:
                birth = decode_message(payload, Birth)
                self._present(self._registry.on_birth(name, birth))
            case Channel.STATE:
                state = decode_message(payload, DeviceState)
                self._present(self._registry.on_state(name, state))
            case Channel.ACTIVATIONS | Channel.GRADIENTS:
                self._receive_tensors(channel, name, message)
            case Channel.ROLLOUT_STATUS:
                self._answer(self._registry.known(name), decode_message(payload, RolloutStatus))
            case Channel.TELEMETRY:
                self._registry.known(name).telemetry = decode_message(payload, Telemetry)
            case _:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, f"{message.topic} is not for us")

    # Devices and bundles

    def _present(self, device: Device) -> None:
        self._rollouts.device_changed(device)
        self._device_changed(device)

    def _device_changed(self, device: Device) -> None:
        """A birth or state came."""

    def _answer(self, device: Device, status: RolloutStatus) -> None:
        if status.campaign:
            self._rollouts.answer(device, status)
            return
        if self._offers is None:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, "no bundle was offered")
        self._offers.answer(device, status)

    # Housekeeping and end

    def _housekeep(self, now_s: float) -> None:
        for topic in self._inbox.take_dropped_topics():
            self._registry.count_refusal(parse_topic(topic).device, Refusal.QUEUE_FULL)
        if self._watchdog_interval_s is not None and now_s >= self._watchdog_due_s:
            # This loop turns and the network thread lives: that is what progress means here.
            self._watchdog_due_s = now_s + self._watchdog_interval_s
            notify_watchdog()

    def _end(self) -> None:
        notify_stopping(f"{self._title}: leaving")
        # Another coordinator has read what is written down, and goes on from there.
        self._rollouts.close(write=not self._is_taken_over)
        self._connection.stop()

    def _publish(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        bundle: str | None = None,
        expiry_s: float | None = None,
    ) -> None:
        if expiry_s is None and channel is Channel.CUT_GRADIENT:
            expiry_s = DATA_EXPIRY_S
        try:
            self._connection.publish(
                channel, payload, device=device, bundle=bundle, expiry_s=expiry_s
            )
        except PayloadTooLargeError as exc:
            raise ModelError(
                f"{exc}: raise mqtt.max_payload_bytes and the broker's max_packet_size"
            ) from exc
