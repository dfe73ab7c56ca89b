"""kill -9 of the coordinator at any moment, resume, and the weights are those of a quiet run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.broker import EmbeddedBroker
from coordinator.checkpoint import list_checkpoints, read_checkpoint
from edge_agent.datasets.samples import digits_train
from tests.commands import RunCommand
from tests.fleet import Fleet, Process, assert_trained_exactly_once, running_fleet
from tests.redis_server import RedisServer
from wire.exit_codes import ExitCode

pytestmark = [pytest.mark.broker, pytest.mark.processes]

DEVICES = 3
SAMPLES = {"d0": 40, "d1": 60, "d2": 80}
EPOCHS = 3
UNHURRIED = {"fixed_s": 0.04}
"""An answer takes long enough for a test to meet the run at a step of its choice."""


def _start_agents(fleet: Fleet, **settings: Any) -> list[Process]:
    """Three agents with 40, 60 and 80 digits of their own."""
    x, y = digits_train()
    agents, start = [], 0
    for device, count in SAMPLES.items():
        path = fleet.write_data(device, x[start : start + count], y[start : start + count])
        agents.append(fleet.agent(device, {"npz": {"path": path}, "classes": 10}, **settings))
        start += count
    return agents


def _run(**settings: Any) -> dict[str, Any]:
    return {
        "network": {"name": "mlp", "input_shape": [1, 8, 8], "classes": 10},
        "epochs": EPOCHS,
        "global_batch": 12,
        "min_devices": DEVICES,
        "policy": {"name": "lds", "delta": 1.0, "delays_s": {"d0": 1, "d1": 1, "d2": 4}},
        "optimiser": {"name": "adam", "lr": 1e-3},
        "precision": "fp32",
        "checkpoint": {"every_steps": 4},
        "deadline": {"min_s": 60},
        **settings,
    }


def _coordinator(fleet: Fleet, *arguments: str, **settings: Any) -> Process:
    return fleet.coordinator(*arguments, **_run(**settings))


def _final_tensors(fleet: Fleet) -> dict[str, torch.Tensor]:
    [*_, newest] = list_checkpoints(fleet.out / "checkpoints")
    return read_checkpoint(newest).tensors


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    server = RedisServer(directory)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def quiet(
    tmp_path_factory: pytest.TempPathFactory, shared_mosquitto: EmbeddedBroker
) -> dict[str, torch.Tensor]:
    """What a run ends with that nobody disturbs."""
    directory = tmp_path_factory.mktemp("quiet")
    with running_fleet(directory, shared_mosquitto.port, "quiet") as fleet:
        _start_agents(fleet)
        assert _coordinator(fleet).wait() == 0, fleet.last_words()
        assert_trained_exactly_once(fleet.steps(), SAMPLES, epochs=EPOCHS)
        return _final_tensors(fleet)


def _assert_same_bits(ours: dict[str, torch.Tensor], quiet: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(quiet)
    for name, tensor in quiet.items():
        assert torch.equal(ours[name], tensor), name


def test_killed_and_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str, quiet: dict[str, torch.Tensor]
) -> None:
    """1. A quiet run. 2. Another, killed with -9 behind steps 3 (before any checkpoint), 14 and 31,
    each time resumed. 3. Same weights, optimiser state and random state, to the bit."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        _start_agents(processes, trial_delay=UNHURRIED)
        for step in (3, 14, 31):
            coordinator = _coordinator(processes, "--resume-if-any")
            _wait_for_step(processes, step)
            assert coordinator.is_running, "the run was over before it could be killed"
            coordinator.kill()
        assert _coordinator(processes, "--resume").wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=EPOCHS)
        _assert_same_bits(_final_tensors(processes), quiet)
        summary = processes.summary()
    assert summary["samples_trained"] == sum(SAMPLES.values()) * EPOCHS
    assert summary["samples_missed"] == 0


@pytest.mark.redis
def test_terminated_run_is_written_down_and_resumed_with_the_state_in_redis(
    tmp_path: Path,
    shared_mosquitto: EmbeddedBroker,
    fleet: str,
    redis_server: RedisServer,
    quiet: dict[str, torch.Tensor],
) -> None:
    """1. SIGTERM behind step 10: exit 0, a checkpoint between intervals. 2. --resume goes on at the
    step after it. 3. Same bits as a quiet run."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        _start_agents(processes, trial_delay=UNHURRIED)
        settings = {"state": redis_server.url, "checkpoint": {"every_steps": 1000}}
        coordinator = _coordinator(processes, **settings)
        _wait_for_step(processes, 10)
        coordinator.signal(signal.SIGTERM)
        assert coordinator.wait() == 0, processes.last_words()
        stopped_after = processes.steps()[-1].step
        assert not processes.summary()["completed"]
        assert _coordinator(processes, "--resume", **settings).wait() == 0, processes.last_words()
        steps = processes.steps()
        assert [step.step for step in steps] == list(range(1, len(steps) + 1))
        assert len(steps) > stopped_after
        _assert_same_bits(_final_tensors(processes), quiet)


def _wait_for_step(fleet: Fleet, number: int) -> None:
    fleet.wait_until(lambda: any(s.step >= number for s in fleet.steps()), f"step {number}")


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, shared_mosquitto: EmbeddedBroker
) -> Iterator[Fleet]:
    """A run that has ended; tests try to start it again."""
    directory = tmp_path_factory.mktemp("ended")
    with running_fleet(directory, shared_mosquitto.port, "ended") as fleet:
        _start_agents(fleet)
        assert fleet.local_coordinator(**_run(epochs=1)).wait() == 0, fleet.last_words()
        yield fleet


def test_run_with_a_checkpoint_is_not_started_over_by_accident(
    ended: Fleet, run_coordinator: RunCommand
) -> None:
    before = sorted(path.name for path in list_checkpoints(ended.out / "checkpoints"))
    again = run_coordinator("train", "-c", ended.run_file(**_run(epochs=1)))
    assert again.code == ExitCode.CONFIG
    assert "--resume" in again.err
    assert before == sorted(path.name for path in list_checkpoints(ended.out / "checkpoints"))


def test_resume_without_a_checkpoint_says_so(
    tmp_path: Path, free_port: int, run_coordinator: RunCommand
) -> None:
    run_file = Fleet(tmp_path, free_port, "none").run_file(**_run())
    refused = run_coordinator("train", "-c", run_file, "--resume")
    assert refused.code == ExitCode.CONFIG
    assert "none to resume" in refused.err


def test_resume_with_another_network_is_refused(ended: Fleet, run_coordinator: RunCommand) -> None:
    other = {"name": "mlp", "input_shape": [1, 8, 8], "classes": 10, "cut": "block2"}
    run_file = ended.run_file(**_run(epochs=1, network=other))
    refused = run_coordinator("train", "-c", run_file, "--resume")
    assert refused.code == ExitCode.DATA
    assert "another client segment" in refused.err
