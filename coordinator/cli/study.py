"""``coordinator study``: train what the policies make of one fleet, and compare."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.grouped import grouped
from coordinator.cli.study_options import (
    DataOptions,
    FleetsOptions,
    TrainingsOptions,
    build_settings,
)
from wire.command import stop_on_signals
from wire.exit_codes import ExitCode

if TYPE_CHECKING:
    from coordinator.study.output import StudyDocument
    from coordinator.study.settings import StudySettings


@grouped
def study(
    data: DataOptions,
    fleets: FleetsOptions,
    trainings: TrainingsOptions,
    quick: Annotated[
        bool, typer.Option("--quick", help="The digits, one kind of fleet, 3 seeds: seconds.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Trainings at a time, each a process with one thread.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. (runs/study or runs/study-quick)")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train the undivided network and what each policy makes of a fleet, in process, and compare.

    Writes results.csv, results.json and report.html. The same command again goes on with what is
    missing, also after it was killed. Ends with 130 if it was stopped before its end.

    Example: coordinator study --devices 16,128 --schemes severe --samples 12000 --jobs 2
    """
    settings = build_settings(data, fleets, trainings, quick=quick)
    folder = out or Path("runs/study-quick" if quick else "runs/study")
    document = _run(settings, folder, jobs, as_json=as_json)
    if not document.is_complete:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _run(settings: StudySettings, folder: Path, jobs: int, *, as_json: bool) -> StudyDocument:
    from coordinator.study.output import as_json as document_as_json
    from coordinator.study.progress import StudyProgress
    from coordinator.study.study import run_study
    from coordinator.study.tables import print_groups

    stopped = threading.Event()
    stop_on_signals(stopped.set)
    stream = sys.stderr if as_json else sys.stdout
    with StudyProgress(stream) as progress:
        document = run_study(settings, folder, progress, jobs=jobs, should_stop=stopped.is_set)
    if as_json:
        typer.echo(json.dumps(document_as_json(document)))
    else:
        print_groups(sys.stdout, document, folder)
    return document
