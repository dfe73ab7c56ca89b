"""A fleet over a real broker equals the undivided network on the same batches.

The reference is a plain torch loop that knows nothing of the project but the written log of steps
(which device gave which range) and the rule for permutations in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coordinator.broker import EmbeddedBroker
from coordinator.checkpoint import list_checkpoints, read_checkpoint
from coordinator.planning import permutation_seed
from edge_agent.datasets import DataSettings, load_data
from models.registry import build_network
from tests.fleet import Fleet, running_fleet

pytestmark = [pytest.mark.broker, pytest.mark.processes]

Backend = tuple[str, str]  # what runs the segment forward, and backward

DEVICES = 3
STEPS = 50
BATCH = 24
SEED = 5


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    data = load_data(
        DataSettings(function="edge_agent.datasets.samples:digits_train"), source="test"
    )
    return data.x, data.y


def _parts() -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Unequal shares, one epoch of exactly STEPS steps."""
    x, y = _digits()
    bounds = [0, 300, 700, STEPS * BATCH]
    return {
        f"d{i}": (x[bounds[i] : bounds[i + 1]], y[bounds[i] : bounds[i + 1]])
        for i in range(DEVICES)
    }


def _train_fleet(
    fleet: Fleet,
    optimiser: dict[str, Any],
    backends: Sequence[Backend],
) -> None:
    """Each agent is a process, and the coordinator of a mixed fleet too."""
    agents = {}
    for (device, (x, y)), (forward, backward) in zip(_parts().items(), backends, strict=True):
        path = fleet.write_data(device, x, y)
        agents[device] = fleet.agent(
            device,
            {"npz": {"path": path}, "classes": 10},
            compute={"forward": forward, "backward": backward},
        )
    is_mixed = len(set(backends)) > 1
    start = fleet.coordinator if is_mixed else fleet.local_coordinator
    coordinator = start(
        network={"name": "cnn2d", "cut": "block2", "input_shape": [1, 8, 8], "classes": 10},
        epochs=1,
        global_batch=BATCH,
        min_devices=DEVICES,
        policy={"name": "ugs"},
        optimiser=optimiser,
        precision="fp32",
        seed=SEED,
        deadline={"min_s": 30},
    )
    assert coordinator.wait() == 0, fleet.last_words()
    for agent, (_, backward) in zip(agents.values(), backends, strict=True):
        assert agent.popen is not None
        loaded = Path(f"/proc/{agent.popen.pid}/maps").read_text()
        assert ("libtorch" in loaded) == (backward == "torch")


def _fleet_weights(fleet: Fleet) -> dict[str, torch.Tensor]:
    [*_, newest] = list_checkpoints(fleet.out / "checkpoints")
    tensors = read_checkpoint(newest).tensors
    return {
        name.split(".", 2)[2]: tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.")
    }


def _train_undivided(
    fleet: Fleet, optimiser: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    network = build_network("cnn2d", input_shape=(1, 8, 8), classes=10, seed=SEED)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    arguments = {key: value for key, value in optimiser.items() if key != "name"}
    stepper = kinds[optimiser["name"]](network.parameters(), **arguments)
    parts = _parts()
    losses = []
    for step in fleet.steps():
        xs, ys = [], []
        for device, offset, count in step.slots:
            x, y = parts[device]
            seed = permutation_seed(SEED, step.epoch, device)
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(y))
            xs.append(x[order[offset : offset + count]])
            ys.append(y[order[offset : offset + count]])
        stepper.zero_grad()
        logits = network(torch.from_numpy(np.concatenate(xs)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.concatenate(ys)))
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    return losses, dict(network.state_dict())


def _largest_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a weight tensor, by norm."""
    assert set(ours) == set(reference)
    return max(
        float((ours[name] - reference[name]).norm() / reference[name].norm()) for name in reference
    )


SGD = {"name": "sgd", "lr": 0.05}
MOMENTUM = {"name": "sgd", "lr": 0.02, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 1e-3}


TORCH: Backend = ("torch", "torch")
BOTH: Backend = ("onnxruntime", "torch")
ONNX: Backend = ("auto", "onnxruntime")


@pytest.mark.parametrize(
    ("optimiser", "backends", "tolerance"),
    [
        pytest.param(SGD, [TORCH] * 3, 1e-5, id="sgd-torch"),
        pytest.param(MOMENTUM, [BOTH] * 3, 1e-4, id="momentum-onnxruntime-forward"),
        pytest.param(ADAM, [BOTH] * 3, 1e-3, id="adam-onnxruntime-forward"),
        pytest.param(MOMENTUM, [ONNX] * 3, 1e-4, id="momentum-onnxruntime"),
        pytest.param(SGD, [ONNX, TORCH, BOTH], 1e-4, id="sgd-mixed"),
    ],
)
def test_fp32_fleet_equals_the_undivided_network_after_50_steps(
    tmp_path: Path,
    shared_mosquitto: EmbeddedBroker,
    fleet: str,
    optimiser: dict[str, Any],
    backends: list[Backend],
    tolerance: float,
) -> None:
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        _train_fleet(processes, optimiser, backends)
        steps = processes.steps()
        assert len(steps) == STEPS
        losses, reference = _train_undivided(processes, optimiser)
        ours = _fleet_weights(processes)
    np.testing.assert_allclose([step.loss for step in steps], losses, rtol=10 * tolerance)
    assert losses[-1] < losses[0]
    assert _largest_difference(ours, reference) <= tolerance
