"""What a finished cell says, and the folder that keeps one file for each.

A cell's file appears whole or not at all, so a study that was killed goes on with what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from coordinator.study.cells import Cell, cell_file_name
from coordinator.study.settings import TrainingSettings
from wire.errors import ConfigError

CELLS_FOLDER = "cells"


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished cell. Accuracies are shares; tuples have an entry per epoch.

    ``time_s`` and ``epoch_end_s`` are modelled seconds, None for the undivided network, which has
    no devices. ``train_losses`` are None where a training has diverged. ``trained_s`` is what the
    training took here, in seconds of real time; cells that share a training share it.
    """

    cell: Cell
    test_accuracies: tuple[float, ...]
    train_losses: tuple[float | None, ...]
    steps: int
    epoch_end_s: tuple[float, ...] | None
    deviation_mean: float
    deviation_p95: float
    straggler_steps: int | None
    trained_s: float

    @property
    def accuracy(self) -> float:
        """On the test samples, after the last epoch."""
        return self.test_accuracies[-1]

    @property
    def time_s(self) -> float | None:
        """Modelled time of the whole training."""
        return None if self.epoch_end_s is None else self.epoch_end_s[-1]


class ResultFolder:
    """One file per finished cell of studies with these training settings."""

    def __init__(self, directory: Path, training: TrainingSettings) -> None:
        self._cells = directory / CELLS_FOLDER
        self._training = training
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"expected a writable folder ({exc.strerror})", source=f"--out {directory}"
            ) from exc

    def read(self, cells: Iterable[Cell]) -> dict[Cell, CellResult]:
        """The cells that are finished; a file that cannot be read counts as missing."""
        found = {}
        for cell in cells:
            result = self._read(cell)
            if result is not None:
                found[cell] = result
        return found

    def _read(self, cell: Cell) -> CellResult | None:
        try:
            raw = (self._cells / cell_file_name(self._training, cell)).read_bytes()
            result = msgspec.json.decode(raw, type=CellResult)
        except (OSError, msgspec.DecodeError):
            return None
        return result if result.cell == cell else None

    def write(self, result: CellResult) -> None:
        """Write the cell's file beside its place, flush it to disk and rename it."""
        path = self._cells / cell_file_name(self._training, result.cell)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise ConfigError(f"expected a writable file ({exc.strerror})", source=path) from exc


def in_order(cells: Iterable[Cell], found: Mapping[Cell, CellResult]) -> list[CellResult]:
    """The finished ones of these cells."""
    return [found[cell] for cell in cells if cell in found]
