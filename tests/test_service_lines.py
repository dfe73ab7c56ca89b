"""The units' ExecStart lines under a service manager of the test's own, with a real Mosquitto."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from tests.brokers import configured_mosquitto
from tests.services import Service, can_deny_write_execute, service
from wire.exit_codes import ExitCode

pytestmark = [pytest.mark.broker, pytest.mark.processes]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Service]:
    with service("agent", tmp_path, instance="gw-01") as one:
        yield one


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Service]:
    with service("coordinator", tmp_path) as one:
        yield one


def write_agent(one: Service, port: int, fleet: str, **settings: Any) -> None:
    rng = np.random.default_rng(0)
    path = one.root / "samples.npz"
    np.savez(path, x=rng.normal(size=(40, 6)).astype(np.float32), y=np.arange(40) % 2)
    document = {
        "device": "gw-01",
        "fleet": fleet,
        "mqtt": {"port": port, "reconnect_min_s": 0.2, "reconnect_max_s": 0.5},
        "data": {"npz": {"path": str(path)}, "classes": 2},
        "compute": {"forward": "onnxruntime", "backward": "onnxruntime"},
        **settings,
    }
    one.settings.write_bytes(msgspec.yaml.encode(document))


def write_coordinator(one: Service, port: int, fleet: str, **settings: Any) -> None:
    document = {
        "fleet": fleet,
        "mqtt": {"port": port, "reconnect_min_s": 0.2, "reconnect_max_s": 0.5},
        "network": {"name": "mlp", "input_shape": [6], "classes": 2},
        "epochs": 1,
        "global_batch": 10,
        "threads": 1,
        "deadline": {"first_s": 120, "min_s": 60},
        **settings,
    }
    one.settings.write_bytes(msgspec.yaml.encode(document))


def assert_ended_before_it_was_ready(one: Service, code: ExitCode, *words: str) -> None:
    assert one.wait() == code, one.process.output()
    assert not [message for message in one.rest() if "READY=1" in message]
    last = one.process.output().strip().splitlines()[-1]
    assert last.startswith("error: "), one.process.output()
    for word in words:
        assert word in last


def test_agent_waits_for_its_broker_and_says_so(
    agent: Service, tmp_path: Path, free_port: int
) -> None:
    """1. no broker: ready, offline, alive 2. a broker: connected 3. stop: stopping, 0."""
    write_agent(agent, free_port, "lab")
    agent.start()
    assert "STATUS=gw-01: 40 samples" in agent.wait_for("READY=1")
    agent.wait_for("STATUS=gw-01: offline (no broker answers")
    for _ in range(3):
        agent.wait_for("WATCHDOG=1")
    text = f"listener {free_port} 127.0.0.1\nallow_anonymous true\n"
    with configured_mosquitto(text, tmp_path, free_port):
        agent.wait_for("STATUS=gw-01: connected")
        agent.wait_for("WATCHDOG=1")
        assert agent.stop() == ExitCode.OK
    assert "STOPPING=1\nSTATUS=gw-01: leaving" in agent.rest()


def test_agent_logs_in_with_a_credential(agent: Service, free_port: int) -> None:
    """As systemd names a file of a folder; the broker itself is not needed for it to be read."""
    mqtt = {"port": free_port, "username": "gw-01", "password_file": "credential:mqtt-password"}
    write_agent(agent, free_port, "lab", mqtt=mqtt)
    agent.start()
    assert_ended_before_it_was_ready(
        agent, ExitCode.CONFIG, "$.mqtt.password_file", "'mqtt-password', found none"
    )
    (agent.credentials / "splitfleet_mqtt-password").write_text("geheim")
    agent.start()
    agent.wait_for("READY=1")
    assert agent.stop() == ExitCode.OK


def test_watchdogs_end_leaves_the_stack_in_the_journal(agent: Service, free_port: int) -> None:
    write_agent(agent, free_port, "lab")
    agent.start()
    agent.wait_for("READY=1")
    agent.process.signal(signal.SIGABRT)
    assert agent.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in agent.process.output()
    assert "edge_agent/daemon.py" in agent.process.output()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bogus": 1}, ["gw-01.yaml", "bogus"]),
        ({"data": {"npz": {"path": "/no/such.npz"}, "classes": 2}}, ["gw-01.yaml", "$.data.npz"]),
        ({"state_dir": "/proc/nowhere"}, ["$.state_dir", "writable directory"]),
    ],
)
def test_agent_ends_with_78_for_settings_that_stay_bad(
    agent: Service, change: dict[str, Any], words: list[str]
) -> None:
    write_agent(agent, 1883, "lab", **change)
    agent.start()
    assert_ended_before_it_was_ready(agent, ExitCode.CONFIG, *words)


def test_wrong_command_line_ends_with_2(agent: Service) -> None:
    write_agent(agent, 1883, "lab")
    agent.start("--bogus")
    assert agent.wait() == ExitCode.USAGE
    assert agent.rest() == []


def test_run_is_trained_once_by_services_without_writable_code(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """1. both ready 2. the run ends: 0 3. started again: nothing left to do, 0 4. another
    network on the same run: 65.
    """
    if not can_deny_write_execute():
        pytest.skip("this kernel cannot deny writable code")
    with ExitStack() as stack:
        agent = stack.enter_context(service("agent", tmp_path, instance="gw-01"))
        coordinator = stack.enter_context(service("coordinator", tmp_path))
        write_agent(agent, shared_mosquitto.port, fleet)
        write_coordinator(coordinator, shared_mosquitto.port, fleet)
        agent.start(deny_write_execute=True)
        coordinator.start()
        assert "STATUS=run: waiting for devices" in coordinator.wait_for("READY=1")
        assert coordinator.wait() == ExitCode.OK, coordinator.process.output()
        said = coordinator.rest()
        assert any(message == "WATCHDOG=1" for message in said)
        assert "STOPPING=1\nSTATUS=run: writing the run down" in said
        summary = coordinator.state / "runs/run/summary.json"
        first = summary.read_bytes()
        assert msgspec.json.decode(first)["samples_trained"] == 40

        steps = (coordinator.state / "runs/run/steps.jsonl").read_bytes()
        coordinator.start()
        assert coordinator.wait() == ExitCode.OK, coordinator.process.output()
        assert (coordinator.state / "runs/run/steps.jsonl").read_bytes() == steps

        write_coordinator(
            coordinator,
            shared_mosquitto.port,
            fleet,
            network={"name": "mlp", "input_shape": [7], "classes": 2},
        )
        coordinator.start()
        assert coordinator.wait() == ExitCode.DATA, coordinator.process.output()
        assert agent.process.is_running
        assert agent.stop() == ExitCode.OK


def test_coordinator_waits_for_its_broker_and_stops_without_one(
    coordinator: Service, free_port: int
) -> None:
    write_coordinator(coordinator, free_port, "lab")
    coordinator.start()
    coordinator.wait_for("READY=1")
    coordinator.wait_for("STATUS=run: offline (no broker answers")
    for _ in range(3):
        coordinator.wait_for("WATCHDOG=1")
    assert coordinator.stop() == ExitCode.OK


def test_coordinator_between_runs_serves_until_it_is_stopped(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    with service("coordinator", tmp_path, drop_in="serve.conf") as coordinator:
        write_coordinator(coordinator, shared_mosquitto.port, fleet)
        coordinator.start()
        coordinator.wait_for("READY=1")
        coordinator.wait_for("connected to 127.0.0.1")
        coordinator.wait_for("WATCHDOG=1")
        assert coordinator.stop() == ExitCode.OK
        assert any("STOPPING=1" in message for message in coordinator.rest())


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"state": "redis://127.0.0.1:1/0"}, ExitCode.UNAVAILABLE, ["redis://127.0.0.1:1/0"]),
        ({"state": "credential:state-url"}, ExitCode.CONFIG, ["$.state", "'state-url'"]),
    ],
)
def test_coordinator_ends_with_the_code_of_what_is_wrong(
    coordinator: Service, change: dict[str, Any], code: ExitCode, words: list[str]
) -> None:
    """A Redis that is away may come back (69, tried again); a missing secret does not (78)."""
    write_coordinator(coordinator, 1883, "lab", **change)
    coordinator.start()
    assert_ended_before_it_was_ready(coordinator, code, *words)


def test_work_that_hangs_feeds_no_watchdog(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """An agent that computes for a minute falls silent; one that waits does not (above)."""
    with ExitStack() as stack:
        agent = stack.enter_context(service("agent", tmp_path, instance="gw-01"))
        coordinator = stack.enter_context(service("coordinator", tmp_path))
        write_agent(agent, shared_mosquitto.port, fleet, trial_delay={"fixed_s": 60})
        write_coordinator(coordinator, shared_mosquitto.port, fleet)
        agent.start()
        agent.wait_for("WATCHDOG=1")
        coordinator.start()
        agent.wait_for_silence(3.0)
        assert agent.process.is_running
        assert coordinator.stop() == ExitCode.OK
        assert agent.stop() == ExitCode.OK
