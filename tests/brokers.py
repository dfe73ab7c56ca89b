"""Brokers and small MQTT clients for tests, with events in place of sleeps."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from coordinator.bound_process import start_bound_process
from coordinator.broker import (
    HOST,
    BrokerKind,
    BrokerOptions,
    EmbeddedBroker,
    embedded_broker,
    find_mosquitto,
)

WAIT_S = 30.0
"""How long anything that must happen may take; a test that passes never waits for it."""


def start_mosquitto(directory: Path, *, persistence: bool = False) -> EmbeddedBroker:
    """A Mosquitto of the test's own; fails where the binary is missing."""
    return embedded_broker(
        directory=directory,
        kind=BrokerKind.MOSQUITTO,
        options=BrokerOptions(persistence=persistence),
    )


@contextmanager
def configured_mosquitto(text: str, directory: Path, port: int) -> Iterator[None]:
    """Run Mosquitto on a configuration as it stands; ``port`` is where it will answer."""
    binary = find_mosquitto()
    assert binary is not None, "Mosquitto is not installed"
    if os.geteuid() == 0:  # it would change to a user who cannot read the test's directory
        text += "\nuser root\n"
    config_path = directory / "mosquitto.conf"
    config_path.write_text(text)
    log_path = directory / "mosquitto.log"
    with log_path.open("wb") as log:
        process = start_bound_process([binary, "-c", str(config_path)], log_fd=log.fileno())
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not port_is_open(HOST, port):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline_s, log_path.read_text()
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def port_is_open(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def wait_for_end(pid: int) -> bool:
    """Wait until a process that is not ours to reap has ended (a zombie counts as ended)."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in {"Z", "X"}:
            return True
        time.sleep(0.02)
    return False


@dataclass(frozen=True, slots=True)
class Received:
    """One message as it arrived."""

    topic: str
    payload: bytes
    retain: bool


class Client:
    """A paho client (MQTT 5) for tests: connects, publishes and waits for what it expects.

    Use as a context manager. With ``session_s`` the broker keeps its session that long.
    ``publish`` returns the reason code of the PUBACK.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        client_id: str = "",
        username: str | None = None,
        password: str | None = None,
        will: tuple[str, bytes] | None = None,
        keepalive_s: int = 30,
        session_s: int = 0,
        prepare: Callable[[mqtt.Client], None] | None = None,
    ) -> None:
        self._address = (host, port, keepalive_s)
        self._session_s = session_s
        self.connack = Properties(PacketTypes.CONNACK)
        self._messages: queue.Queue[Received] = queue.Queue()
        self._reasons: queue.Queue[int] = queue.Queue()
        self._pubacks: dict[int, int] = {}
        self._changed = threading.Condition()
        self.disconnected = threading.Event()
        self.paho = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        if username is not None:
            self.paho.username_pw_set(username, password)
        if will is not None:
            self.paho.will_set(will[0], will[1], qos=1, retain=True)
        if prepare is not None:
            prepare(self.paho)
        self._set_callbacks()

    def connect(self) -> int:
        """Connect and return the CONNACK's reason code (0: accepted)."""
        host, port, keepalive_s = self._address
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._session_s
        self.paho.connect(
            host, port, keepalive_s, clean_start=not self._session_s, properties=properties
        )
        self.paho.loop_start()
        return self._reasons.get(timeout=WAIT_S)

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: int = 0
    ) -> int:
        """Publish, wait for the PUBACK and return its reason code."""
        properties = Properties(PacketTypes.PUBLISH)
        if expiry_s:
            properties.MessageExpiryInterval = expiry_s
        info = self.paho.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        with self._changed:
            if not self._changed.wait_for(lambda: info.mid in self._pubacks, WAIT_S):
                raise TimeoutError(f"no PUBACK for {topic}")
            return self._pubacks.pop(info.mid)

    def subscribe(self, topic_filter: str, *, qos: int = 1) -> list[int]:
        """Subscribe, wait for the SUBACK and return its reason codes."""
        granted: queue.Queue[list[int]] = queue.Queue()
        self.paho.on_subscribe = lambda *arguments: granted.put([r.value for r in arguments[3]])
        self.paho.subscribe(topic_filter, qos=qos)
        return granted.get(timeout=WAIT_S)

    def receive(self) -> Received:
        """The next message; raises queue.Empty if none comes."""
        return self._messages.get(timeout=WAIT_S)

    def received(self) -> list[Received]:
        """Messages that have arrived and were not asked for yet."""
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get_nowait())
        return messages

    def break_off(self) -> None:
        """Lose the connection without a DISCONNECT, so that the broker publishes the will."""
        sock = self.paho.socket()
        assert sock is not None
        self.paho.loop_stop()
        sock.close()

    def close(self) -> None:
        """Disconnect and end the network thread."""
        self.paho.disconnect()
        self.paho.loop_stop()

    def __enter__(self) -> Self:
        reason = self.connect()
        if reason != 0:
            self.close()
            raise ConnectionError(f"refused with reason code {reason}")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _set_callbacks(self) -> None:
        self.paho.on_connect = self._note_connack
        self.paho.on_disconnect = lambda *arguments: self.disconnected.set()
        self.paho.on_message = lambda client, userdata, message: self._messages.put(
            Received(message.topic, message.payload, message.retain)
        )
        self.paho.on_publish = self._note_puback

    def _note_connack(
        self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Properties
    ) -> None:
        self.connack = properties
        self._reasons.put(reason.value)

    def _note_puback(self, client: Any, userdata: Any, mid: int, reason: Any, _: Any) -> None:
        with self._changed:
            self._pubacks[mid] = reason.value
            self._changed.notify_all()
