"""A private MQTT broker for one run: Mosquitto where its binary is found, else iotcore.

It listens on a free loopback port, lives in a process of its own and ends with this one, even
when this one is killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self

from coordinator.bound_process import listens_on, start_bound_process
from coordinator.broker_config import (
    MAX_PACKET_BYTES,
    check_mosquitto_version,
    iotcore_config,
    private_mosquitto_config,
)
from wire.errors import ConfigError, TransportError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02
_PORT_ATTEMPTS = 5  # another process may take the free port before the broker does

_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # often not on a user's PATH
_MOSQUITTO_VERSION = re.compile(r"mosquitto version (\d+(?:\.\d+)*)")

# MQTT 5 CONNECT, clean start, keepalive 10 s, no properties, empty client id. Whatever the
# CONNACK says, it shows that the broker serves and not only that its port is open.
_CONNECT = bytes.fromhex("10 0d 0004 4d515454 05 02 000a 00 0000".replace(" ", ""))
_CONNACK = 0x20


class BrokerKind(StrEnum):
    """Which broker to take; AUTO is Mosquitto where it is found, else iotcore."""

    AUTO = "auto"
    MOSQUITTO = "mosquitto"
    IOTCORE = "iotcore"


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerOptions:
    """What a private broker does beyond the defaults.

    ``persistence`` keeps sessions and retained messages over a restart (Mosquitto only).
    """

    max_packet_bytes: int = MAX_PACKET_BYTES
    persistence: bool = False


class _Program(Protocol):
    """A broker program: how to configure and start it."""

    @property
    def kind(self) -> BrokerKind: ...
    @property
    def version(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def config_name(self) -> str: ...
    def config_text(self, port: int, directory: Path, options: BrokerOptions) -> str: ...
    def command(self, config_path: Path) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class _Mosquitto:
    binary: str
    version: str
    kind: BrokerKind = BrokerKind.MOSQUITTO
    label: str = "Mosquitto"
    config_name: str = "mosquitto.conf"

    def config_text(self, port: int, directory: Path, options: BrokerOptions) -> str:
        return private_mosquitto_config(
            host=HOST,
            port=port,
            as_root=os.geteuid() == 0,
            persistence_directory=str(directory) if options.persistence else None,
            max_packet_bytes=options.max_packet_bytes,
        )

    def command(self, config_path: Path) -> list[str]:
        return [self.binary, "-c", str(config_path)]


@dataclass(frozen=True, slots=True)
class _Iotcore:
    version: str
    kind: BrokerKind = BrokerKind.IOTCORE
    label: str = "iotcore"
    config_name: str = "iotcore.toml"  # it tells formats by the suffix

    def config_text(self, port: int, directory: Path, options: BrokerOptions) -> str:  # noqa: ARG002
        return iotcore_config(host=HOST, port=port, max_packet_bytes=options.max_packet_bytes)

    def command(self, config_path: Path) -> list[str]:
        # Isolated (-I): a directory named iotcore where we run must not be taken for the package.
        # Below CRITICAL it logs every packet.
        python = [sys.executable, "-I", "-m", "iotcore"]
        return [*python, "--config", str(config_path), "--log-level", "CRITICAL"]


class EmbeddedBroker:
    """A broker process on a loopback port; start, stop and kill it any number of times.

    It keeps its port and directory between starts, so clients find it again. Start it from a
    thread that stays: Linux ends the process together with the thread that started it.
    """

    def __init__(
        self, program: _Program, directory: Path, *, options: BrokerOptions | None = None
    ) -> None:
        self.host = HOST
        self.port = 0  # chosen at the first start
        self.kind = program.kind
        self.version = program.version
        self.directory = directory
        self.log_path = directory / "broker.log"
        self._program = program
        self._options = options or BrokerOptions()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.pid is not None

    def describe(self) -> str:
        """Say in one line which broker this is and where it listens."""
        where = f"private process on {self.host}:{self.port}"
        return f"{self._program.label} {self.version}, {where}"

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start the process and return once it answers MQTT; raise TransportError if it does not.

        The first start looks for a free port; a later one insists on the same.
        """
        if self.is_running:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        attempts = 1 if self.port else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            port = self.port or find_free_port()
            try:
                self._launch(port, timeout_s)
            except TransportError:
                if attempt == attempts or not self._port_was_taken():
                    raise
            else:
                self.port = port
                break
        return self

    def stop(self) -> None:
        """End the process in good order (SIGTERM, after 5 s SIGKILL). Safe to call again."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()

    def kill(self) -> None:
        """End the process as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Stop and start again on the same port."""
        self.stop()
        self.start()

    def log_tail(self, lines: int = 5) -> str:
        """The last lines of the broker's own log, empty if there is none."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _launch(self, port: int, timeout_s: float) -> None:
        config_path = self.directory / self._program.config_name
        config_path.write_text(self._program.config_text(port, self.directory, self._options))
        command = self._program.command(config_path.resolve())
        with self.log_path.open("ab") as log:
            self._process = start_bound_process(command, log_fd=log.fileno(), cwd=self.directory)
        try:
            self._await_answer(port, time.monotonic() + timeout_s)
        except BaseException:  # an interrupt too must not leave the process behind
            self.kill()
            raise

    def _await_answer(self, port: int, deadline_s: float) -> None:
        assert self._process is not None
        while self._process.poll() is None:
            if listens_on(self._process.pid, self.host, port) and answers_mqtt(self.host, port):
                return
            if time.monotonic() > deadline_s:
                raise TransportError(
                    f"{self._program.label} did not answer on {self.host}:{port} in time;"
                    f" its log is {self.log_path}"
                )
            time.sleep(_POLL_S)
        raise TransportError(
            f"{self._program.label} ended with code {self._process.returncode} while starting;"
            f" its log is {self.log_path}: {' | '.join(self.log_tail(3).splitlines())}"
        )

    def _port_was_taken(self) -> bool:
        return "address already in use" in self.log_tail().lower()

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._process = None


def embedded_broker(
    *,
    directory: str | Path,
    kind: BrokerKind | str = BrokerKind.AUTO,
    options: BrokerOptions | None = None,
) -> EmbeddedBroker:
    """Start a private broker with its configuration and log in ``directory``.

    Use it as a context manager or call ``stop()``. AUTO goes on to the next kind when one is
    missing or does not start. Raises TransportError when none can be had, ConfigError for an
    unknown kind.
    """
    reasons: list[str] = []
    for candidate in _candidates(_parse_kind(kind)):
        try:
            program = _find_program(candidate)
            return EmbeddedBroker(program, Path(directory), options=options).start()
        except (TransportError, ConfigError) as exc:
            reasons.append(str(exc))
            logger.debug("no %s broker: %s", candidate.value, exc)
    raise TransportError(
        f"no embedded broker could be started ({'; '.join(reasons)}):"
        " install Mosquitto (apt-get install mosquitto) or iotcore (pip install iotcore),"
        " or name a running broker"
    )


def find_mosquitto() -> str | None:
    """Path of the Mosquitto binary on PATH or in the usual sbin directories."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    return shutil.which("mosquitto", path=path)


def mosquitto_version(binary: str) -> str:
    """Version that the binary names itself, such as ``2.0.11``; TransportError if it cannot."""
    try:
        shown = subprocess.run(  # noqa: S603 - the binary that we are about to start
            [binary, "-h"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise TransportError(f"{binary} cannot be run: {exc}") from exc
    match = _MOSQUITTO_VERSION.search((shown.stdout + shown.stderr).decode(errors="replace"))
    if match is None:
        raise TransportError(f"{binary} -h names no version")
    return match[1]


def find_free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def answers_mqtt(host: str, port: int, *, timeout_s: float = 2.0) -> bool:
    """Whether an MQTT 5 broker answers a CONNECT there (accepting or refusing it)."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(_CONNECT)
            return connection.recv(1)[:1] == bytes([_CONNACK])
    except OSError:
        return False


def _parse_kind(kind: BrokerKind | str) -> BrokerKind:
    try:
        return BrokerKind(kind)
    except ValueError:
        known = ", ".join(known.value for known in BrokerKind)
        raise ConfigError(f"expected one of {known}, got {kind!r}", field="broker") from None


def _candidates(kind: BrokerKind) -> list[BrokerKind]:
    return [BrokerKind.MOSQUITTO, BrokerKind.IOTCORE] if kind is BrokerKind.AUTO else [kind]


def _find_program(kind: BrokerKind) -> _Program:
    """Find one kind of broker on this machine; raise TransportError or ConfigError if it lacks."""
    if kind is BrokerKind.MOSQUITTO:
        binary = find_mosquitto()
        if binary is None:
            raise TransportError("Mosquitto is not installed")
        version = mosquitto_version(binary)
        check_mosquitto_version(tuple(int(part) for part in version.split(".")))
        return _Mosquitto(binary, version)
    if importlib.util.find_spec("iotcore") is None:
        raise TransportError("iotcore is not installed")
    return _Iotcore(importlib.metadata.version("iotcore"))
