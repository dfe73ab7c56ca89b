"""The lab's Mosquitto configuration, run by a real Mosquitto."""

from __future__ import annotations

import datetime as dt
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.broker import HOST, find_free_port
from coordinator.broker_config import (
    LabBroker,
    TlsPaths,
    iotcore_config,
    lab_acl,
    lab_mosquitto_config,
    private_mosquitto_config,
)
from tests.brokers import WAIT_S, Client, configured_mosquitto
from wire.errors import ConfigError

pytestmark = pytest.mark.broker

USERS = ("coordinator", "operator", "gw-1", "gw-2")
NOT_AUTHORIZED = 0x87
REFUSED = {0x86, 0x87}  # bad user name or password; not authorised
DELIVERED = {0x00, 0x10}  # success; success, but nobody subscribes
ROOT = "splitfleet/v1/plant"


@dataclass(frozen=True)
class Lab:
    port: int
    operator_port: int

    def device(self, name: str, **arguments: object) -> Client:
        return Client(HOST, self.port, username=name, password=f"{name}-pw", **arguments)  # type: ignore[arg-type]

    def coordinator(self, client_id: str = "") -> Client:
        user = "coordinator"
        return Client(
            HOST,
            self.operator_port,
            username=user,
            password=f"{user}-pw",
            client_id=client_id,
        )


def write_lab(directory: Path, *, tls: TlsPaths | None = None) -> LabBroker:
    (directory / "db").mkdir()
    lab = LabBroker(
        fleet="plant",
        port=find_free_port(),
        bind=HOST,
        operator_port=find_free_port(),
        password_path=str(directory / "users"),
        acl_path=str(directory / "acl"),
        persistence_directory=str(directory / "db"),
        tls=tls,
    )
    (directory / "acl").write_text(lab_acl(lab))
    (directory / "users").touch(mode=0o600)
    for user in USERS:
        subprocess.run(
            ["mosquitto_passwd", "-b", str(directory / "users"), user, f"{user}-pw"], check=True
        )
    return lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    settings = write_lab(directory)
    assert settings.operator_port is not None
    with configured_mosquitto(lab_mosquitto_config(settings), directory, settings.port):
        yield Lab(settings.port, settings.operator_port)


def test_device_writes_below_its_own_up_only(lab: Lab) -> None:
    with lab.device("gw-1") as device:
        assert device.publish(f"{ROOT}/dev/gw-1/up/activations", b"x") in DELIVERED
        for topic in (
            f"{ROOT}/dev/gw-2/up/activations",
            f"{ROOT}/dev/gw-1/down/allocation",
            f"{ROOT}/fleet/weights",
            f"{ROOT}/op/gw-1/request",
            f"{ROOT}/op/gw-1/bundle",
            "splitfleet/v1/other/dev/gw-1/up/activations",
            "elsewhere",
        ):
            assert device.publish(topic, b"x") == NOT_AUTHORIZED, topic
        assert device.publish(f"{ROOT}/dev/gw-1/up/gradients", b"x") in DELIVERED
        assert not device.disconnected.is_set(), "a refused message must not cost the connection"


def test_device_reads_its_own_down_and_what_is_for_all(lab: Lab) -> None:
    """Mosquitto 2.0 grants every subscription; what counts is what arrives."""
    with lab.device("gw-1") as device, lab.coordinator() as coordinator:
        device.subscribe("#")
        for level in (
            "dev/gw-2/down/allocation",
            "dev/gw-2/up/birth",
            "dev/gw-1/up/birth",
            "op/gw-1/reply",
        ):
            assert coordinator.publish(f"{ROOT}/{level}", b"not for gw-1") in DELIVERED
        coordinator.publish(f"{ROOT}/dev/gw-1/down/allocation", b"mine")
        coordinator.publish(f"{ROOT}/fleet/state", b"for all")
        assert [device.receive().payload for _ in range(2)] == [b"mine", b"for all"]
        assert device.received() == []


def test_coordinator_reads_and_writes_everything_in_its_fleet_only(lab: Lab) -> None:
    with lab.coordinator() as coordinator, lab.device("gw-2") as device:
        coordinator.subscribe(f"{ROOT}/dev/+/up/+")
        device.publish(f"{ROOT}/dev/gw-2/up/birth", b"hello")
        assert coordinator.receive().topic == f"{ROOT}/dev/gw-2/up/birth"
        assert coordinator.publish("splitfleet/v1/other/fleet/state", b"x") == NOT_AUTHORIZED


def test_operator_asks_the_coordinator_and_reaches_nobody_else(lab: Lab) -> None:
    """On the listener for devices, as from another host."""
    with lab.device("operator") as operator, lab.coordinator() as coordinator:
        operator.subscribe(f"{ROOT}/#")
        for level in ("op/op-1/request", "op/op-1/bundle"):
            coordinator.subscribe(f"{ROOT}/{level}")
            assert operator.publish(f"{ROOT}/{level}", b"x") in DELIVERED
        for level in ("dev/gw-1/down/rollout", "dev/gw-1/up/birth", "fleet/weights"):
            assert operator.publish(f"{ROOT}/{level}", b"x") == NOT_AUTHORIZED, level
        coordinator.publish(f"{ROOT}/dev/gw-1/down/rollout", b"not for operators")
        coordinator.publish(f"{ROOT}/op/op-1/reply", b"mine")
        assert operator.receive().payload == b"mine"


def test_several_programs_share_the_coordinator_user(lab: Lab) -> None:
    with lab.coordinator("train") as training, lab.coordinator("status") as status:
        assert training.publish(f"{ROOT}/fleet/state", b"1") in DELIVERED
        assert status.publish(f"{ROOT}/fleet/state", b"2") in DELIVERED
        assert not training.disconnected.is_set()


def test_device_cannot_take_over_anothers_client_id(lab: Lab) -> None:
    with lab.device("gw-1", client_id="gw-1") as honest:
        with lab.device("gw-2", client_id="gw-1") as rogue:
            assert rogue.publish(f"{ROOT}/dev/gw-2/up/state", b"x") in DELIVERED
        assert honest.publish(f"{ROOT}/dev/gw-1/up/state", b"x") in DELIVERED
        assert not honest.disconnected.is_set()


@pytest.mark.parametrize(
    ("username", "password"),
    [(None, None), ("gw-1", "wrong"), ("stranger", "gw-1-pw"), ("#", "x"), ("+", "x")],
)
def test_stranger_is_refused(lab: Lab, username: str | None, password: str | None) -> None:
    for port in (lab.port, lab.operator_port):
        client = Client(HOST, port, username=username, password=password)
        client.paho.reconnect_delay_set(60, 60)  # refused: it shall not try again
        assert client.connect() in REFUSED
        client.close()


@dataclass(frozen=True)
class Signed:
    certificate: Path
    key: Path


class Authority:
    """A certificate authority for one test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.path = self.sign("ca", authority=True).certificate

    def sign(self, name: str, *, authority: bool = False) -> Signed:
        key = self._key if authority else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name if authority else subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return self._write(name, certificate, key)

    def _write(
        self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> Signed:
        signed = Signed(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        signed.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        signed.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return signed


def test_with_tls_a_devices_name_is_its_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, device = authority.sign("broker"), authority.sign("gw-1")
    tls = TlsPaths(ca=str(authority.path), certificate=str(server.certificate), key=str(server.key))
    lab = write_lab(tmp_path, tls=tls)

    def client(certificate: str | None, key: str | None) -> Client:
        return Client(
            "localhost",
            lab.port,
            prepare=lambda paho: paho.tls_set(str(authority.path), certificate, key),
        )

    with configured_mosquitto(lab_mosquitto_config(lab), tmp_path, lab.port):
        with client(str(device.certificate), str(device.key)) as gateway:
            assert gateway.publish(f"{ROOT}/dev/gw-1/up/birth", b"x") in DELIVERED
            assert gateway.publish(f"{ROOT}/dev/gw-2/up/birth", b"x") == NOT_AUTHORIZED
        stranger = client(None, None)
        stranger.paho.connect("localhost", lab.port)
        stranger.paho.loop_start()
        assert stranger.disconnected.wait(WAIT_S), "a client without a certificate was let in"
        stranger.close()


DEBIANS_MAIN_FILE = """\
pid_file {directory}/mosquitto.pid

persistence true
persistence_location {directory}/db/

log_dest file {directory}/broker.log

include_dir {directory}/conf.d
"""


def test_debians_main_file_can_include_it(tmp_path: Path) -> None:
    """As `coordinator broker-config --out` is told to be used; Mosquitto refuses a second
    persistence_location.
    """
    lab = replace(write_lab(tmp_path), persistence_directory=None)
    included = tmp_path / "conf.d" / "splitfleet.conf"
    included.parent.mkdir()
    included.write_text(lab_mosquitto_config(lab))
    main_file = DEBIANS_MAIN_FILE.format(directory=tmp_path)
    topic = f"{ROOT}/fleet/state"
    coordinator = Lab(lab.port, lab.operator_port or 0).coordinator
    with configured_mosquitto(main_file, tmp_path, lab.port), coordinator() as client:
        client.publish(topic, b"kept", retain=True)
    with configured_mosquitto(main_file, tmp_path, lab.port), coordinator() as client:
        client.subscribe(topic)
        assert client.receive().payload == b"kept"


def test_every_setting_stands_with_its_reason(tmp_path: Path) -> None:
    tls = TlsPaths(ca="/c/ca.pem", certificate="/c/broker.pem", key="/c/broker.key")
    texts = [
        lab_mosquitto_config(LabBroker(fleet="plant", tls=tls)),
        lab_mosquitto_config(LabBroker(fleet="plant", persistence_directory="/d")),
        private_mosquitto_config(host=HOST, port=1883, as_root=True, persistence_directory="/d"),
    ]
    for text in texts:
        lines = text.splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if line and not line.startswith("#"):
                assert before.startswith("# "), line


def test_root_is_kept_only_where_root_starts_the_broker() -> None:
    for as_root in (True, False):
        text = private_mosquitto_config(host=HOST, port=1883, as_root=as_root)
        assert ("user root" in text.splitlines()) is as_root


def test_iotcore_keeps_a_largest_packet_within_its_segments() -> None:
    text = iotcore_config(host=HOST, port=1883, max_packet_bytes=400 << 20)
    values = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    kept_bytes = int(values["max_segment_size"]) * int(values["max_segment_count"])
    assert kept_bytes >= int(values["max_payload_size"]) == 400 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fleet": "a/b"}, "fleet: expected 1 to 64 letters"),
        ({"fleet": "+"}, "fleet: expected 1 to 64 letters"),
        ({"fleet": "f", "coordinator_user": "a b"}, "coordinator_user: expected 1 to 64"),
        ({"fleet": "f", "port": 0}, "port: expected a port from 1 to 65535, got 0"),
        ({"fleet": "f", "operator_port": 1883}, "operator_port: expected another port than 1883"),
        ({"fleet": "f", "acl_path": "acl"}, "acl_path: expected an absolute path, got 'acl'"),
        (
            {"fleet": "f", "persistence_directory": "db"},
            "persistence_directory: expected an absolute path, got 'db'",
        ),
        (
            {"fleet": "f", "password_path": "/x\nallow_anonymous true"},
            "password_path: expected an absolute path",
        ),
        (
            {"fleet": "f", "tls": TlsPaths(ca="/a", certificate="b", key="/c")},
            "tls.certificate: expected an absolute path, got 'b'",
        ),
        ({"fleet": "f", "max_packet_bytes": 100}, "max_packet_bytes: expected at least 65536"),
        ({"fleet": "f", "max_queued_bytes": 1}, "max_queued_bytes: expected at least max_packet"),
        ({"fleet": "f", "mosquitto_version": (1, 5, 11)}, "expected Mosquitto 1.6 or later"),
    ],
)
def test_unusable_argument_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LabBroker(**arguments)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(message)
