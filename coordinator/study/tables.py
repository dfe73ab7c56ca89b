"""A study's groups as a table on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from rich.text import Text

from coordinator.study.output import StudyDocument
from coordinator.study.summary import Group, Interval
from coordinator.tables import NONE, build_console, new_table

REPORT_FILE = "report.html"


def print_groups(stream: TextIO, document: StudyDocument, folder: Path) -> None:
    """Print every group, and where the files are."""
    console = build_console(stream)
    table = new_table(
        ["method", "fleet"],
        ["seeds", "accuracy, %", "time to UGS's", "deviation", "steps"],
    )
    for group in document.groups:
        table.add_row(
            Text(group.method.label),
            Text(fleet_text(group)),
            str(len(group.seeds)),
            percent_text(group.accuracy),
            interval_text(group.time_ratio, digits=2),
            interval_text(group.deviation, digits=2),
            f"{group.steps.mean:,.0f}",
        )
    console.print(table)
    if not document.is_complete:
        console.print(
            f"stopped: {len(document.results)} of {document.cells} cells are finished; the same "
            "command goes on with the rest"
        )
    console.print(f"results: {folder / REPORT_FILE}", soft_wrap=True)


def fleet_text(group: Group) -> str:
    """Scheme, devices and slow devices, in short."""
    fleet = group.fleet
    if fleet is None:
        return "all samples in one place"
    return f"{fleet.scheme.name}, {fleet.devices} devices, {fleet.stragglers:.0%} slow"


def percent_text(value: Interval | None, digits: int = 1) -> str:
    """A share with its interval as per cent: ``89.1 +- 0.4``."""
    if value is None:
        return NONE
    half = value.half_width
    return _text(100 * value.mean, None if half is None else 100 * half, digits)


def interval_text(value: Interval | None, digits: int) -> str:
    """A mean with half the width of its interval."""
    return NONE if value is None else _text(value.mean, value.half_width, digits)


def _text(mean: float, half_width: float | None, digits: int) -> str:
    if half_width is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} \u00b1 {half_width:.{digits}f}"
