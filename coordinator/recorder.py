"""What a run writes down for people and for later simulation: steps, epochs, the summary.

``steps.jsonl`` in the run's folder has one line per step: who contributed which range, loss,
deviation, time. A resumed run cuts it back to the checkpoint first, so each step stands once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

STEPS_FILE = "steps.jsonl"
SUMMARY_FILE = "summary.json"


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One applied step. ``slots`` are ranges [device, offset, count] in batch order.

    Offsets are positions in the device's order of the epoch, which the run's policy decides:
    ``edge_agent.worker.order_samples``.

    ``deviation`` is the L1 distance between the step's class mix and the pooled one.
    ``delta`` is LDS's delay weight. Times in seconds.
    """

    step: int
    epoch: int
    samples: int
    loss: float
    accuracy: float
    deviation: float
    duration_s: float
    slowest: str | None
    slots: tuple[tuple[str, int, int], ...]
    delta: float | None = None


class EpochRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch: what was held, trained and missed, and the test result behind it."""

    epoch: int
    step: int
    samples: int
    trained: int
    missed: dict[str, int]
    test_loss: float | None = None
    test_accuracy: float | None = None


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One device over the whole run.

    ``delay_s`` is what a typical contribution takes, ``fixed_s`` and ``per_sample_s`` its parts:
    forward and backward phase together, as measured. ``max_batch`` is the device's own limit.
    """

    device: str
    samples_held: int
    samples_trained: int
    samples_missed: int
    missed_deadlines: int
    delay_s: float | None
    bytes_up: int
    bytes_down: int
    refused: dict[str, int]
    label_counts: tuple[int, ...] = ()
    max_batch: int | None = None
    fixed_s: float | None = None
    per_sample_s: float | None = None


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A run's result. ``samples_held`` is per epoch; trained and missed are over all epochs."""

    run: str
    network: str
    cut_layer: str
    policy: str
    precision: str
    seed: int
    global_batch: int
    epochs: int
    steps: int
    test_accuracy: float | None
    test_loss: float | None
    samples_held: int
    samples_trained: int
    samples_missed: int
    train_s: float
    steps_per_s: float
    bytes_up: int
    bytes_down: int
    mean_deviation: float
    refused: dict[str, int]
    broker: str
    completed: bool
    devices: tuple[DeviceSummary, ...]
    epoch_results: tuple[EpochRecord, ...]


class StepLog:
    """The file of steps, and the totals that the summary needs."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STEPS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        self.steps = 0
        self._deviation_sum = 0.0

    def cut_back(self, step: int) -> None:
        """Keep only steps up to ``step``: what came after the checkpoint is trained again."""
        kept = [record for record in read_steps(self._path) if record.step <= step]
        self._file.close()
        self._path.write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in kept))
        self._file = self._path.open("ab")
        self.steps = len(kept)
        self._deviation_sum = sum(record.deviation for record in kept)

    def add(self, record: StepRecord) -> None:
        """Write a step down where others see it at once: that takes microseconds."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        self.steps += 1
        self._deviation_sum += record.deviation

    def close(self) -> None:
        self._file.close()

    @property
    def mean_deviation(self) -> float:
        return self._deviation_sum / self.steps if self.steps else 0.0


def read_steps(path: Path) -> list[StepRecord]:
    """Read a run's steps; a line that a crash left half written ends the list."""
    records: list[StepRecord] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return records
    decoder = msgspec.json.Decoder(StepRecord)
    for line in lines:
        try:
            records.append(decoder.decode(line))
        except msgspec.DecodeError:
            break
    return records


def write_summary(directory: Path, summary: RunSummary) -> Path:
    """Write ``summary.json``."""
    path = directory / SUMMARY_FILE
    document: Any = msgspec.to_builtins(summary)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    return path
