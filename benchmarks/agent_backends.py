"""What a device's part of a step costs without PyTorch: ONNX Runtime against PyTorch.

For each client segment a bundle is exported as for a run, and both backends of the agent run it
forward and backward, each in a fresh process with one thread, in turns. Times are medians over
steps; memory is the peak of the whole process, with batches measured from small to large.

    python benchmarks/agent_backends.py --json results.json
    python benchmarks/agent_backends.py --quick --segments cnn1d --batches 8    # a trial
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import UsageMeter, describe_machine

from edge_agent.config import ComputeSettings
from edge_agent.measuring.compare import (
    DEFAULT_BATCHES,
    Comparison,
    Result,
    compare_backends,
    list_contenders,
)
from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from wire.bundle import Bundle

CLASSES = 10
ROUNDS, ROUND_S = 7, 0.5
QUICK_ROUNDS, QUICK_ROUND_S = 1, 0.05
MEMORY_TARGET = 0.5  # of PyTorch's, at MEMORY_BATCH
MEMORY_BATCH = 8

HEADER = (
    "| segment | batch | ONNX Runtime, ms (forward + backward) | PyTorch, ms (forward + backward) "
    "| time | cpu time | ONNX Runtime, MB | PyTorch, MB | memory |"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A client segment, and how many times PyTorch's time it may take."""

    name: str
    title: str
    network: str
    cut: str
    sample_shape: tuple[int, ...]
    target: float


SEGMENTS = {
    segment.name: segment
    for segment in (
        Segment(
            name="cnn",
            title="CNN 28x28, cut after block 2",
            network="cnn2d",
            cut="block2",
            sample_shape=(1, 28, 28),
            target=1.3,
        ),
        Segment(
            name="cnn1d",
            title="1-D CNN 6x128, cut after block 1",
            network="cnn1d",
            cut="block1",
            sample_shape=(6, 128),
            target=1.0,
        ),
        Segment(
            name="resnet",
            title="ResNet-18 32x32, cut after layer 1",
            network="resnet18",
            cut="layer1",
            sample_shape=(3, 32, 32),
            target=1.3,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both backends on one segment and batch size."""

    segment: Segment
    onnx: Result
    torch: Result

    @property
    def time_ratio(self) -> float:
        """ONNX Runtime's time for a step over PyTorch's."""
        return self.onnx.times.step_median_s / self.torch.times.step_median_s

    @property
    def cpu_ratio(self) -> float:
        """The same in processor time, which other processes disturb less."""
        return self.onnx.times.step_cpu_median_s / self.torch.times.step_cpu_median_s

    @property
    def memory_ratio(self) -> float:
        """ONNX Runtime's peak memory over PyTorch's."""
        return self.onnx.peak_rss_bytes / self.torch.peak_rss_bytes

    def to_json(self) -> dict[str, Any]:
        """All numbers; times in seconds, memory in bytes."""
        return {
            "segment": self.segment.name,
            "batch": self.onnx.batch,
            "onnxruntime": self.onnx.to_json(),
            "torch": self.torch.to_json(),
            "time_ratio": self.time_ratio,
            "cpu_ratio": self.cpu_ratio,
            "memory_ratio": self.memory_ratio,
            "target": self.segment.target,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A segment's rows, and how many cores other processes kept busy meanwhile."""

    segment: Segment
    rows: tuple[Row, ...]
    start_s: dict[str, float]
    others_cores: float


def main() -> int:
    """Measure and print; the exit code says nothing about the targets."""
    options = _parse_options()
    rounds, round_s = (QUICK_ROUNDS, QUICK_ROUND_S) if options.quick else (options.rounds, ROUND_S)
    facts = {"command": " ".join(sys.argv), "machine": describe_machine(), "began": _now()}
    measured = []
    with tempfile.TemporaryDirectory(prefix="agent-backends-") as folder:
        for name in options.segments:
            print(f"{name} ...", file=sys.stderr, flush=True)
            path = Path(folder) / f"{name}.bundle"
            measured.append(measure_segment(SEGMENTS[name], path, options.batches, rounds, round_s))
    for fact, value in facts.items():
        print(f"{fact}: {value}")
    for line in report_lines(measured):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(facts | build_document(measured), indent=2))
    return 0


def measure_segment(
    segment: Segment, path: Path, batches: list[int], rounds: int, round_s: float
) -> Measured:
    """Export a segment to ``path`` and measure both backends on it."""
    network = build_network(
        segment.network, input_shape=segment.sample_shape, classes=CLASSES, seed=0
    )
    split = split_network(network, segment.cut, segment.sample_shape)
    path.write_bytes(export_bundle(split, name=segment.name, version="1", classes=CLASSES))
    contenders = list_contenders(Bundle.from_bytes(path.read_bytes()))
    meter = UsageMeter({"benchmark": [os.getpid()]})
    children_s = _children_s()
    comparison = compare_backends(
        path,
        contenders,
        ComputeSettings(threads=1),
        batches=batches,
        rounds=rounds,
        round_s=round_s,
    )
    usage = meter.stop()
    others_s = usage.others_s - (_children_s() - children_s)
    return Measured(
        segment=segment,
        rows=tuple(_rows(segment, comparison)),
        start_s=comparison.start_s,
        others_cores=max(0.0, others_s) / usage.elapsed_s,
    )


def report_lines(measured: list[Measured]) -> Iterator[str]:
    """A table in Markdown, then what the targets come to."""
    yield ""
    yield HEADER
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for one in measured:
        yield from map(_table_line, one.rows)
    yield ""
    for one in measured:
        yield from _verdict_lines(one)


def build_document(measured: list[Measured]) -> dict[str, Any]:
    """The same as data."""
    return {
        "results": [row.to_json() for one in measured for row in one.rows],
        "start_s": {one.segment.name: one.start_s for one in measured},
        "others_cores": {one.segment.name: one.others_cores for one in measured},
    }


def _rows(segment: Segment, comparison: Comparison) -> Iterator[Row]:
    for batch in sorted({result.batch for result in comparison.results}):
        onnx, torch = (comparison.find(name, batch) for name in ("onnxruntime", "torch"))
        if onnx is None or torch is None:
            raise SystemExit("expected both backends to be installed: pip install '.[agent-torch]'")
        yield Row(segment=segment, onnx=onnx, torch=torch)


def _table_line(row: Row) -> str:
    cells = (
        row.segment.title,
        str(row.onnx.batch),
        _milliseconds(row.onnx),
        _milliseconds(row.torch),
        f"{row.time_ratio:.2f}",
        f"{row.cpu_ratio:.2f}",
        f"{row.onnx.peak_rss_bytes / 1e6:.0f}",
        f"{row.torch.peak_rss_bytes / 1e6:.0f}",
        f"{row.memory_ratio:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _milliseconds(result: Result) -> str:
    times = result.times
    backward_s = times.backward_median_s
    assert backward_s is not None, "every segment here trains"
    step, forward, backward = (
        f"{1e3 * seconds:.3g}"
        for seconds in (times.step_median_s, times.forward_median_s, backward_s)
    )
    return f"{step} ({forward} + {backward})"


def _verdict_lines(one: Measured) -> Iterator[str]:
    segment = one.segment
    ratios = ", ".join(f"{row.time_ratio:.2f} at batch {row.onnx.batch}" for row in one.rows)
    yield f"{segment.name}: time {ratios} (target {segment.target})"
    for row in one.rows:
        if row.onnx.batch == MEMORY_BATCH:
            yield f"{segment.name}: memory {row.memory_ratio:.2f} (target {MEMORY_TARGET})"
    starts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in one.start_s.items())
    yield f"{segment.name}: start {starts}; other processes used {one.others_cores:.2f} cores"


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segments", nargs="+", choices=[*SEGMENTS], default=[*SEGMENTS])
    parser.add_argument("--batches", nargs="+", type=int, default=[*DEFAULT_BATCHES])
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="turns of each backend (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--quick", action="store_true", help="one short turn each: a trial")
    options = parser.parse_args()
    if min(options.batches) < 1 or options.rounds < 1:
        parser.error("expected --batches and --rounds above 0")
    return options


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
