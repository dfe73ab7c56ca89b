"""``coordinator demo`` as a user runs it: results, own data, wrong options, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.commands import RunCommand
from tests.fleet import assert_trained_exactly_once, read_steps

pytestmark = [pytest.mark.broker, pytest.mark.processes]

COMMAND = [sys.executable, "-m", "coordinator", "demo"]
KEYS = {
    "test_accuracy",
    "epochs",
    "samples_held",
    "samples_trained",
    "samples_missed",
    "steps",
    "train_s",
    "steps_per_s",
    "bytes_up",
    "bytes_down",
    "mean_deviation",
    "refused",
    "policy",
    "devices",
}


def _demo(*options: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def _agents_below(directory: Path) -> list[str]:
    """Command lines of agents whose settings lie in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "edge_agent" in command and str(directory) in command:
            found.append(command)
    return found


def test_demo_trains_the_digits_and_leaves_results_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _demo("--out", str(out), "--epochs", "4", "--devices", "4", "--straggler-delay-s", "0.1")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "\x1b" not in done.stdout  # piped: plain lines
    assert "Mosquitto" in done.stdout
    assert "every sample once per epoch" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["test_accuracy"] >= 0.9
    assert summary["samples_trained"] == 4 * summary["samples_held"]
    assert summary["samples_missed"] == 0
    assert summary["refused"] == {}
    held = {device["device"]: device["samples_held"] for device in summary["devices"]}
    assert sum(held.values()) == summary["samples_held"]
    assert_trained_exactly_once(read_steps(out / "steps.jsonl"), held, epochs=4)
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    slow = max(summary["devices"], key=lambda device: device["delay_s"])
    assert slow["device"] == "device-04"
    assert slow["delay_s"] > 0.1
    assert not _agents_below(out)


def test_demo_trains_sensor_windows_of_ones_own_with_the_embedded_python_broker(
    tmp_path: Path,
) -> None:
    """Windows (channels x time) of a scale that a network would choke on, three classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    t = np.arange(32)
    x = 5000 + 300 * np.sin(t * (y[:, None, None] + 1) * 0.4 + rng.uniform(0, 6, (240, 2, 1)))
    np.savez(tmp_path / "own.npz", x=x, y=y)
    out = tmp_path / "out"
    done = _demo(
        *("--data", str(tmp_path / "own.npz"), "--out", str(out), "--epochs", "15"),
        *("--devices", "2", "--stragglers", "0", "--policy", "ugs", "--precision", "int8"),
        *("--broker", "iotcore", "--batch", "32"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "iotcore" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["network"] == "cnn1d"
    assert summary["policy"] == "ugs"
    assert summary["test_accuracy"] >= 0.8
    assert summary["samples_held"] == 240 - sum(np.bincount(y) // 5)


def test_ctrl_c_ends_a_demo_cleanly(tmp_path: Path) -> None:
    """1. Wait for the first trained steps. 2. SIGINT. 3. A checkpoint, a summary, no process."""
    out = tmp_path / "out"
    command = [*COMMAND, "--out", str(out), "--devices", "3", "--epochs", "500"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline_s = time.monotonic() + 90
        while len(read_steps(out / "steps.jsonl")) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not json.loads((out / "summary.json").read_text())["completed"]
    assert not _agents_below(out)


def test_killed_demo_takes_its_agents_and_its_broker_along(tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    command = [*COMMAND, "--out", str(out), "--devices", "2", "--epochs", "500"]
    with subprocess.Popen(command, stdout=log, stderr=log) as process:
        deadline_s = time.monotonic() + 90
        while not _agents_below(out):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.kill()
    os.close(log)
    deadline_s = time.monotonic() + 20
    while _agents_below(out):
        assert time.monotonic() < deadline_s, _agents_below(out)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data", "missing.npz"], 78, ["missing.npz", "--data"]),
        (["--test-data", "x.npz"], 78, ["--test-data", "--data"]),
        (["--stragglers", "9"], 78, ["--stragglers", "8"]),
        (["--policy", "best"], 2, ["--policy", "lds"]),
        (["--devices", "0"], 2, ["--devices"]),
        (["--precision", "fp8"], 2, ["--precision", "int8"]),
        (["--broker", "nonsense"], 78, ["--broker", "HOST:PORT"]),
        (["--network", "vgg"], 65, ["vgg", "cnn2d"]),
        (["--cut", "middle"], 65, ["middle", "block1"]),
        (["--network", "cnn1d"], 65, ["cnn1d"]),
        (["--classes-per-device", "11"], 78, ["--classes-per-device", "10"]),
        (["--devices", "2000"], 78, ["--devices", "2000"]),
        (["--agent-python", "/no/python"], 78, ["--agent-python"]),
        (["--agent-backward", "jax"], 78, ["--agent-backward", "onnxruntime"]),
        (["--out", "/proc/nowhere"], 78, ["--out"]),
    ],
)
def test_wrong_options_are_named(
    run_coordinator: RunCommand, tmp_path: Path, options: list[str], code: int, words: list[str]
) -> None:
    default = [] if "--out" in options else ["--out", tmp_path / "out"]
    ended = run_coordinator("demo", *default, *options)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err + ended.out
    assert not _agents_below(tmp_path)
