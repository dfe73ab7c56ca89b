"""Our MQTT client upon paho, and paho's own, as the product uses them, over real brokers."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.broker import BrokerKind, EmbeddedBroker, embedded_broker, find_free_port
from tests.brokers import WAIT_S, configured_mosquitto, start_mosquitto
from wire import client_choice
from wire.brief_connection import brief_connection
from wire.client_choice import ClientName, build_client
from wire.inbox import Disconnected, Inbox, Received
from wire.mqtt import MqttConnection, MqttSettings
from wire.quick_client import QuickClient
from wire.tls import TlsSettings
from wire.topics import Channel, build_topic

pytestmark = pytest.mark.broker

FLEET = "lab"


@pytest.fixture(scope="module", params=[BrokerKind.MOSQUITTO, BrokerKind.IOTCORE])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedBroker]:
    directory = tmp_path_factory.mktemp(f"broker-{request.param.value}")
    with embedded_broker(directory=directory, kind=request.param) as running:
        yield running


@contextmanager
def connection(
    port: int,
    name: str,
    client: ClientName,
    *subscriptions: str,
    tls: TlsSettings | None = None,
) -> Iterator[tuple[MqttConnection, Inbox]]:
    settings = MqttSettings(
        port=port, client=client, tls=tls, reconnect_min_s=0.1, reconnect_max_s=0.2
    )
    with brief_connection(
        settings, client_id=name, fleet=FLEET, subscriptions=subscriptions, timeout_s=WAIT_S
    ) as made:
        yield made


@contextmanager
def both(
    port: int, client: ClientName, tls: TlsSettings | None = None
) -> Iterator[tuple[MqttConnection, MqttConnection, Inbox]]:
    """A coordinator that writes, a device that reads, and what the device gets."""
    topics = [build_topic(FLEET, Channel.CUT_GRADIENT, "d1"), build_topic(FLEET, Channel.WEIGHTS)]
    with ExitStack() as stack:
        reader, inbox = stack.enter_context(connection(port, "d1", client, *topics, tls=tls))
        writer, _ = stack.enter_context(connection(port, "c", client, tls=tls))
        # A subscription is granted some time after the connection: the first message that comes
        # says that it is, and the one sent last that nothing is under way.
        while inbox.get(0.2) is None:
            writer.publish(Channel.CUT_GRADIENT, b"hello", device="d1")
        writer.publish(Channel.CUT_GRADIENT, b"ready", device="d1")
        while receive(inbox, 1)[0].payload != b"ready":
            pass
        yield writer, reader, inbox


def receive(inbox: Inbox, count: int) -> list[Received]:
    found = []
    while len(found) < count:
        event = inbox.get(WAIT_S)
        assert isinstance(event, Received), f"{len(found)} of {count} came, then {event}"
        found.append(event)
    return found


@pytest.mark.parametrize("client", ["quick", "stock"])
def test_messages_of_all_sizes_arrive_whole_and_in_order(
    broker: EmbeddedBroker, client: ClientName
) -> None:
    payloads = [os.urandom(size) for size in (1, 100, 65_000, 65_536, 70_000, 3_000_000, 7)]
    with both(broker.port, client) as (writer, reader, inbox):
        for payload in payloads:
            assert writer.publish(Channel.CUT_GRADIENT, payload, device="d1", expiry_s=60.0)
        messages = receive(inbox, len(payloads))
        assert [message.payload for message in messages] == payloads
        assert {message.topic for message in messages} == {
            build_topic(FLEET, Channel.CUT_GRADIENT, "d1")
        }
        assert all(message.droppable and message.schema == "1" for message in messages)
        assert reader.bytes_received >= sum(map(len, payloads))


def write_and_answer_at_once(port: int, tls: TlsSettings | None = None) -> None:
    """Two threads write while the network thread acknowledges, and the reader writes as well."""
    rounds = 60
    with both(port, "quick", tls) as (writer, reader, inbox):

        def write(mark: int) -> None:
            for number in range(rounds):
                payload = bytes([mark, number]) + bytes([mark]) * (number * 4001 + 1)
                assert writer.publish(Channel.CUT_GRADIENT, payload, device="d1")

        threads = [threading.Thread(target=write, args=(mark,)) for mark in (1, 2)]
        for thread in threads:
            thread.start()
        seen: dict[int, list[int]] = {1: [], 2: []}
        for message in receive(inbox, 2 * rounds):
            mark, number = message.payload[0], message.payload[1]
            assert message.payload[2:] == bytes([mark]) * (number * 4001 + 1)
            seen[mark].append(number)
            assert reader.publish(Channel.TELEMETRY, message.payload, device="d1")
        for thread in threads:
            thread.join(WAIT_S)
        assert seen == {1: list(range(rounds)), 2: list(range(rounds))}


def test_threads_that_write_at_once_do_not_cut_into_each_others_messages(
    broker: EmbeddedBroker,
) -> None:
    write_and_answer_at_once(broker.port)


def test_the_same_over_tls(tmp_path: Path) -> None:
    port = find_free_port()
    ca, cert, key = write_certificates(tmp_path)
    text = f"""
listener {port} 127.0.0.1
allow_anonymous true
certfile {cert}
keyfile {key}
max_inflight_messages 100
max_queued_messages 0
max_packet_size 10000000
"""
    with configured_mosquitto(text, tmp_path, port):
        write_and_answer_at_once(port, TlsSettings(ca=str(ca)))


def test_with_tls_only_the_network_thread_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL must not read and write one connection in two threads at once."""
    writers: set[str] = set()
    inner = ssl.SSLSocket.send

    def send(self: ssl.SSLSocket, *args: Any) -> int:
        writers.add(threading.current_thread().name)
        return inner(self, *args)

    monkeypatch.setattr(ssl.SSLSocket, "send", send)
    port = find_free_port()
    ca, cert, key = write_certificates(tmp_path)
    text = f"listener {port} 127.0.0.1\nallow_anonymous true\ncertfile {cert}\nkeyfile {key}\n"
    with (
        configured_mosquitto(text, tmp_path, port),
        both(port, "quick", TlsSettings(ca=str(ca))) as (writer, _, inbox),
    ):
        writer.publish(Channel.CUT_GRADIENT, b"x" * 200_000, device="d1")
        receive(inbox, 1)
    assert writers
    assert all(name.startswith("paho-mqtt-client") for name in writers)


def write_certificates(directory: Path) -> tuple[Path, Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority: (authority, certificate, key)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = (directory / "broker.crt", directory / "broker.key")
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths[0], paths[0], paths[1]


def test_message_to_nobody_is_done_with(broker: EmbeddedBroker) -> None:
    """MQTT 5 says so with a reason, which not every acknowledgement has."""
    with connection(broker.port, "c", "quick") as (writer, _):
        assert writer.publish(Channel.CUT_GRADIENT, b"x" * 100_000, device="nobody")
        writer.stop()  # waits for acknowledgements
        assert not writer._client._out_messages


def test_half_a_message_of_a_broken_connection_is_forgotten(tmp_path: Path) -> None:
    with (
        start_mosquitto(tmp_path / "proxied") as broker,
        socket.create_server(("127.0.0.1", 0)) as gate,
    ):
        port = gate.getsockname()[1]
        first = threading.Event()

        def relay_then_break() -> None:
            """The first connection ends in the middle of a message; later ones are let through."""
            while True:
                try:
                    near, _ = gate.accept()
                except OSError:
                    return
                far = socket.create_connection((broker.host, broker.port))
                limit = None if first.is_set() else 40_000
                first.set()
                for source, target, most in ((near, far, None), (far, near, limit)):
                    threading.Thread(target=_pump, args=(source, target, most), daemon=True).start()

        threading.Thread(target=relay_then_break, daemon=True).start()
        payload = os.urandom(300_000)
        with connection(broker.port, "c", "quick") as (writer, _):
            writer.publish(Channel.WEIGHTS, payload)  # retained
            topic = build_topic(FLEET, Channel.WEIGHTS)
            with connection(port, "d1", "quick", topic) as (_, inbox):
                events = [inbox.get(WAIT_S)]
                while not isinstance(events[-1], Received):
                    assert events[-1] is not None, events
                    events.append(inbox.get(WAIT_S))
                assert any(isinstance(event, Disconnected) for event in events)
                assert events[-1].payload == payload
        gate.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket, most: int | None) -> None:
    """Pass bytes on, at most so many; then end both sides."""
    passed = 0
    try:
        while data := source.recv(8192):
            target.sendall(data)
            passed += len(data)
            if most is not None and passed >= most:
                break
    except OSError:
        pass
    for side in (source, target):
        try:
            side.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def test_what_is_not_mqtt_ends_the_connection_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                # CONNACK, then a length of five bytes.
                client.sendall(bytes([0x20, 3, 0, 0, 0]) + b"\x30\xff\xff\xff\xff\x01")
                client.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        with connection(server.getsockname()[1], "me", "quick") as (_, inbox):
            assert isinstance(inbox.get(WAIT_S), Disconnected)
    assert any("is not MQTT" in record.getMessage() for record in caplog.records)


def test_unknown_version_of_paho_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_client("quick", "me"), QuickClient)
    assert type(build_client("stock", "me")) is paho.Client
    monkeypatch.setattr(client_choice, "version", lambda _name: "2.9.0")
    assert type(build_client("quick", "me")) is paho.Client


def test_ours_is_not_even_imported_with_an_unknown_version() -> None:
    """It imports what only some versions have, and connections must be made with all of them."""
    program = """
import importlib.metadata, sys
importlib.metadata.version = lambda _name: "2.1.0"
from wire.mqtt import MqttConnection, MqttSettings
from wire.inbox import Inbox
MqttConnection(MqttSettings(), client_id="me", fleet="lab", subscriptions=[], inbox=Inbox(),
               next_boot=lambda: 1, build_will=None)
sys.exit("wire.quick_client" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)
