"""Broker configurations as text: the private brokers of a demo and Mosquitto for a lab.

Pure functions. Every setting stands with its reason, because a broker's defaults lose
messages without a word: queues that drop, limits that disconnect, saves that never happen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wire.errors import ConfigError
from wire.topics import NAME_RULE, ROOT, is_valid_name

MAX_PACKET_BYTES = 64 << 20
"""Largest MQTT packet that our configurations accept, unless told otherwise."""

MAX_QUEUED_BYTES = 4 * MAX_PACKET_BYTES
"""What a broker holds for one slow or absent client."""

MAX_INFLIGHT_MESSAGES = 100

_MANY = 10_000_000

OLDEST_MOSQUITTO = (1, 6, 0)
"""The first Mosquitto with MQTT 5, max_packet_size and set_tcp_nodelay."""

COORDINATOR_USER = "coordinator"

OPERATOR_USER = "operator"
"""Who may command rollouts from another host without being the coordinator."""

# rumqttd keeps the last segments of every topic filter in memory and drops what a slow client
# has not read by then, acknowledged or not: small ones lose messages, the stock 10 x 100 MB grow
# to gigabytes over a fleet's filters. These hold some hundred steps of a demo.
_IOTCORE_SEGMENT_BYTES = 8 << 20
_IOTCORE_SEGMENTS = 8

_IOTCORE_TEMPLATE = """\
id = 0

[router]
id = 0
max_connections = 10000
max_outgoing_packet_count = 200
# Kept in memory per topic filter; a client that lags further behind loses messages.
max_segment_size = {segment_bytes}
max_segment_count = {segments}

# "v5" and no "v4" section: MQTT 5 is what the protocol needs.
[v5.1]
name = "v5"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
# The default of 20 KB refuses tensors.
max_payload_size = {max_packet_bytes}
max_inflight_count = {max_inflight}
dynamic_filters = true
"""

_ABOUT_PERSISTENCE = """\
# Where sessions are kept (persistence_location) stands in the mosquitto.conf that includes this
# file: /var/lib/mosquitto/ on Debian. Mosquitto does not start with a second one. There must be
# space for every client's queue: on a full disk the broker acknowledges, and loses the message.

"""

_UNSAFE_PATH = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a Mosquitto configuration and the reason for it."""

    line: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsPaths:
    """Where a broker finds its certificates, as absolute paths on the broker's host.

    With ``require_client_certificates`` a device's name is its certificate's common name, and
    no password is asked for.
    """

    ca: str
    certificate: str
    key: str
    require_client_certificates: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LabBroker:
    """What a lab's Mosquitto configuration depends on.

    ``port`` listens for devices on ``bind`` (all addresses if None); ``operator_port`` listens on
    loopback for the coordinator and its commands. Without ``persistence_directory`` the file is one
    to include, by a mosquitto.conf that says where sessions are kept, as Debian's does. Paths are
    absolute, on the broker's host.
    """

    fleet: str
    port: int = 1883
    bind: str | None = None
    operator_port: int | None = 1884
    password_path: str = "/etc/mosquitto/splitfleet.passwd"  # noqa: S105 - a path
    acl_path: str = "/etc/mosquitto/splitfleet.acl"
    persistence_directory: str | None = None
    tls: TlsPaths | None = None
    coordinator_user: str = COORDINATOR_USER
    max_packet_bytes: int = MAX_PACKET_BYTES
    max_queued_bytes: int = MAX_QUEUED_BYTES
    mosquitto_version: tuple[int, ...] = (2, 0, 11)

    def __post_init__(self) -> None:
        for field, name in (("fleet", self.fleet), ("coordinator_user", self.coordinator_user)):
            if not is_valid_name(name):
                raise ConfigError(f"expected {NAME_RULE}, got {name!r}", field=field)
        for field, port in (("port", self.port), ("operator_port", self.operator_port)):
            if port is not None and not 1 <= port <= 65535:
                raise ConfigError(f"expected a port from 1 to 65535, got {port}", field=field)
        if self.port == self.operator_port:
            raise ConfigError(f"expected another port than {self.port}", field="operator_port")
        self._check_sizes()
        self._check_paths()

    def _check_sizes(self) -> None:
        if self.max_packet_bytes < 1 << 16:
            raise ConfigError(
                f"expected at least 65536 bytes, got {self.max_packet_bytes}",
                field="max_packet_bytes",
            )
        if self.max_queued_bytes < self.max_packet_bytes:
            raise ConfigError(
                f"expected at least max_packet_bytes ({self.max_packet_bytes}),"
                f" got {self.max_queued_bytes}",
                field="max_queued_bytes",
            )
        check_mosquitto_version(self.mosquitto_version)

    def _check_paths(self) -> None:
        paths = {
            "password_path": self.password_path,
            "acl_path": self.acl_path,
        }
        if self.persistence_directory is not None:
            paths["persistence_directory"] = self.persistence_directory
        if self.tls is not None:
            paths |= {"tls.ca": self.tls.ca, "tls.certificate": self.tls.certificate}
            paths["tls.key"] = self.tls.key
        for field, path in paths.items():
            if not path.startswith("/") or _UNSAFE_PATH.search(path):
                raise ConfigError(f"expected an absolute path, got {path!r}", field=field)


def check_mosquitto_version(version: tuple[int, ...]) -> None:
    """Raise ConfigError for a Mosquitto that is too old for MQTT 5."""
    if version < OLDEST_MOSQUITTO:
        found = ".".join(map(str, version))
        raise ConfigError(f"expected Mosquitto 1.6 or later (MQTT 5), found {found}")


def measured_settings(
    *, max_packet_bytes: int = MAX_PACKET_BYTES, max_queued_bytes: int = MAX_QUEUED_BYTES
) -> list[Setting]:
    """What every Mosquitto of ours sets, whatever it serves."""
    return [
        Setting(
            "set_tcp_nodelay true",
            "Small answers leave at once: about five times the steps per second.",
        ),
        Setting(
            f"max_queued_messages {_MANY}",
            "The default of 1000 drops silently, live bursts too; the limit in bytes holds. Not 0"
            "\n# (unlimited): 2.0 then disconnects a client for each publish that the ACL refuses.",
        ),
        Setting(
            f"max_queued_bytes {max_queued_bytes}",
            "What one slow or absent client may cost in memory.",
        ),
        Setting(
            f"max_inflight_messages {MAX_INFLIGHT_MESSAGES}",
            "The default of 20 makes a coordinator wait for acknowledgements of a large fleet.",
        ),
        Setting(
            f"max_packet_size {max_packet_bytes}",
            "Clients learn this limit when they connect. Mosquitto 2.1 defaults to 2 MB, which is"
            "\n# too small for tensors. Never message_size_limit: its refusal breaks MQTT 5.",
        ),
    ]


def private_mosquitto_config(
    *,
    host: str,
    port: int,
    as_root: bool,
    persistence_directory: str | None = None,
    max_packet_bytes: int = MAX_PACKET_BYTES,
) -> str:
    """Text of a Mosquitto for one run on loopback, without users.

    ``as_root`` says that it will be started by root; persistence is off without a directory.
    """
    settings = [
        Setting(f"listener {port} {host}", "Nobody outside this machine can connect."),
        Setting("allow_anonymous true", "Possible because of that."),
        *measured_settings(
            max_packet_bytes=max_packet_bytes,
            max_queued_bytes=max(MAX_QUEUED_BYTES, max_packet_bytes),
        ),
        Setting("log_dest stderr", "The process that starts it keeps the log."),
        Setting("log_timestamp_format %Y-%m-%dT%H:%M:%S", "Dates that a person can read."),
    ]
    if as_root:
        settings.append(
            Setting(
                "user root",
                "Another user could not read this directory, and changing users would undo the"
                "\n# kernel's promise to end this process with its parent.",
            )
        )
    if persistence_directory is None:
        settings.append(Setting("persistence false", "Nothing is kept beyond the run."))
    else:
        settings += _persistence(persistence_directory)
    return _render(settings)


def iotcore_config(*, host: str, port: int, max_packet_bytes: int = MAX_PACKET_BYTES) -> str:
    """Text (TOML) of an iotcore broker for one run on loopback."""
    return _IOTCORE_TEMPLATE.format(
        host=host,
        port=port,
        max_packet_bytes=max_packet_bytes,
        max_inflight=MAX_INFLIGHT_MESSAGES,
        segment_bytes=max(_IOTCORE_SEGMENT_BYTES, max_packet_bytes // _IOTCORE_SEGMENTS),
        segments=_IOTCORE_SEGMENTS,
    )


def lab_mosquitto_config(lab: LabBroker) -> str:
    """Text of mosquitto.conf for a lab: users, access rules, persistence, TLS where given."""
    settings = [
        Setting("per_listener_settings false", "One password file and one ACL for every listener."),
        Setting("allow_anonymous false", "Every client has a name that the ACL can tell."),
        Setting(f"password_file {lab.password_path}", "Made with mosquitto_passwd."),
        Setting(f"acl_file {lab.acl_path}", "Devices reach their own topics only."),
        *measured_settings(
            max_packet_bytes=lab.max_packet_bytes, max_queued_bytes=lab.max_queued_bytes
        ),
        *_persistence(lab.persistence_directory),
        Setting(
            "persistent_client_expiration 7d",
            "Queues of devices that never come back are let go of.",
        ),
        Setting("log_dest stderr", "systemd's journal takes it from there."),
        Setting("log_timestamp_format %Y-%m-%dT%H:%M:%S", "Dates that a person can read."),
        *_operator_listener(lab),
        *_device_listener(lab),
    ]
    heading = f"# Mosquitto for the fleet {lab.fleet!r}.\n\n"
    if lab.persistence_directory is None:
        heading += _ABOUT_PERSISTENCE
    return heading + _render(settings)


def lab_acl(lab: LabBroker) -> str:
    """Text of the access rules: a device writes below its up/, reads its down/ and fleet/.

    Mosquitto 2.0 answers a subscription that is not allowed with success; nothing arrives. A
    publish that is not allowed is refused by its PUBACK with QoS 1, and lost silently with QoS 0.
    """
    root = f"{ROOT}/{lab.fleet}"
    return (
        "# The coordinator and its commands do everything within the fleet.\n"
        f"user {lab.coordinator_user}\n"
        f"topic readwrite {root}/#\n"
        "# It may look at the broker's own figures.\n"
        "topic read $SYS/#\n"
        "\n"
        "# An operator's commands, from any host: they ask the coordinator and read its answers,\n"
        "# and reach no device by themselves. Devices have no rule for op/ at all.\n"
        f"user {OPERATOR_USER}\n"
        f"topic write {root}/op/+/request\n"
        f"topic write {root}/op/+/bundle\n"
        f"topic read {root}/op/+/reply\n"
        "\n"
        "# %u is the name that a device has logged in with: it is the device's id.\n"
        "# A device writes under its own name only, so no device can speak for another.\n"
        f"pattern write {root}/dev/%u/up/#\n"
        "# It reads what is meant for it.\n"
        f"pattern read {root}/dev/%u/down/#\n"
        "# It reads what is meant for all: weights and the state of the run. Without %u the\n"
        "# pattern is a rule for every user; Mosquitto logs a warning about it.\n"
        f"pattern read {root}/fleet/#\n"
    )


def _persistence(directory: str | None) -> list[Setting]:
    return [
        Setting("persistence true", "Sessions and retained messages outlive the broker."),
        *_persistence_location(directory),
        Setting(
            "autosave_interval 1",
            "With the next line: save after every change. The default of 1800 s loses all sessions"
            "\n# when the broker is killed.",
        ),
        Setting("autosave_on_changes true", "Counts changes instead of seconds."),
    ]


def _persistence_location(directory: str | None) -> list[Setting]:
    if directory is None:
        return []
    return [
        Setting(
            f"persistence_location {directory.rstrip('/')}/",
            "Needs space for every client's queue: on a full disk the broker acknowledges, and"
            "\n# loses the message.",
        )
    ]


def _operator_listener(lab: LabBroker) -> list[Setting]:
    if lab.operator_port is None:
        return []
    return [
        Setting(
            f"listener {lab.operator_port} 127.0.0.1",
            "For the coordinator and its commands on this host. They share one user, so this"
            "\n# listener lets them choose client ids; no device can reach it.",
        ),
    ]


def _device_listener(lab: LabBroker) -> list[Setting]:
    address = f" {lab.bind}" if lab.bind else ""
    settings = [
        Setting(f"listener {lab.port}{address}", "For devices."),
        Setting(
            "use_username_as_clientid true",
            "Without it, any user disconnects a device by connecting with that device's client id."
            "\n# One connection per user follows from it.",
        ),
    ]
    return settings if lab.tls is None else settings + _tls(lab.tls)


def _tls(tls: TlsPaths) -> list[Setting]:
    settings = [
        Setting(f"cafile {tls.ca}", "Signs the devices' certificates, and ours."),
        Setting(f"certfile {tls.certificate}", "Devices check that it names this host."),
        Setting(f"keyfile {tls.key}", "Readable by the broker's user only."),
    ]
    if tls.require_client_certificates:
        settings += [
            Setting("require_certificate true", "A device proves who it is with its own key."),
            Setting(
                "use_identity_as_username true",
                "The certificate's common name is the device's id for the ACL.",
            ),
        ]
    return settings


def _render(settings: list[Setting]) -> str:
    return "\n".join(f"# {setting.why}\n{setting.line}\n" for setting in settings)
