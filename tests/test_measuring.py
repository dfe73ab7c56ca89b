"""What a segment costs on a device: memory, time, the largest batch, backends beside each other."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.config import ComputeSettings
from edge_agent.measuring.capacity import Capacity, find_capacity
from edge_agent.measuring.compare import Comparison, compare_backends, list_contenders
from edge_agent.measuring.memory import available_bytes, peak_rss_bytes
from edge_agent.measuring.text import comparison_notes, format_bytes, format_milliseconds
from edge_agent.measuring.timing import Times, time_steps
from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from wire.bundle import CLIENT_BACKWARD, Bundle, build_bundle
from wire.errors import ModelError

MIB = 1 << 20


def export_mlp(*, frozen: bool = False) -> Bundle:
    network = build_network("mlp", input_shape=(6,), classes=3, arguments={"hidden": [5]}, seed=0)
    split = split_network(network, "block1", (6,))
    data = export_bundle(split, name="mlp", version="1", classes=3, frozen=frozen)
    return Bundle.from_bytes(data)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return export_mlp()


@pytest.fixture(scope="module")
def bundle_path(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "mlp.bundle"
    path.write_bytes(build_bundle(bundle.manifest, bundle.files))
    return path


# Memory


def test_peak_memory_is_the_process_s_own_and_not_its_parent_s() -> None:
    """getrusage would report this process, with torch loaded, as the peak of a small child."""
    ours = peak_rss_bytes()
    code = "from edge_agent.measuring.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ours > 150 * MIB
    assert MIB < int(done.stdout) < ours / 3


def test_peak_memory_counts_what_was_freed_since() -> None:
    before = peak_rss_bytes()
    block = np.ones(before + 64 * MIB, np.uint8)
    del block
    assert peak_rss_bytes() > before


def fake_system(directory: Path, *, limit: str | None = None, used: int = 0) -> tuple[Path, Path]:
    """A /proc with 100 MiB available, and a cgroup file system with a limit or without."""
    proc, cgroup = directory / "proc", directory / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  102400 kB\n")
    (proc / "self" / "cgroup").write_text("0::/agents/one.service\n")
    if limit is not None:
        group = cgroup / "agents" / "one.service"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
    return proc, cgroup


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, 0, 100 * MIB),
        ("max", 0, 100 * MIB),
        (str(80 * MIB), 30 * MIB, 50 * MIB),
        (str(900 * MIB), 30 * MIB, 100 * MIB),
        (str(80 * MIB), 90 * MIB, 0),
    ],
)
def test_available_memory_is_the_smaller_of_the_machine_s_and_the_service_s(
    tmp_path: Path, limit: str | None, used: int, expected: int
) -> None:
    assert available_bytes(*fake_system(tmp_path, limit=limit, used=used)) == expected


def test_available_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_available_memory_of_this_machine_is_read() -> None:
    available = available_bytes()
    assert available is not None
    assert available > MIB


# Capacity: 4 * 6 bytes a sample, 4 * 5 at the cut, and 8 for a label


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Capacity(largest_batch=1000, limit="all samples")),
        ({"max_batch": 12}, Capacity(largest_batch=12, limit="compute.max_batch")),
        (
            {"max_payload_bytes": 4096 + 28 * 50},
            Capacity(largest_batch=50, limit="mqtt.max_payload_bytes"),
        ),
        (
            {"available_bytes": 1000 + 104 * 70, "pass_bytes": 1000},
            Capacity(largest_batch=70, limit="memory"),
        ),
        (
            {"available_bytes": 500, "pass_bytes": 1000},
            Capacity(largest_batch=0, limit="memory"),
        ),
    ],
)
def test_largest_batch_is_set_by_what_is_tightest(
    bundle: Bundle, changes: dict[str, Any], expected: Capacity
) -> None:
    options: dict[str, Any] = {
        "samples": 1000,
        "available_bytes": None,
        "pass_bytes": MIB,
        "max_payload_bytes": 64 * MIB,
        "max_batch": None,
    }
    assert find_capacity(bundle.manifest, **(options | changes)) == expected


# Time


class CountingBackend:
    """Notes which passes it is asked for."""

    can_backward = True

    def __init__(self) -> None:
        self.passes: list[tuple[str, int, Hashable]] = []

    def forward(self, x: NDArray[Any], *, token: Hashable | None = None) -> None:
        self.passes.append(("forward", len(x), token))

    def backward(
        self, x: NDArray[Any], grad: NDArray[Any], *, token: Hashable | None = None
    ) -> None:
        assert grad.shape == (len(x), 5)
        self.passes.append(("backward", len(x), token))


def test_each_backward_pass_follows_the_forward_pass_of_its_batch(bundle: Bundle) -> None:
    backend: Any = CountingBackend()
    times = time_steps(backend, bundle.manifest, 3, at_least_s=0.002, warm_up=2)
    steps = len(backend.passes) // 2
    expected = [(what, 3, token) for token in range(steps) for what in ("forward", "backward")]
    assert backend.passes == expected
    assert len(times.forward_s) == len(times.backward_cpu_s) == steps - 2 > 1


def test_one_step_is_timed_at_least(bundle: Bundle) -> None:
    backend: Any = CountingBackend()
    assert len(time_steps(backend, bundle.manifest, 1, at_least_s=0.0).forward_s) == 1


def test_frozen_segment_is_timed_forward_only() -> None:
    backend: Any = CountingBackend()
    times = time_steps(backend, export_mlp(frozen=True).manifest, 2, at_least_s=0.0)
    assert {what for what, _, _ in backend.passes} == {"forward"}
    assert times.backward_median_s is None
    assert times.step_median_s == times.forward_median_s


def test_medians_are_of_steps_and_not_of_parts() -> None:
    times = Times(
        forward_s=(1.0, 2.0, 9.0),
        forward_cpu_s=(1.0, 1.0, 1.0),
        backward_s=(5.0, 1.0, 1.0),
        backward_cpu_s=(2.0, 2.0, 3.0),
    )
    assert (times.forward_median_s, times.backward_median_s) == (2.0, 1.0)
    assert (times.step_median_s, times.step_cpu_median_s) == (6.0, 3.0)


# Backends beside each other


@pytest.fixture(scope="module")
def comparison(bundle: Bundle, bundle_path: Path) -> Comparison:
    contenders = list_contenders(bundle)
    return compare_backends(
        bundle_path, contenders, ComputeSettings(), batches=[8, 2], rounds=2, round_s=0.01
    )


@pytest.mark.processes
def test_backends_are_measured_in_fresh_processes_from_small_to_large(
    comparison: Comparison,
) -> None:
    measured = [(result.batch, result.backend) for result in comparison.results]
    assert measured == [(2, "onnxruntime"), (2, "torch"), (8, "onnxruntime"), (8, "torch")]
    for result in comparison.results:
        assert min(result.times.forward_s + result.times.backward_s) > 0
        assert len(result.times.forward_s) >= 2
    onnx, torch = comparison.find("onnxruntime", 8), comparison.find("torch", 8)
    assert onnx is not None
    assert torch is not None
    assert onnx.peak_rss_bytes < torch.peak_rss_bytes < peak_rss_bytes()
    assert all(seconds > 0 for seconds in comparison.start_s.values())


@pytest.mark.processes
def test_notes_give_the_ratio_of_both(comparison: Comparison) -> None:
    notes = list(comparison_notes(comparison))
    assert any(note.startswith("onnxruntime: ") and "s from the start" in note for note in notes)
    assert [note[:9] for note in notes if "times the time of PyTorch" in note] == [
        "batch 2: ",
        "batch 8: ",
    ]


@pytest.mark.processes
def test_what_a_measuring_process_says_is_passed_on(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bundle"
    files = {**bundle.files, CLIENT_BACKWARD: b"no graph"}
    path.write_bytes(build_bundle(bundle.manifest, files))
    onnx = list_contenders(bundle)[:1]
    with pytest.raises(ModelError, match=r"onnxruntime: client_backward\.onnx: "):
        compare_backends(path, onnx, ComputeSettings(), batches=[1])


def test_contender_that_cannot_run_says_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edge_agent.measuring.compare.find_spec",
        lambda name: None if name == "torch" else object(),
    )
    files = {name: data for name, data in bundle.files.items() if name != CLIENT_BACKWARD}
    without = dataclasses.replace(bundle, files=files)
    problems = {c.name: c.problem for c in list_contenders(without)}
    assert problems == {
        "onnxruntime": f"the bundle has no {CLIENT_BACKWARD}",
        "torch": "not installed",
    }
    frozen = list_contenders(export_mlp(frozen=True))
    assert [(c.backward, c.problem) for c in frozen] == [("none", ""), ("none", "not installed")]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (268435456, "268 MB"), (5.5e12, "5500 GB")],
)
def test_bytes_are_written_with_a_decimal_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.00012345, "0.123 ms"), (0.0125, "12.5 ms"), (1.5, "1500 ms")],
)
def test_times_are_written_in_milliseconds(seconds: float | None, text: str) -> None:
    assert format_milliseconds(seconds) == text
