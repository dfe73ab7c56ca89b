"""What fp16 and int8 payloads cost in accuracy: at most a point on the digits, over three seeds.

Nothing in it is left to chance: each run gives the same numbers every time.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from edge_agent.datasets import DataSettings, LabelledData, PartitionSettings, load_data
from tests.pairs import Pair, Samples

DEVICES = 3
SEEDS = (0, 1, 2)
EPOCHS = 5


def _digits(part: str, index: int | None = None) -> LabelledData:
    """The digits, or what one of the devices holds of them: half of the classes."""
    partition = None
    if index is not None:
        partition = PartitionSettings(
            scheme="dirichlet", devices=DEVICES, index=index, classes_per_device=5
        )
    function = f"edge_agent.datasets.samples:digits_{part}"
    return load_data(DataSettings(function=function, partition=partition), source="test")


@pytest.fixture(scope="module")
def samples() -> Samples:
    parts = [_digits("train", index) for index in range(DEVICES)]
    return {f"d{index}": (part.x, part.y) for index, part in enumerate(parts)}


def _accuracy(directory: Path, samples: Samples, precision: str) -> float:
    """Mean test accuracy over the seeds."""
    found = []
    for seed in SEEDS:
        settings = {
            "epochs": EPOCHS,
            "global_batch": 64,
            "optimiser": {"name": "adam", "lr": 3e-3},
            "precision": precision,
            "seed": seed,
        }
        pair = Pair(
            directory / f"{precision}-{seed}",
            samples,
            settings,
            network={"name": "cnn2d"},
            classes=10,
            test_data=_digits("test"),
        )
        pair.begin().train()
        assert pair.refused() == {}
        assert all(epoch.trained == epoch.samples for epoch in pair.reporter.epochs)
        found.append(pair.reporter.epochs[-1].test_accuracy)
    return mean(found)


def test_fp16_and_int8_cost_at_most_a_point_of_accuracy(tmp_path: Path, samples: Samples) -> None:
    reference = _accuracy(tmp_path, samples, "fp32")
    assert reference >= 0.95
    assert _accuracy(tmp_path, samples, "fp16") >= reference - 0.01
    assert _accuracy(tmp_path, samples, "int8") >= reference - 0.01
