"""A device written from docs/protocol.md alone trains with ours, and the sum is exact."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coordinator.broker import EmbeddedBroker
from coordinator.checkpoint import list_checkpoints, read_checkpoint
from coordinator.planning import permutation_seed
from edge_agent.datasets.samples import digits_test, digits_train
from models.registry import build_network
from tests.fleet import Fleet, Process, assert_trained_exactly_once, running_fleet

SOURCE = Path(__file__).with_name("foreign_device.py")
OURS = {"wire", "edge_agent", "coordinator", "models", "tests"}
FOREIGN = "other-01"
OURS_RUN_ON = {"d0": "torch", "d1": "onnxruntime"}
SAMPLES = {"d0": 250, "d1": 350, FOREIGN: 400}
EPOCHS = 4
SEED = 3
LR = 0.3


def test_the_foreign_device_names_no_module_of_ours() -> None:
    named: set[str] = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            named.add(node.module or "")
    assert named, "nothing was found at all"
    assert not {name.partition(".")[0] for name in named} & OURS


def _parts() -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Digits, sorted by class, so that each device holds some classes only."""
    x, y = digits_train()
    order = np.argsort(y[:1000], kind="stable")
    parts, start = {}, 0
    for device, count in SAMPLES.items():
        rows = order[start : start + count]
        parts[device] = (x[rows].astype(np.float32), y[rows])
        start += count
    return parts


def _start_foreign(fleet: Fleet, path: str) -> Process:
    command = [sys.executable, str(SOURCE), "--port", str(fleet.port), "--fleet", fleet.name]
    command += ["--device", FOREIGN, "--data", path, "--boot", str(fleet.directory / "boot")]
    process = Process(FOREIGN, command, fleet.directory / "foreign.log")
    fleet.processes.append(process)
    process.start()
    return process


def _train(fleet: Fleet, precision: str, policy: str) -> dict[str, Any]:
    """Train to the end; the last words of the foreign device."""
    for device, (x, y) in _parts().items():
        path = fleet.write_data(device, x, y)
        if device == FOREIGN:
            foreign = _start_foreign(fleet, path)
        else:
            compute = {"backward": OURS_RUN_ON[device]}
            fleet.agent(device, {"npz": {"path": path}, "classes": 10}, compute=compute)
    x_test, y_test = digits_test()
    coordinator = fleet.local_coordinator(
        network={"name": "mlp", "cut": "block1", "arguments": {"hidden": [64]}},
        test_data={"npz": {"path": fleet.write_data("test", x_test, y_test)}, "classes": 10},
        epochs=EPOCHS,
        global_batch=40,
        min_devices=len(SAMPLES),
        policy={"name": policy},
        optimiser={"name": "sgd", "lr": LR},
        precision=precision,
        seed=SEED,
        deadline={"min_s": 30},
    )
    assert coordinator.wait() == 0, fleet.last_words()
    foreign.stop()
    words: dict[str, Any] = json.loads(foreign.output().splitlines()[-1])
    return words


def _order(device: str, epoch: int, y: NDArray[np.int64], policy: str) -> NDArray[np.int64]:
    """Our agents' permutation, and the foreign device's own."""
    seed = permutation_seed(SEED, epoch, device)
    bits = np.random.Philox(seed) if device == FOREIGN else np.random.PCG64(seed)
    order = np.random.Generator(bits).permutation(len(y))[:: -1 if device == FOREIGN else 1]
    return order[np.argsort(y[order], kind="stable")] if policy == "class-targeted" else order


def _train_undivided(fleet: Fleet, policy: str) -> dict[str, torch.Tensor]:
    """The whole network in one process on the batches that the fleet's log names."""
    network = build_network(
        "mlp", input_shape=(1, 8, 8), classes=10, arguments={"hidden": [64]}, seed=SEED
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=LR)
    parts = _parts()
    for step in fleet.steps():
        rows = []
        for device, offset, count in step.slots:
            order = _order(device, step.epoch, parts[device][1], policy)
            rows.append((parts[device], order[offset : offset + count]))
        x = torch.from_numpy(np.concatenate([part[0][chosen] for part, chosen in rows]))
        y = torch.from_numpy(np.concatenate([part[1][chosen] for part, chosen in rows]))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    return dict(network.state_dict())


def _fleet_weights(fleet: Fleet) -> dict[str, torch.Tensor]:
    tensors = read_checkpoint(list_checkpoints(fleet.out / "checkpoints")[-1]).tensors
    return {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith("weights.")}


@pytest.mark.broker
@pytest.mark.processes
@pytest.mark.parametrize(
    ("precision", "policy", "tolerance"),
    [("fp32", "class-targeted", 1e-4), ("fp16", "ugs", 1e-2)],
)
def test_a_foreign_device_and_two_of_ours_train_like_one_undivided_network(
    tmp_path: Path,
    shared_mosquitto: EmbeddedBroker,
    fleet: str,
    precision: str,
    policy: str,
    tolerance: float,
) -> None:
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        words = _train(processes, precision, policy)
        summary = processes.summary()
        assert_trained_exactly_once(processes.steps(), SAMPLES, epochs=EPOCHS)
        reference = _train_undivided(processes, policy)
        ours = _fleet_weights(processes)
    assert words["dropped"] == []
    assert not {name.partition(".")[0] for name in words["modules"]} & OURS
    assert summary["completed"]
    assert summary["refused"] == {}
    assert summary["samples_trained"] == EPOCHS * sum(SAMPLES.values())
    assert summary["samples_missed"] == 0
    assert summary["test_accuracy"] > 0.85
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        assert float((ours[name] - tensor).norm() / tensor.norm()) <= tolerance, name
