"""Devices that die, come late, come back or stay away, and a broker that goes: nothing is lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from coordinator.broker import EmbeddedBroker
from coordinator.journal import Journal
from coordinator.store import open_store
from edge_agent.datasets.samples import digits_train
from tests.fleet import Fleet, Process, assert_trained_exactly_once, running_fleet, terminate
from tests.local_coordinator import LocalCoordinator

pytestmark = [pytest.mark.broker, pytest.mark.processes]

SAMPLES = {"d0": 60, "d1": 60, "d2": 60}
NETWORK = {"name": "mlp", "input_shape": [1, 8, 8], "classes": 10}


def _agent(fleet: Fleet, device: str, **settings: Any) -> Process:
    x, y = digits_train()
    start = 60 * int(device[1:])
    path = fleet.write_data(device, x[start : start + 60], y[start : start + 60])
    return fleet.agent(device, {"npz": {"path": path}, "classes": 10}, **settings)


def _coordinator(fleet: Fleet, **settings: Any) -> LocalCoordinator:
    return fleet.local_coordinator(
        **{
            "network": NETWORK,
            "epochs": 4,
            "global_batch": 10,
            "min_devices": 3,
            "policy": {"name": "ugs"},
            "optimiser": {"name": "sgd", "lr": 0.05},
            "deadline": {"min_s": 1, "first_s": 20, "return_grace_s": 20},
            **settings,
        },
    )


def test_devices_killed_in_turn_come_back_and_nothing_is_lost(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """1. Three devices train. 2. One after the other is killed with -9 at a moment of its own and
    started again. 3. Every sample of every epoch was trained exactly once."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        # Slow answers make it likely that a kill meets a device at work.
        agents = [_agent(processes, d, trial_delay={"fixed_s": 0.05}) for d in SAMPLES]
        coordinator = _coordinator(processes)
        for agent, step in zip(agents, (5, 21, 38), strict=True):
            processes.wait_for_steps(step)
            agent.kill()
            agent.start()
        assert coordinator.wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=4)
        summary = processes.summary()
    assert summary["samples_trained"] == 4 * sum(SAMPLES.values())
    assert summary["samples_missed"] == 0


def test_device_that_stays_away_is_counted_as_missed_by_name(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        # Slow enough that the log of steps shows the first epoch while it is on.
        agents = [_agent(processes, d, trial_delay={"fixed_s": 0.3}) for d in SAMPLES]
        coordinator = _coordinator(
            processes, epochs=2, deadline={"min_s": 1, "first_s": 20, "return_grace_s": 1}
        )
        processes.wait_for_steps(4)
        agents[1].kill()
        assert coordinator.wait() == 0, processes.last_words()
        steps, summary = processes.steps(), processes.summary()
        assert_trained_exactly_once(steps, {"d0": 60, "d2": 60}, epochs=2)
    assert [d["device"] for d in summary["devices"] if d["samples_missed"]] == ["d1"]
    [lost] = [device for device in summary["devices"] if device["device"] == "d1"]
    trained = sum(c for step in steps for name, _, c in step.slots if name == "d1")
    assert lost["samples_trained"] == trained
    assert lost["samples_missed"] == 60 - trained  # in the first epoch; it was not in the second
    assert "d1" in coordinator.output()


def test_late_joiner_is_taken_in(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """1. The coordinator is there first, then two devices train. 2. A third comes: soon an epoch
    holds all of its samples. 3. SIGTERM ends the run."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        coordinator = _coordinator(processes, min_devices=2, epochs=10_000)
        for device in ("d0", "d1"):
            _agent(processes, device)
        processes.wait_for_steps(1)
        _agent(processes, "d2")
        processes.wait_until(
            lambda: _whole_epochs_of(processes, "d2") > 0 and processes.steps()[-1].epoch > 0,
            "an epoch with d2, and the next",
        )
        terminate(coordinator)
        assert coordinator.wait() == 0, processes.last_words()
        steps = processes.steps()
        assert {name for name, *_ in steps[0].slots} <= {"d0", "d1"}
        # Even the first epoch has it, where the machine is slow.
        assert_trained_exactly_once(steps, {"d0": 60, "d1": 60}, epochs=steps[-1].epoch)


def _whole_epochs_of(fleet: Fleet, device: str) -> int:
    trained: Counter[int] = Counter()
    for step in fleet.steps():
        trained[step.epoch] += sum(count for name, _, count in step.slots if name == device)
    return sum(count == SAMPLES[device] for count in trained.values())


def test_device_slower_than_the_deadline_costs_its_ranges_not_the_run(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """1. A device misses two deadlines and sits out. 2. Its late answer is dropped and counted.
    3. It goes; its samples are missed, by name."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        for device in ("d0", "d1"):
            _agent(processes, device)
        slow = _agent(processes, "d2", trial_delay={"fixed_s": 6.0})
        coordinator = _coordinator(
            processes,
            epochs=1,
            # The epoch ends behind the late answer, at 2 * 2.5 + 5 s.
            deadline={"fixed_s": 2.5, "max_misses": 2, "return_grace_s": 5},
        )
        processes.wait_until(lambda: _refused(processes, "d2").get("late", 0) > 0, "a late answer")
        slow.kill()
        assert coordinator.wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), {"d0": 60, "d1": 60}, epochs=1)
        summary = processes.summary()
    by_name = {device["device"]: device for device in summary["devices"]}
    assert by_name["d2"]["missed_deadlines"] >= 2
    assert by_name["d2"]["samples_missed"] == 60
    assert by_name["d2"]["refused"].get("late", 0) >= 1
    assert by_name["d0"]["samples_missed"] == by_name["d1"]["samples_missed"] == 0


def _refused(fleet: Fleet, device: str) -> dict[str, int]:
    """What the coordinator has refused of a device, as its store says."""
    store = open_store(f"sqlite:///{fleet.out / 'state.sqlite'}")
    try:
        records = Journal(store, "test", fleet.out, keep=1).device_records()
    finally:
        store.close()
    return records[device].refused if device in records else {}


def test_broker_that_is_killed_and_started_again_is_waited_for(
    tmp_path: Path, mosquitto: EmbeddedBroker, fleet: str
) -> None:
    with running_fleet(tmp_path, mosquitto.port, fleet) as processes:
        for device in SAMPLES:
            _agent(processes, device, trial_delay={"fixed_s": 0.05})
        coordinator = _coordinator(processes, epochs=3)
        processes.wait_for_steps(6)
        mosquitto.kill()
        mosquitto.start()
        assert coordinator.wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=3)
        assert "connected again" in coordinator.output()


def test_device_without_a_backward_pass_is_shown_and_takes_part_when_frozen(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """1. A trainable run goes on without it and says why. 2. A frozen run takes it in, and no
    agent has imported torch."""
    none = {"backward": "none"}
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        _agent(processes, "d0")
        torch_free = [_agent(processes, device, compute=none) for device in ("d1", "d2")]
        coordinator = _coordinator(processes, epochs=1, min_devices=1)
        assert coordinator.wait() == 0, processes.last_words()
        assert "d1: takes no part: cannot train: backward is set to none: " in coordinator.output()
        assert_trained_exactly_once(processes.steps(), {"d0": 60}, epochs=1)
        frozen = _coordinator(
            processes,
            run="frozen",
            out=str(tmp_path / "frozen"),
            network=NETWORK | {"frozen": True},
        )
        processes.directory.joinpath("run").rename(tmp_path / "first")
        assert frozen.wait() == 0, processes.last_words()
        tmp_path.joinpath("frozen").rename(processes.out)
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=4)
        losses = [step.loss for step in processes.steps()]
        for agent in torch_free:
            maps = Path(f"/proc/{agent.popen.pid}/maps").read_text() if agent.popen else ""
            assert "onnxruntime" in maps
            assert "libtorch" not in maps
    assert sum(losses[-5:]) < sum(losses[:5])


def test_second_run_of_the_same_name_is_not_confused_by_what_the_first_left(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str
) -> None:
    """Retained weights and agents that still run know a later step than the new run's first."""
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        for device in SAMPLES:
            _agent(processes, device)
        assert _coordinator(processes, epochs=2).wait() == 0, processes.last_words()
        processes.out.rename(tmp_path / "first")
        assert _coordinator(processes, epochs=1).wait() == 0, processes.last_words()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=1)
        assert processes.summary()["refused"] == {}
