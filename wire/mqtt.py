"""One MQTT 5 connection: the project's only importer of paho.

Callbacks decode nothing, enqueue and never raise (an exception would end paho's thread). Nothing
is queued while offline: a publish is refused and, once connected again, each side says what still
holds. Sizes are checked before a publish, since paho ignores the broker's limit and would resend
an oversized message for ever.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from wire.client_choice import ClientName, build_client
from wire.credentials import read_secret
from wire.errors import SplitfleetError, TransportError
from wire.inbox import Connected, Disconnected, Inbox, Received
from wire.messages import SCHEMA
from wire.quick_losses import QuickLosses
from wire.settings import Settings
from wire.tls import TlsSettings, build_tls_context
from wire.topics import Channel, Payload, build_topic

logger = logging.getLogger(__name__)

BuildWill = Callable[[int], tuple[str, bytes]]  # topic and payload for a connection's number

SOCKET_BUFFER_BYTES = 1 << 20  # a whole activation message fits: paho re-slices what does not
MAX_INFLIGHT = 20  # unacknowledged QoS 1 messages: Mosquitto's default Receive Maximum
MAX_QUEUED = 5_000  # paho's own queue is unlimited by default
PACKET_OVERHEAD_BYTES = 1_024  # topic and properties of a PUBLISH
STOP_TIMEOUT_S = 5.0
TAKEN_OVER = 0x8E  # MQTT 5: another connection came with our client id


class MqttSettings(Settings, frozen=True, kw_only=True):
    """Where the broker is and how to talk to it; ``password_file`` may be ``credential:NAME``.

    ``client``: ``quick`` is ours upon paho (``wire.quick_client``), ``stock`` is paho's own.
    """

    host: str = "127.0.0.1"
    port: int = 1883
    username: str | None = None
    password_file: str | None = None
    tls: TlsSettings | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 60
    reconnect_min_s: float = 1.0
    reconnect_max_s: float = 30.0
    max_payload_bytes: int = 64 << 20
    client: ClientName = "quick"

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"expected a port from 1 to 65535, received {self.port}")
        if not 0 < self.reconnect_min_s <= self.reconnect_max_s:
            raise ValueError("expected 0 < reconnect_min_s <= reconnect_max_s")
        if self.keepalive_s < 1 or self.max_payload_bytes < 1024:
            raise ValueError("expected keepalive_s >= 1 and max_payload_bytes >= 1024")
        if self.password_file is not None and self.username is None:
            raise ValueError("expected username beside password_file")


class PayloadTooLargeError(SplitfleetError):
    """A payload over the broker's or our own limit; nothing was sent."""


class MqttConnection:
    """A connection that keeps itself up and feeds an Inbox.

    ``next_boot`` gives the number of each connection attempt and ``build_will`` the last will
    for that number, so that a will that arrives late can be told from a current one.

    Two clients with one id push each other off the broker for ever. One that ``yields`` ends when
    another takes its place (``is_taken_over``); one that does not comes back, and seldom. Not every
    broker gives MQTT 5's reason; where none does, losses in quick succession raise the suspicion.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        client_id: str,
        fleet: str,
        subscriptions: list[str],
        inbox: Inbox,
        next_boot: Callable[[], int],
        build_will: BuildWill | None,
        yields: bool = False,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._subscriptions = subscriptions
        self._inbox = inbox
        self._next_boot = next_boot
        self._build_will = build_will
        self._yields = yields
        self._client_id = client_id
        self._quick_losses = QuickLosses()
        self.is_taken_over = False  # for good: the network thread ends
        self._boot = 0
        self._connected = threading.Event()
        self._max_packet_bytes: int | None = None
        self._properties: dict[tuple[Payload, int | None], Properties] = {}
        self._failures = 0
        self._is_stopping = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self._client = self._build_client()

    @property
    def is_connected(self) -> bool:
        """True while the broker's acceptance stands and the network thread lives."""
        return self._connected.is_set() and self.is_thread_alive

    @property
    def is_thread_alive(self) -> bool:
        """The network thread runs; paho's own ``is_connected`` stays True after its death."""
        thread = self._client._thread
        return thread is not None and thread.is_alive()

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that we and the broker accept."""
        limit = self._settings.max_payload_bytes
        if self._max_packet_bytes is not None:
            limit = min(limit, self._max_packet_bytes - PACKET_OVERHEAD_BYTES)
        return limit

    def start(self) -> None:
        """Begin to connect; a broker that is not there is waited for, with back-off."""
        self._client.connect_async(
            self._settings.host,
            self._settings.port,
            keepalive=self._settings.keepalive_s,
            clean_start=paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=self._connect_properties(),
        )
        self._client.loop_start()

    def publish(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        bundle: str | None = None,
        expiry_s: float | None = None,
    ) -> bool:
        """Hand a message to the broker; False when offline (nothing was queued).

        ``device`` or ``bundle`` (a digest) complete the topics of channels that need them. Raises
        PayloadTooLargeError, with both sizes, before anything is sent.
        """
        if len(payload) > self.max_payload_bytes:
            raise PayloadTooLargeError(
                f"{channel.level}: {len(payload)} bytes exceed the limit of "
                f"{self.max_payload_bytes} bytes for one message"
            )
        if not self._connected.is_set():
            return False
        info = self._client.publish(
            build_topic(self._fleet, channel, device, bundle=bundle),
            payload,
            qos=channel.qos,
            retain=channel.retain,
            properties=self._publish_properties(channel.payload, expiry_s),
        )
        self.bytes_sent += len(payload)
        return info.rc in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN)

    def subscribe(self, topic: str) -> None:
        """Listen to one more topic, in this connection and in those that follow."""
        self._subscriptions = [*self._subscriptions, topic]
        if self._connected.is_set():
            self._client.subscribe([(topic, SubscribeOptions(qos=1))])

    def unsubscribe(self, topic: str) -> None:
        """Listen to it no longer."""
        self._subscriptions = [held for held in self._subscriptions if held != topic]
        if self._connected.is_set():
            self._client.unsubscribe(topic)

    def stop(self) -> None:
        """Send what is in flight, disconnect without the last will, end the thread."""
        self._is_stopping = True
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self._connected.is_set() and self._has_unsent() and time.monotonic() < deadline_s:
            time.sleep(0.005)
        self._client.disconnect()
        self._client.loop_stop()
        self._connected.clear()

    def _has_unsent(self) -> bool:
        return bool(self._client._out_packet or self._client._out_messages)

    def _build_client(self) -> paho.Client:
        client = build_client(self._settings.client, self._client_id)
        client.suppress_exceptions = True  # an exception in a callback would end the thread
        paho_logger = logger.getChild("paho")
        paho_logger.setLevel(logging.WARNING)
        paho_logger.addFilter(_is_news)
        client.enable_logger(paho_logger)
        client.max_inflight_messages_set(MAX_INFLIGHT)
        client.max_queued_messages_set(MAX_QUEUED)
        # A fleet that lost its broker must not come back in one moment: the first delay, which
        # paho doubles, is drawn per client.
        first_s = self._settings.reconnect_min_s * random.uniform(1.0, 2.0)
        self._reconnect = (first_s, max(first_s, self._settings.reconnect_max_s))
        client.reconnect_delay_set(*self._reconnect)  # type: ignore[arg-type]
        if self._settings.username is not None:
            client.username_pw_set(self._settings.username, self._read_password())
        if self._settings.tls is not None:
            client.tls_set_context(build_tls_context(self._settings.tls))
        client.on_pre_connect = self._on_pre_connect
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_socket_open = _on_socket_open
        return client

    def _read_password(self) -> str | None:
        value = self._settings.password_file
        return None if value is None else read_secret(value, field="$.mqtt.password_file")

    def _connect_properties(self) -> Properties:
        properties = _new_properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._settings.session_expiry_s
        properties.ReceiveMaximum = 1000
        return properties

    def _publish_properties(self, payload: Payload, expiry_s: float | None) -> Properties:
        seconds = None if expiry_s is None else max(1, math.ceil(expiry_s))
        key = (payload, seconds)
        properties = self._properties.get(key)
        if properties is None:
            if len(self._properties) > 64:
                self._properties.clear()
            properties = _message_properties(PacketTypes.PUBLISH, payload)
            if seconds is not None:
                properties.MessageExpiryInterval = seconds
            self._properties[key] = properties
        return properties

    # Callbacks: paho's thread. They only enqueue.

    def _on_pre_connect(self, client: paho.Client, _userdata: Any) -> None:
        self._boot = self._next_boot()
        if self._build_will is None:
            return
        topic, payload = self._build_will(self._boot)
        properties = _message_properties(PacketTypes.WILLMESSAGE, Payload.JSON)
        client.will_set(topic, payload, qos=1, retain=True, properties=properties)

    def _on_connect(
        self,
        client: paho.Client,
        _userdata: Any,
        _flags: Any,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            # Refused credentials do not get better by asking often.
            self._come_back_late(client)
            self._report_failure(f"the broker refused the connection: {reason}")
            return
        client.reconnect_delay_set(*self._reconnect)  # type: ignore[arg-type]
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        options = SubscribeOptions(qos=1)
        if self._subscriptions:
            client.subscribe([(topic, options) for topic in self._subscriptions])
        self._failures = 0
        self._quick_losses.accepted(time.monotonic())
        self._connected.set()
        self._inbox.put(Connected(boot=self._boot, max_packet_bytes=self._max_packet_bytes))

    def _on_connect_fail(self, _client: paho.Client, _userdata: Any) -> None:
        where = f"{self._settings.host}:{self._settings.port}"
        self._report_failure(f"no broker answers at {where}")

    def _on_disconnect(
        self,
        client: paho.Client,
        _userdata: Any,
        _flags: Any,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        # Can come twice for one loss, and also for a connection that was never accepted.
        if self._is_stopping or self.is_taken_over:
            return
        was_connected = self._connected.is_set()
        self._connected.clear()
        if reason.value == TAKEN_OVER:
            self._give_way(client)
        elif not was_connected:
            self._report_failure("the broker ended the connection before it accepted it")
        elif self._quick_losses.lost(time.monotonic()):
            self._report_failure(
                "connections to the broker end soon after they began: does another client have "
                f"our id, {self._client_id!r}?"
            )
        else:
            self._report_failure(f"connection to the broker ended: {reason}")

    def _give_way(self, client: paho.Client) -> None:
        """Another client has come with our id: leave the place to it, or come back seldom."""
        if self._yields:
            self.is_taken_over = True
            client.disconnect()  # without a connection: ends paho's loop
        else:
            self._come_back_late(client)
        self._report_failure(f"another client has taken our place with our id, {self._client_id!r}")

    def _come_back_late(self, client: paho.Client) -> None:
        client.reconnect_delay_set(self._reconnect[1], self._reconnect[1])  # type: ignore[arg-type]

    def _report_failure(self, reason: str) -> None:
        self._failures += 1
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        logger.log(level, "%s; %s", reason, "ends" if self.is_taken_over else "trying again")
        self._inbox.put(Disconnected(reason=reason))

    def _on_message(self, _client: paho.Client, _userdata: Any, message: Any) -> None:
        payload = message.payload
        self.bytes_received += len(payload)
        pairs = getattr(message.properties, "UserProperty", ())
        topic = message.topic
        self._inbox.put(
            Received(
                topic=topic,
                payload=payload,
                retained=bool(message.retain),
                schema=next((value for name, value in pairs if name == "schema"), None),
                arrived_s=time.monotonic(),
                droppable=getattr(message.properties, "ContentType", "") == Payload.TENSORS.value,
                replaces=topic.endswith("/fleet/weights"),
            )
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Paho reports every end of a connection as an error; we have said it already."""
    return "Client is not connected" not in record.getMessage()


def _new_properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]


def _message_properties(packet_type: int, payload: Payload) -> Properties:
    properties = _new_properties(packet_type)
    properties.ContentType = payload.value
    properties.UserProperty = ("schema", SCHEMA)
    return properties


def _on_socket_open(_client: paho.Client, _userdata: Any, sock: Any) -> None:
    # Without TCP_NODELAY Nagle's algorithm and delayed acknowledgements cost 30 ms a message.
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES),
    ):
        try:
            sock.setsockopt(level, option, value)
        except OSError as exc:
            logger.debug("socket option %d was refused: %s", option, exc)


def wait_for_connection(inbox: Inbox, timeout_s: float) -> Connected:
    """Take events until connected; raise TransportError with the last reason after the time."""
    deadline_s = time.monotonic() + timeout_s
    reason = "no answer"
    while (rest_s := deadline_s - time.monotonic()) > 0:
        match inbox.get(rest_s):
            case Connected() as connected:
                return connected
            case Disconnected() as disconnected:
                reason = disconnected.reason
            case _:
                pass
    raise TransportError(f"not connected after {timeout_s:g} s: {reason}")
