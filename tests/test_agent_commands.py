"""``edge-agent check`` and ``edge-agent bench``: what they show and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.broker import EmbeddedBroker
from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from tests.commands import RunCommand
from wire.bundle import CLIENT_BACKWARD, Bundle, build_bundle
from wire.exit_codes import ExitCode

SHAPE = (6,)
CLASSES = 3


@pytest.fixture(scope="module")
def bundle_data() -> bytes:
    network = build_network("mlp", input_shape=SHAPE, classes=CLASSES, seed=0)
    split = split_network(network, "block1", SHAPE)
    return export_bundle(split, name="mlp", version="1", classes=CLASSES)


@pytest.fixture
def bundle_path(bundle_data: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "client.bundle"
    path.write_bytes(bundle_data)
    return path


def write_settings(directory: Path, port: int, shape: tuple[int, ...] = SHAPE, **more: Any) -> Path:
    data = directory / "samples.npz"
    np.savez(data, x=np.zeros((9, *shape), np.float32), y=np.arange(9) % CLASSES)
    document = {
        "device": "gw-01",
        "mqtt": {"port": port},
        "data": {"npz": {"path": str(data)}, "classes": CLASSES},
        "state_dir": str(directory / "state"),
        **more,
    }
    path = directory / "agent.yaml"
    path.write_bytes(msgspec.yaml.encode(document))
    return path


@pytest.fixture
def settings(tmp_path: Path, shared_mosquitto: EmbeddedBroker) -> Path:
    return write_settings(tmp_path, shared_mosquitto.port)


def lines_of(out: str) -> dict[str, str]:
    return {line[:20].strip(): line[20:].strip() for line in out.splitlines()}


@pytest.mark.broker
def test_check_says_which_backend_and_why_and_what_a_bundle_costs(
    run_agent: RunCommand, settings: Path, bundle_path: Path
) -> None:
    ended = run_agent("check", "-c", settings, "--bundle", bundle_path)
    assert (ended.code, ended.err) == (0, "")
    lines = lines_of(ended.out)
    assert lines["device"] == "gw-01 in fleet lab"
    assert lines["samples"] == "9 of shape 6; per class [3, 3, 3]"
    assert lines["backward"] == "torch: PyTorch is installed"
    assert lines["segment"] == "MLP cut at block1, trains"
    assert lines["largest batch"] == "9 (limit: all samples)"
    assert lines["time, batch 9"].startswith("forward ")
    assert "backward" in lines["time, batch 9"]
    assert lines["broker"].endswith(" answers")


@pytest.mark.broker
def test_check_as_json_measures_what_onnx_runtime_can_do(
    run_agent: RunCommand, tmp_path: Path, shared_mosquitto: EmbeddedBroker, bundle_path: Path
) -> None:
    compute = {"backward": "onnxruntime", "max_batch": 4}
    path = write_settings(tmp_path, shared_mosquitto.port, compute=compute)
    report = json.loads(run_agent("check", "-c", path, "--bundle", bundle_path, "--json").out)
    assert (report["forward"], report["backward"]) == ("onnxruntime", "onnxruntime")
    assert report["backward_reason"] == "backward is set to onnxruntime"
    assert (report["largest_batch"], report["largest_batch_limit"]) == (4, "compute.max_batch")
    assert report["timed_batch"] == 4
    assert report["backward_pass_samples"] > 4
    for field in ("forward_s", "backward_s", "samples_per_s", "memory_available_bytes"):
        assert report[field] > 0
    assert report["bundle_problem"] == ""


@pytest.mark.broker
def test_check_finds_the_bundle_that_the_agent_used_last(
    run_agent: RunCommand, settings: Path, tmp_path: Path, bundle_data: bytes
) -> None:
    assert "none here yet; --bundle FILE" in run_agent("check", "-c", settings).out
    directory = tmp_path / "state" / "bundles"
    directory.mkdir(parents=True)
    (directory / "used.bundle").write_bytes(bundle_data)
    (directory / "torn.bundle").write_bytes(bundle_data[:-9])
    report = json.loads(run_agent("check", "-c", settings, "--json").out)
    assert report["bundle"] == str(directory / "used.bundle")
    assert report["forward_s"] > 0


@pytest.mark.broker
def test_check_of_a_device_that_cannot_train_says_so_and_ends_with_65(
    run_agent: RunCommand, tmp_path: Path, shared_mosquitto: EmbeddedBroker, bundle_path: Path
) -> None:
    path = write_settings(tmp_path, shared_mosquitto.port, compute={"backward": "none"})
    ended = run_agent("check", "-c", path, "--bundle", bundle_path)
    assert ended.code == ExitCode.DATA
    lines = lines_of(ended.out)
    assert lines["backward"] == "none: backward is set to none"
    assert "expected compute.backward other than none" in lines["cannot be used"]


@pytest.mark.broker
def test_check_of_a_bundle_for_other_samples_ends_with_65(
    run_agent: RunCommand, tmp_path: Path, shared_mosquitto: EmbeddedBroker, bundle_path: Path
) -> None:
    path = write_settings(tmp_path, shared_mosquitto.port, shape=(2, 4))
    ended = run_agent("check", "-c", path, "--bundle", bundle_path)
    assert ended.code == ExitCode.DATA
    expected = "expected samples of shape (6,), this device holds (2, 4)"
    assert lines_of(ended.out)["cannot be used"] == expected


@pytest.mark.broker
def test_check_of_an_old_bundle_without_a_backward_graph_says_what_to_do(
    run_agent: RunCommand, tmp_path: Path, shared_mosquitto: EmbeddedBroker, bundle_data: bytes
) -> None:
    bundle = Bundle.from_bytes(bundle_data)
    files = {name: data for name, data in bundle.files.items() if name != CLIENT_BACKWARD}
    old = tmp_path / "old.bundle"
    old.write_bytes(build_bundle(bundle.manifest, files))
    compute = {"backward": "onnxruntime"}
    path = write_settings(tmp_path, shared_mosquitto.port, compute=compute)
    ended = run_agent("check", "-c", path, "--bundle", old)
    assert ended.code == ExitCode.DATA
    assert "client_backward.onnx: expected this file" in lines_of(ended.out)["cannot be used"]


def test_check_without_a_broker_ends_with_69(
    run_agent: RunCommand, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.checking.BROKER_TIMEOUT_S", 0.3)
    ended = run_agent("check", "-c", write_settings(tmp_path, free_port))
    assert ended.code == ExitCode.UNAVAILABLE
    assert f"127.0.0.1:{free_port}: not connected" in lines_of(ended.out)["broker"]


@pytest.mark.parametrize(
    ("command", "content", "code", "words"),
    [
        ("check", None, ExitCode.CONFIG, "no.bundle: expected a bundle (No such file"),
        ("check", b"no zip", ExitCode.DATA, "no.bundle: expected a whole zip archive"),
        ("bench", None, ExitCode.CONFIG, "no.bundle: expected a bundle (No such file"),
        ("bench", b"no zip", ExitCode.DATA, "no.bundle: expected a whole zip archive"),
    ],
)
def test_file_that_is_no_bundle_is_named(
    run_agent: RunCommand,
    tmp_path: Path,
    command: str,
    content: bytes | None,
    code: int,
    words: str,
) -> None:
    path = tmp_path / "no.bundle"
    if content is not None:
        path.write_bytes(content)
    settings = write_settings(tmp_path, 1)
    ended = run_agent(command, "-c", settings, "--bundle", path)
    assert ended.code == code
    assert words in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.processes
def test_bench_shows_both_backends_as_a_table_and_as_json(
    run_agent: RunCommand, bundle_path: Path
) -> None:
    options = ("--bundle", bundle_path, "--batch", 4, "--rounds", 1)
    ended = run_agent("bench", *options)
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split()[:2] for line in ended.out.splitlines()]
    assert ["4", "onnxruntime"] in rows
    assert ["4", "torch"] in rows
    assert "times the time of PyTorch" in ended.out
    document = json.loads(run_agent("bench", *options, "--json").out)
    assert [result["backend"] for result in document["results"]] == ["onnxruntime", "torch"]
    for result in document["results"]:
        assert result["step_s"] >= result["forward_s"] > 0
        assert result["peak_rss_bytes"] > 1e7
    assert document["left_out"] == {}


@pytest.mark.processes
def test_bench_takes_the_agent_s_last_bundle_and_its_settings(
    run_agent: RunCommand, tmp_path: Path, bundle_data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edge_agent.measuring.compare.find_spec",
        lambda name: None if name == "torch" else object(),
    )
    settings = write_settings(tmp_path, 1, compute={"max_batch_bytes": 1 << 21})
    directory = tmp_path / "state" / "bundles"
    ended = run_agent("bench", "-c", settings)
    assert ended.code == ExitCode.CONFIG
    assert f"expected a bundle in {directory}, or --bundle FILE" in ended.err
    directory.mkdir(parents=True)
    (directory / "used.bundle").write_bytes(bundle_data)
    ended = run_agent("bench", "-c", settings, "--batch", 2, "--rounds", 1, "--json")
    document = json.loads(ended.out)
    assert document["max_batch_bytes"] == 1 << 21
    assert document["left_out"] == {"torch": "not installed"}


def test_bench_of_nothing_asks_for_a_bundle(run_agent: RunCommand) -> None:
    ended = run_agent("bench")
    assert ended.code == ExitCode.CONFIG
    assert "expected --bundle FILE, or -c FILE" in ended.err


def test_bench_of_a_bundle_that_nothing_here_can_run_ends_with_65(
    run_agent: RunCommand, tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.measuring.compare.find_spec", lambda name: None)
    ended = run_agent("bench", "--bundle", bundle_path)
    assert ended.code == ExitCode.DATA
    assert "onnxruntime: not installed; torch: not installed" in ended.err


@pytest.mark.parametrize("option", ["--batch", "--rounds"])
def test_bench_refuses_counts_below_one(
    run_agent: RunCommand, bundle_path: Path, option: str
) -> None:
    ended = run_agent("bench", "--bundle", bundle_path, option, 0)
    assert ended.code == ExitCode.USAGE
    assert option in ended.err
