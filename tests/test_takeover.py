"""Two clients with one id: a coordinator leaves its place to the other, an agent says what it sees.

Mosquitto 2.0.11 closes the older connection without a reason; newer brokers give MQTT 5's, and a
few bytes over a socket stand in for them.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from coordinator.config import NetworkSettings, RunSettings
from coordinator.fleet_service import FleetService
from coordinator.journal import Journal
from coordinator.recorder import SUMMARY_FILE
from coordinator.reporting import NullReporter
from coordinator.service import CoordinatorService
from coordinator.store import open_store
from tests.brokers import HOST, WAIT_S, Client
from tests.fleet import running_fleet
from wire.exit_codes import ExitCode
from wire.inbox import Inbox
from wire.mqtt import MqttConnection, MqttSettings, wait_for_connection
from wire.quick_losses import SUSPICIOUS_LOSSES
from wire.topics import build_client_id

ACCEPTED = bytes.fromhex("2003000000")  # CONNACK: success, no properties
TAKEN_OVER = bytes.fromhex("e0028e00")  # DISCONNECT: session taken over, no properties


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


@contextmanager
def broker_that_gives_the_place_away() -> Iterator[int]:
    """Its port; it accepts each client and tells it at once that another has come."""
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:  # closed: the test is over
                    return
                with client:
                    client.recv(4096)
                    client.sendall(ACCEPTED + TAKEN_OVER)

        thread = threading.Thread(target=serve, name="broker", daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


@contextmanager
def connection_to(port: int, inbox: Inbox, *, yields: bool) -> Iterator[MqttConnection]:
    connection = MqttConnection(
        MqttSettings(port=port, reconnect_min_s=0.1, reconnect_max_s=0.3),
        client_id="me",
        fleet="lab",
        subscriptions=[],
        inbox=inbox,
        next_boot=lambda: 1,
        build_will=None,
        yields=yields,
    )
    connection.start()
    yield connection
    connection.stop()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_connection_that_yields_leaves_its_place_for_good(caplog: pytest.LogCaptureFixture) -> None:
    with (
        broker_that_gives_the_place_away() as port,
        connection_to(port, Inbox(), yields=True) as connection,
    ):
        wait_until(lambda: connection.is_taken_over, "not taken over")
        wait_until(lambda: not connection.is_thread_alive, "the network thread goes on")
        assert not connection.is_connected
    assert warnings_of(caplog) == ["another client has taken our place with our id, 'me'; ends"]


def test_connection_that_does_not_yield_says_what_happened_and_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inbox = Inbox()
    with (
        broker_that_gives_the_place_away() as port,
        connection_to(port, inbox, yields=False) as connection,
    ):
        for _ in range(2):
            wait_for_connection(inbox, WAIT_S)
        assert not connection.is_taken_over
    message = "another client has taken our place with our id, 'me'; trying again"
    assert message in warnings_of(caplog)


def settings_of(broker: EmbeddedBroker, fleet: str, directory: Path) -> RunSettings:
    return RunSettings(
        run="test",
        fleet=fleet,
        out=str(directory / "run"),
        fleet_out=str(directory / "fleet"),
        mqtt=MqttSettings(port=broker.port, reconnect_min_s=0.1, reconnect_max_s=0.3),
        network=NetworkSettings(name="mlp", input_shape=(1, 8, 8), classes=10),
    )


class Running:
    """A service in a thread of its own."""

    def __init__(self, service: FleetService) -> None:
        self.service = service
        self.codes: list[ExitCode] = []
        self._thread = threading.Thread(target=lambda: self.codes.append(service.run()))
        self._thread.start()
        wait_until(lambda: service._connection.is_connected, "not connected")
        wait_until(lambda: not service._claim.is_due, "no claim came back")

    def wait(self) -> list[ExitCode]:
        self._thread.join(WAIT_S)
        return self.codes


@pytest.mark.broker
@pytest.mark.parametrize("has_run", [False, True], ids=["serve", "train"])
def test_coordinator_ends_when_another_comes_and_writes_nothing_more(
    has_run: bool,
    tmp_path: Path,
    shared_mosquitto: EmbeddedBroker,
    fleet: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = settings_of(shared_mosquitto, fleet, tmp_path)
    earlier = Running(
        CoordinatorService(settings, source="test", reporter=NullReporter())
        if has_run
        else FleetService(settings, source="test")
    )
    later = Running(FleetService(settings_of(shared_mosquitto, fleet, tmp_path), source="test"))
    assert earlier.wait() == [ExitCode.TAKEN_OVER]
    wait_until(lambda: later.service._connection.is_connected, "the later one is away")
    later.service.stop()
    assert later.wait() == [ExitCode.OK]
    assert "another coordinator has taken over (" in caplog.text
    if has_run:
        _assert_nothing_was_written_at_the_end(settings)


def _assert_nothing_was_written_at_the_end(settings: RunSettings) -> None:
    store = open_store(settings.state_url, source="test")
    journal = Journal(store, settings.run, settings.directory, keep=1)
    record = journal.run_record()
    assert record is not None
    assert record.online
    assert journal.latest_checkpoint() is None
    journal.close()
    assert not (settings.directory / SUMMARY_FILE).exists()


@pytest.mark.broker
@pytest.mark.processes
def test_agent_suspects_that_another_client_has_its_id(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    client_id = build_client_id(fleet, "d0")
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        path = processes.write_data("d0", np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
        agent = processes.agent("d0", {"npz": {"path": path}, "classes": 10})
        for connections in range(1, SUSPICIOUS_LOSSES + 1):
            processes.wait_until(
                lambda count=connections: agent.output().count("connected (boot") == count,
                f"connection {connections}",
            )
            with Client(HOST, shared_mosquitto.port, client_id=client_id):
                pass
        suspicion = f"does another client have our id, '{client_id}'?"
        processes.wait_until(lambda: suspicion in agent.output(), "a warning")
        assert agent.output().count(suspicion) == 1
