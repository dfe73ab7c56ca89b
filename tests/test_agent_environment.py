"""The ``agent`` extra, installed afresh: no torch, small, and it trains as well as torch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from edge_agent.datasets import DataSettings, IdxSource, load_data

pytestmark = [pytest.mark.broker, pytest.mark.processes]

ROOT = Path(__file__).parent.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MB = 1_000_000
TRAIN, TEST = 2048, 4000
DEVICES = 4


@pytest.fixture(scope="module")
def agent_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with ``splitfleet[agent]`` and what that brings, and nothing else.

    Built as the scripts build theirs: pip as it is set up on this machine, releases pinned. The
    sources are copied first, so that no build leaves anything in the checkout.
    """
    directory = tmp_path_factory.mktemp("agent")
    sources = directory / "sources"
    copied = ("wire", "edge_agent", "coordinator", "models", "pyproject.toml", "README.md")
    sources.mkdir()
    for name in (*copied, "LICENSE"):
        run(["cp", "-r", str(ROOT / name), str(sources)])
    python = directory / "venv" / "bin" / "python"
    run([sys.executable, "-m", "venv", "--without-pip", str(python.parent.parent)])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    constraints = str(ROOT / "constraints.txt")
    run([*pip, "--no-compile", "-c", constraints, f"{sources}[agent]"])
    return python


def run(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """A command outside of the checkout's reach; fails the test with what it said."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environ
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd="/"
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr[-3000:]}"
    return done


def size_bytes(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if file.is_file())


def fashion_mnist(directory: Path, part: str, limit: int) -> str:
    source = IdxSource(
        images=str(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz"),
        labels=str(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz"),
    )
    settings = DataSettings(idx=source, classes=10, limit=limit, shape=(1, 28, 28))
    data = load_data(settings, source="test")
    path = directory / f"{part}.npz"
    np.savez(path, x=data.x, y=data.y)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("fashion")
    return fashion_mnist(directory, "train", TRAIN), fashion_mnist(directory, "t10k", TEST)


def train(files: tuple[str, str], out: Path, *options: str) -> dict[str, Any]:
    """A demo's summary: four devices, the small CNN, every step the same in each call.

    fp32 payloads and a small learning rate: rounding grows by itself while weights move fast, and
    two runs of so few samples would then be apart by a point by chance.
    """
    data, test_data = files
    command = [sys.executable, "-m", "coordinator", "demo", "--out", str(out)]
    command += ["--data", data, "--test-data", test_data, "--network", "cnn2d"]
    command += ["--devices", str(DEVICES), "--stragglers", "0", "--policy", "ugs"]
    command += ["--precision", "fp32", "--lr", "1e-3"]
    run([*command, "--epochs", "2", *options], PYTHONPATH=str(ROOT))
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def without_torch(
    agent_python: Path, files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("without")
    # The backend is chosen by the agents themselves: they find no PyTorch.
    options = ("--agent-python", str(agent_python), "--agent-backward", "auto")
    return out, train(files, out, *options)


def test_environment_has_no_torch_and_is_small(agent_python: Path) -> None:
    code = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    installed = set(run([str(agent_python), "-c", code]).stdout.lower().split())
    assert {"splitfleet", "onnxruntime", "numpy", "msgspec"} <= installed
    assert not installed & {"torch", "onnx", "onnxscript", "scipy", "scikit-learn", "matplotlib"}
    assert size_bytes(agent_python.parent.parent) < 300 * MB


def test_fleet_without_torch_is_as_accurate_as_a_fleet_with_torch(
    without_torch: tuple[Path, dict[str, Any]], files: tuple[str, str], tmp_path: Path
) -> None:
    _, ours = without_torch
    theirs = train(files, tmp_path / "out", "--agent-backward", "torch")
    assert ours["steps"] == theirs["steps"] == 2 * TRAIN // 64
    assert ours["samples_trained"] == theirs["samples_trained"] == 2 * TRAIN
    assert ours["refused"] == {}
    assert ours["test_accuracy"] > 0.65
    assert abs(ours["test_accuracy"] - theirs["test_accuracy"]) <= 0.01


def test_check_and_bench_of_a_device_without_torch(
    agent_python: Path,
    without_torch: tuple[Path, dict[str, Any]],
    shared_mosquitto: EmbeddedBroker,
) -> None:
    """With the settings and the bundle that the fleet has left."""
    out, _ = without_torch
    settings = str(out / "agents" / "device-01.yaml")
    command = [str(agent_python), "-m", "edge_agent"]
    port = str(shared_mosquitto.port)
    checked = run([*command, "check", "-c", settings, "--port", port, "--json"])
    report = json.loads(checked.stdout)
    assert (report["backward"], report["torch"]) == ("onnxruntime", None)
    assert report["backward_reason"] == "PyTorch is not installed"
    assert report["bundle_problem"] == ""
    assert report["backward_s"] > 0
    bench = run([*command, "bench", "-c", settings, "--batch", "8", "--rounds", "1", "--json"])
    document = json.loads(bench.stdout)
    assert document["left_out"] == {"torch": "not installed"}
    (result,) = document["results"]
    assert result["peak_rss_bytes"] < 120 * MB
