"""Fixtures that every test file may use: brokers, ports, fleet names, and no process left over."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from coordinator.broker import EmbeddedBroker, find_free_port
from coordinator.cli.app import main as coordinator_main
from edge_agent.cli import main as agent_main
from tests.brokers import start_mosquitto
from tests.commands import RunCommand, build_runner

# A loaded machine may stall any example. With --hypothesis-profile=repeatable the same examples are
# tried every time, as a gate should; without it each run looks for new ones.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("patient")

_MARK = "SPLITFLEET_TEST_SESSION"
_GRACE_S = 5.0

# multiprocessing keeps these until the interpreter ends, and they end with it.
_TOLERATED = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail the session if a process that descends from it outlives its tests.

    Descendants carry a mark in their environment, so those that lost their parent count too.
    """
    mark = uuid.uuid4().hex
    os.environ[_MARK] = mark
    yield
    del os.environ[_MARK]
    needle = f"{_MARK}={mark}".encode()
    left = _still_there(needle)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def _still_there(needle: bytes) -> dict[int, str]:
    """What is left after a grace for processes that are just ending.

    Two empty looks in a row: a process that is just starting a program has no environment yet.
    """
    deadline_s = time.monotonic() + _GRACE_S
    empty_looks = 0
    left: dict[int, str] = {}
    while empty_looks < 2 and time.monotonic() < deadline_s:
        left = _marked_processes(needle)
        empty_looks = 0 if left else empty_looks + 1
        time.sleep(0.1)
    return left


def _marked_processes(needle: bytes) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
        except OSError:  # ended, or another user's
            continue
        if needle in environment.split(b"\0") and not any(name in command for name in _TOLERATED):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


@pytest.fixture(autouse=True)
def same_numbers_every_time(request: pytest.FixtureRequest) -> None:
    """PyTorch's random numbers depend on the test alone, not on those that ran before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A Mosquitto of the test's own, to stop, kill and start again; it keeps its sessions."""
    broker = start_mosquitto(tmp_path / "mosquitto", persistence=True)
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def shared_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """One Mosquitto for all tests that only use it, under a fleet name of their own."""
    broker = start_mosquitto(tmp_path_factory.mktemp("mosquitto"))
    yield broker
    broker.stop()


@pytest.fixture
def fleet() -> str:
    """A fleet name that no other test uses."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    return find_free_port()


@pytest.fixture
def run_coordinator(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> RunCommand:
    """``coordinator WORD...`` in this process."""
    return build_runner("coordinator", coordinator_main, monkeypatch, capfd)


@pytest.fixture
def run_agent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """``edge-agent WORD...`` in this process."""
    return build_runner("edge-agent", agent_main, monkeypatch, capfd)
