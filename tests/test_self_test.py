"""The self-test: what it measures, and that a bundle that fails it harms nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import edge_agent.golden
import edge_agent.self_test
from coordinator.config import RunSettings
from coordinator.model import build_split
from edge_agent.compute import build_backend
from edge_agent.config import ComputeSettings
from edge_agent.golden import run_self_test
from edge_agent.self_test import Job, Outcome, SelfTest
from models.export import export_bundle
from wire.bundle import GOLDEN, WEIGHTS, Bundle, build_bundle, encode_weights
from wire.codec import decode_tensors
from wire.errors import ModelError

MIB = 1 << 20
ONNX = ComputeSettings(forward="onnxruntime", backward="onnxruntime")
WAIT_S = 60.0

Child = Callable[[Bundle, Any], Any]


def _export(frozen: bool) -> Bundle:
    document = {"network": {"name": "mlp", "cut": "block1", "arguments": {"hidden": [8, 6]}}}
    settings = msgspec.convert(document, RunSettings)
    split = build_split(settings, input_shape=(5,), classes=3, source="test")
    return Bundle.from_bytes(export_bundle(split, name="t", version="1", classes=3, frozen=frozen))


@pytest.fixture(scope="module")
def trained() -> Bundle:
    return _export(frozen=False)


@pytest.fixture(scope="module")
def frozen() -> Bundle:
    return _export(frozen=True)


def _change(bundle: Bundle, file: str, **tensors: Any) -> Bundle:
    """The bundle with some tensors of a file replaced; everything else is in order."""
    arrays = dict(decode_tensors(bundle.files[file]).arrays) | tensors
    files = {**bundle.files, file: encode_weights(arrays)}
    return Bundle.from_bytes(build_bundle(bundle.manifest, files))


def _run(bundle: Bundle, *, limit_s: float = WAIT_S, memory_bytes: int = 512 * MIB) -> Outcome:
    """A self-test in processes of its own, polled as the agent does it."""
    woken = threading.Event()
    job = Job(bundle, ONNX, memory_bytes)
    test = SelfTest(job, limit_s=limit_s, now_s=time.monotonic(), wake=woken.set)
    while (outcome := test.poll(time.monotonic())) is None:
        woken.wait(0.05)
        woken.clear()
    return outcome


@pytest.mark.parametrize("backward", ["torch", "onnxruntime"])
def test_every_backend_comes_to_the_golden_values(trained: Bundle, backward: Any) -> None:
    report = run_self_test(trained, build_backend("auto", backward))
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert report.gradient_error is not None
    assert report.gradient_error < 1e-4


def test_frozen_bundle_is_tested_forward_alone(frozen: Bundle) -> None:
    report = run_self_test(frozen, build_backend("onnxruntime", "none"))
    assert report.max_error is not None
    assert report.gradient_error is None


def test_wrong_weights_are_found(trained: Bundle) -> None:
    weight = trained.manifest.parameters[0].name
    wrong = _change(trained, WEIGHTS, **{weight: trained.initial_weights()[weight] + np.float32(1)})
    with pytest.raises(ModelError, match=r"activations differ from golden.safetensors by"):
        run_self_test(wrong, build_backend("onnxruntime", "onnxruntime"))


def test_wrong_gradients_are_found_by_their_parameter(trained: Bundle) -> None:
    norms = trained.golden_values().gradient_norms_P.copy()  # type: ignore[union-attr]
    norms[1] *= 1.1
    wrong = _change(trained, GOLDEN, gradient_norms=norms)
    name = trained.manifest.parameters[1].name
    with pytest.raises(ModelError, match=f"the gradient of {name} differs"):
        run_self_test(wrong, build_backend("torch", "torch"))


def test_infinite_activations_are_found_without_golden_values(trained: Bundle) -> None:
    weight = trained.manifest.parameters[0].name
    values = np.full_like(trained.initial_weights()[weight], np.inf)
    wrong = _change(trained, WEIGHTS, **{weight: values})
    files = {name: data for name, data in wrong.files.items() if name != GOLDEN}
    manifest = msgspec.structs.replace(wrong.manifest, golden=None)
    plain = Bundle.from_bytes(build_bundle(manifest, files))
    with pytest.raises(ModelError, match="expected finite activations"):
        run_self_test(plain, build_backend("onnxruntime", "onnxruntime"))


def test_golden_values_of_another_shape_are_refused(trained: Bundle) -> None:
    wrong = _change(trained, GOLDEN, input=np.zeros((1, 2), np.float32))
    with pytest.raises(ModelError, match=r"golden.safetensors: input: expected float32 \(4, 5\)"):
        run_self_test(wrong, build_backend("onnxruntime", "onnxruntime"))


def test_child_measures_time_and_memory(trained: Bundle) -> None:
    report = _run(trained).report
    assert report is not None
    assert 0 < report.seconds < WAIT_S
    assert 0 < report.peak_bytes < 512 * MIB
    assert report.max_error is not None


def test_failure_in_the_child_comes_back_in_words(trained: Bundle) -> None:
    weight = trained.manifest.parameters[0].name
    wrong = _change(trained, WEIGHTS, **{weight: trained.initial_weights()[weight] * 2})
    assert "differ from golden.safetensors" in _run(wrong).failure


def _in_child(monkeypatch: pytest.MonkeyPatch, work: Child, *, final: bool) -> None:
    """Let forked children do ``work`` instead; ``final``: also in the second, fresh one."""
    monkeypatch.setattr(edge_agent.self_test, "run_self_test", work)
    if final:
        monkeypatch.setattr(edge_agent.self_test, "SPAWN", edge_agent.self_test.FORK)


def _crash(bundle: Bundle, backend: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(bundle: Bundle, backend: Any) -> Any:
    while True:
        signal.pause()


def _hoard(bundle: Bundle, backend: Any) -> Any:
    return [bytearray(MIB) for _ in range(10_000)]


def test_bundle_that_crashes_the_child_fails_by_its_signal(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_child(monkeypatch, _crash, final=True)
    assert _run(trained) == Outcome(failure="self-test: the process ended by SIGKILL")


def test_bundle_that_never_ends_fails_by_its_limit(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_child(monkeypatch, _hang, final=True)
    assert _run(trained, limit_s=0.6).failure == "self-test: not done within its time limit"


def test_bundle_that_hoards_memory_fails_by_its_limit(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_child(monkeypatch, _hoard, final=True)
    failure = _run(trained, memory_bytes=64 * MIB).failure
    assert failure == f"self-test: more memory than the allowed {64 * MIB} bytes"


def test_fork_that_crashes_is_not_held_against_a_good_bundle(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh interpreter, which knows nothing of the crash, has the last word."""
    _in_child(monkeypatch, _crash, final=False)
    assert _run(trained).report is not None


def test_child_holds_no_connection_of_the_agent(
    trained: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the agent dies, the broker must notice at once."""
    mine, other = socket.socketpair()
    started = threading.Event()
    _in_child(monkeypatch, _hang, final=True)
    test = SelfTest(Job(trained, ONNX, MIB), limit_s=WAIT_S, now_s=0.0, wake=started.set)
    try:
        mine.close()
        other.settimeout(WAIT_S)
        assert other.recv(1) == b"", "the end is seen while the child lives"
        assert test.poll(1.0) is None
    finally:
        test.kill()
        other.close()


AS_PROCESS_1 = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def test_agent_that_is_process_1_can_test_a_bundle(trained: Bundle, tmp_path: Path) -> None:
    """As in a container, where nothing else runs; a child's parent is 1 there, and alive."""
    if subprocess.run([*AS_PROCESS_1, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no namespaces of one's own here")
    file = tmp_path / "t.bundle"
    file.write_bytes(build_bundle(trained.manifest, trained.files))
    verify = [sys.executable, "-m", "edge_agent", "bundle", "verify", str(file)]
    ended = subprocess.run(
        [*AS_PROCESS_1, *verify], check=False, capture_output=True, text=True, timeout=WAIT_S
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
