"""A run's progress as text: what stands on one line of a terminal or a log. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.recorder import EpochRecord, StepRecord
from coordinator.reporting import Progress
from coordinator.tables import NONE, describe_names, format_rate, format_seconds, format_share

MOST_WAITED_FOR = 3


@dataclass(slots=True)
class EpochTotals:
    """Sums over the steps of the epoch so far; means are weighted with samples."""

    samples: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    deviation_sum: float = 0.0

    def add(self, record: StepRecord) -> None:
        self.samples += record.samples
        self.steps += 1
        self.loss_sum += record.loss * record.samples
        self.correct += record.accuracy * record.samples
        self.deviation_sum += record.deviation

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.samples if self.samples else None

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.samples if self.samples else None

    @property
    def deviation(self) -> float | None:
        return self.deviation_sum / self.steps if self.steps else None


def describe_waiting(progress: Progress) -> str | None:
    """Which devices the run cannot go on without, or None while it trains."""
    if progress.epoch >= progress.epochs:
        return None
    if progress.samples == 0:
        if progress.ready < progress.wanted:
            return f"waiting for devices: {progress.ready} of {progress.wanted}"
        return f"starting with {progress.ready} devices"
    if progress.ready == 0:
        return "waiting for devices: all have left"
    return None


def format_status(progress: Progress) -> str:
    """One short line for ``systemctl status``."""
    if progress.epoch >= progress.epochs:
        return f"all {progress.epochs} epochs are trained"
    waiting = describe_waiting(progress)
    if waiting is not None:
        return waiting
    where = f"epoch {progress.epoch + 1}/{progress.epochs}, step {progress.step}"
    return f"{where}, {progress.ready} devices ready"


def describe_figures(progress: Progress, totals: EpochTotals) -> str:
    """The figures of the last steps: loss, accuracy, deviation, speed.

    The accuracy is that of the last test, and before there is one that of the epoch's batches.
    """
    parts = [f"step {progress.step:,}", f"loss {_decimals(progress.loss, 3)}"]
    parts.append(_accuracy(progress.test_accuracy, totals))
    parts.append(f"deviation {_decimals(progress.deviation, 2)}")
    parts.append(format_rate(progress.steps_per_s))
    return "  ".join(parts)


def _accuracy(test_accuracy: float | None, totals: EpochTotals) -> str:
    if test_accuracy is None:
        return f"train accuracy {format_share(totals.accuracy)}"
    return f"test accuracy {format_share(test_accuracy)}"


def describe_waited_for(progress: Progress) -> str:
    """Whom the step under way waits for, and how many devices there are."""
    ready = f"{progress.ready} of {max(progress.wanted, progress.ready)} devices ready"
    if not progress.waited_for:
        return ready
    return f"{ready}  waits for {describe_names(progress.waited_for, MOST_WAITED_FOR)}"


def describe_epoch(record: EpochRecord, totals: EpochTotals, *, epochs: int, seconds: float) -> str:
    """One line on an epoch that is over; ``epochs`` is 0 where it is not known."""
    missed = sum(record.missed.values())
    parts = [
        f"epoch {record.epoch + 1}/{epochs}" if epochs else f"epoch {record.epoch + 1}",
        f"{record.trained:,} samples" + (f" ({missed:,} missed)" if missed else ""),
        f"loss {_decimals(totals.loss, 3)}",
        _accuracy(record.test_accuracy, totals),
        f"deviation {_decimals(totals.deviation, 2)}",
        format_seconds(seconds),
    ]
    return "  ".join(parts)


def _decimals(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
