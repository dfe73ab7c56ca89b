"""The benchmark runs from its command line and says the truth about what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.broker import find_mosquitto

ROOT = Path(__file__).resolve().parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a trial of one small case prints, and its JSON."""
    if not FASHION_MNIST.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    assert find_mosquitto() is not None, "Mosquitto is not installed"
    out = tmp_path_factory.mktemp("benchmark") / "results.json"
    command = [sys.executable, "benchmarks/step_overhead.py", "--quick", "--cases", "mlp-n1"]
    options = [
        "--precisions",
        "fp32",
        "--engines",
        "onnxruntime",
        "--clients",
        "quick",
        "--json",
        str(out),
    ]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    return done.stdout, document


@pytest.mark.broker
@pytest.mark.processes
def test_rollout_counts_what_each_device_gets(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/rollout.py", "--devices", "4", "--waves", "100%"]
    options = ["--size", "100000", "--processes", "1", "--json", str(out)]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    shared, individual = json.loads(out.read_text())["rows"]
    for row in (shared, individual):
        assert row["committed"] == 4
        assert 400_000 < row["device_bytes"] < 440_000
    assert shared["sent_bytes"] < individual["sent_bytes"] / 2


@pytest.mark.broker
@pytest.mark.processes
def test_report_names_machine_versions_command_and_one_line_per_variant(
    report: tuple[str, dict[str, Any]],
) -> None:
    text, document = report
    assert "--quick" in document["command"]
    assert {"processor", "cores", "torch", "paho-mqtt", "broker"} <= document["machine"].keys()
    table = [line for line in text.splitlines() if line.startswith("| MLP")]
    assert len(table) == len(document["results"]) == 1


@pytest.mark.broker
@pytest.mark.processes
def test_fleet_and_undivided_network_train_the_same_batches(
    report: tuple[str, dict[str, Any]],
) -> None:
    (result,) = report[1]["results"]
    assert 0 <= result["loss_difference"] < 1e-4


@pytest.mark.broker
@pytest.mark.processes
def test_floor_carries_the_bytes_of_a_real_step(report: tuple[str, dict[str, Any]]) -> None:
    (result,) = report[1]["results"]
    parameters, rows = 784 * 256 + 256, 64
    tensors = 4 * parameters + rows * (4 * 256 + 8)  # gradients, activations and labels
    assert tensors < result["floor_bytes_up_per_step"] < tensors + 4_000
    assert result["floor_bytes_up_per_step"] == pytest.approx(result["bytes_up_per_step"], rel=1e-3)


@pytest.mark.broker
@pytest.mark.processes
def test_shares_follow_from_the_medians(report: tuple[str, dict[str, Any]]) -> None:
    (result,) = report[1]["results"]
    ours, floor = result["ours"]["steps_per_s"], result["floor"]["steps_per_s"]
    assert min(ours, floor, result["undivided"]["steps_per_s"]) > 0
    assert result["share_of_floor"] == pytest.approx(ours / floor)


@pytest.mark.processes
def test_backends_of_a_device_are_held_beside_each_other(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/agent_backends.py", "--quick", "--json", str(out)]
    done = subprocess.run(
        [*command, "--segments", "cnn1d", "--batches", "8", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert [row["batch"] for row in document["results"]] == [1, 8]
    for row in document["results"]:
        onnx, torch = row["onnxruntime"], row["torch"]
        assert row["time_ratio"] == pytest.approx(onnx["step_s"] / torch["step_s"])
        assert 0 < row["memory_ratio"] < 1
    table = [line for line in done.stdout.splitlines() if line.startswith("| 1-D CNN")]
    assert len(table) == 2
    assert "cnn1d: memory " in done.stdout
    assert {"processor", "torch", "onnxruntime"} <= document["machine"].keys()


def test_planning_is_measured_for_every_policy_and_the_naive_way(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/allocation.py", "--cases", "tiny", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--json", str(results)], check=True, capture_output=True, text=True, timeout=120
    )
    costs = json.loads(results.read_text())["costs"]
    ways = ["naive", "ugs", "lds, delta 1", "lds, budget 10 %", "class-targeted"]
    assert [cost["way"] for cost in costs] == ways
    assert len({cost["steps"] for cost in costs}) == 1
    assert all(cost["plan_s"] > 0 and cost["peak_mb"] > 10 for cost in costs)
    assert done.stdout.count("\n") == 2 + len(costs)
