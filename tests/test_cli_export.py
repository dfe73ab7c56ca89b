"""``coordinator export``: the bundle, what is said of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.commands import RunCommand, write_run_file
from wire.bundle import Bundle
from wire.exit_codes import ExitCode


def test_an_exported_bundle_is_what_is_reported(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    out, files = tmp_path / "new" / "c.bundle", tmp_path / "files"
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3", "--json"),
        *("--name", "press", "--version", "7", "--out", out, "--unpack", files),
    )
    assert ended.code == 0, ended.err
    bundle = Bundle.from_bytes(out.read_bytes())
    shown = json.loads(ended.out)
    assert shown["digest"] == bundle.digest
    assert shown["size_bytes"] == out.stat().st_size
    assert (shown["manifest"]["name"], shown["manifest"]["version"]) == ("press", "7")
    assert bundle.manifest.input.shape == (8,)
    assert {path.name for path in files.iterdir()} == {"manifest.json", *bundle.files}
    for name, data in bundle.files.items():
        assert (files / name).read_bytes() == data


def test_an_export_from_a_runs_file_takes_shapes_from_its_test_data(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    np.savez(tmp_path / "test.npz", x=np.zeros((6, 8), np.float32), y=np.arange(6) % 3)
    text = f"run: press\nnetwork: {{name: mlp}}\ntest_data: {{npz: {{path: {tmp_path}/test.npz}}}}"
    config = write_run_file(tmp_path, text)
    ended = run_coordinator("export", "-c", config, "--frozen", "--out", tmp_path / "c.bundle")
    assert ended.code == 0, ended.err
    manifest = Bundle.from_bytes((tmp_path / "c.bundle").read_bytes()).manifest
    assert (manifest.name, manifest.input.shape, manifest.classes) == ("press", (8,), 3)
    assert manifest.frozen
    for part in ("press version 1", manifest.cut_layer, "client_forward.onnx", "onnx-forward"):
        assert part in ended.out


def test_possible_cuts_are_listed_with_their_activations(run_coordinator: RunCommand) -> None:
    arguments = ("export", "--network", "cnn2d", "--input-shape", "1,8,8", "--classes", "3")
    cuts = json.loads(run_coordinator(*arguments, "--list-cuts", "--json").out)
    assert sum(cut["default"] for cut in cuts) == 1
    table = run_coordinator(*arguments, "--list-cuts").out
    for cut in cuts:
        assert cut["layer"] in table
        assert " x ".join(map(str, cut["activation_shape"])) in table


def test_an_export_without_a_shape_says_what_is_missing(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator("export", "--network", "mlp", "--classes", "3", "--out", tmp_path / "c")
    assert ended.code == ExitCode.CONFIG
    assert "$.network.input_shape: expected a value (or test_data, or --input-shape)" in ended.err


def test_a_layer_that_cannot_be_cut_is_refused_with_those_that_can(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3"),
        *("--cut", "nowhere", "--out", tmp_path / "c"),
    )
    assert ended.code == ExitCode.DATA
    assert "cut layer nowhere" in ended.err
    assert "possible cut layers" in ended.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--network", "mlp", "--input-shape", "8", "--classes", "3"),
        ("--network", "mlp", "--input-shape", "8,x", "--classes", "3", "--out", "c"),
        ("--network", "mlp", "--input-shape", "0", "--classes", "3", "--out", "c"),
    ],
)
def test_a_wrong_export_command_line_has_the_usage_code(
    run_coordinator: RunCommand, arguments: tuple[str, ...]
) -> None:
    assert run_coordinator("export", *arguments).code == ExitCode.USAGE


def test_an_export_that_cannot_be_written_names_the_file(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3"),
        *("--out", tmp_path),
    )
    assert ended.code == ExitCode.CONFIG
    assert f"{tmp_path}: --out: expected a writable file" in ended.err
