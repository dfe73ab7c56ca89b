"""The study as files for programs: results.csv (a line per cell) and results.json (all of it)."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from coordinator.study.results import CellResult
from coordinator.study.settings import StudySettings
from coordinator.study.summary import (
    Finding,
    Group,
    largest_gain_over_fls,
    most_time_saved,
    summarise,
)
from wire.errors import ConfigError

CSV_FILE = "results.csv"
JSON_FILE = "results.json"
_LIBRARIES = ("torch", "numpy", "scipy")

_COLUMNS = (
    "method",
    "scheme",
    "classes_per_device",
    "alpha",
    "devices",
    "stragglers",
    "seed",
    "epochs",
    "accuracy",
    "steps",
    "time_s",
    "straggler_steps",
    "deviation_mean",
    "deviation_p95",
    "trained_s",
)


class StudyDocument(msgspec.Struct, frozen=True, kw_only=True):
    """All that a finished or stopped study says. ``cells`` is how many there will be."""

    settings: StudySettings
    cells: int
    results: tuple[CellResult, ...]
    groups: tuple[Group, ...]
    largest_gain_over_fls: Finding | None
    most_time_saved: Finding | None
    environment: dict[str, str]

    @property
    def is_complete(self) -> bool:
        return len(self.results) == self.cells


def build_document(
    settings: StudySettings, cells: int, results: Sequence[CellResult]
) -> StudyDocument:
    """Sum the finished cells up."""
    groups = summarise(results)
    return StudyDocument(
        settings=settings,
        cells=cells,
        results=tuple(results),
        groups=tuple(groups),
        largest_gain_over_fls=largest_gain_over_fls(groups),
        most_time_saved=most_time_saved(groups),
        environment=_environment(),
    )


def _environment() -> dict[str, str]:
    libraries = {name: version(name) for name in _LIBRARIES}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    return {"python": platform.python_version(), **libraries, "machine": machine}


def as_json(document: StudyDocument) -> dict[str, Any]:
    """For ``results.json`` and ``--json``."""
    builtins: dict[str, Any] = msgspec.to_builtins(document)
    return {"complete": document.is_complete, "finished": len(document.results), **builtins}


def write_files(directory: Path, document: StudyDocument) -> None:
    """Write both files; raise ConfigError naming one that cannot be written."""
    text = msgspec.json.format(msgspec.json.encode(as_json(document)), indent=1)
    write_whole(directory / JSON_FILE, text + b"\n")
    write_whole(directory / CSV_FILE, _csv(document).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that others see as it was or as it is, and never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as exc:
        raise ConfigError(f"expected a writable file ({exc.strerror})", source=path) from exc


def _csv(document: StudyDocument) -> str:
    lines = _Lines()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in document.results:
        writer.writerow([_cell_text(value) for value in _row(result)])
    return "".join(lines.lines)


class _Lines:
    """What csv.writer writes to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def _row(result: CellResult) -> tuple[object, ...]:
    cell, fleet = result.cell, result.cell.fleet
    scheme = None if fleet is None else fleet.scheme
    is_dirichlet = scheme is not None and scheme.classes_per_device is not None
    return (
        cell.method.name,
        None if scheme is None else scheme.name,
        scheme.classes_per_device if is_dirichlet and scheme else None,
        scheme.alpha if is_dirichlet and scheme else None,
        None if fleet is None else fleet.devices,
        None if fleet is None else fleet.stragglers,
        cell.seed,
        len(result.test_accuracies),
        result.accuracy,
        result.steps,
        result.time_s,
        result.straggler_steps,
        result.deviation_mean,
        result.deviation_p95,
        round(result.trained_s, 3),
    )


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
