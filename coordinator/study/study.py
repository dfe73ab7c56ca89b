"""The study as a whole: what is missing is trained, then all of it is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from coordinator.study.cells import Cell, Training, all_cells, all_trainings
from coordinator.study.data import StudyData, load_study_data
from coordinator.study.execute import expect_all_fleets_possible
from coordinator.study.output import StudyDocument, build_document, write_files, write_whole
from coordinator.study.page import render_page
from coordinator.study.progress import StudyProgress
from coordinator.study.results import CellResult, ResultFolder, in_order
from coordinator.study.runner import Finished, Task, run_here, run_in_processes
from coordinator.study.settings import StudySettings
from coordinator.study.tables import REPORT_FILE
from coordinator.study.training import build


def run_study(
    settings: StudySettings,
    directory: Path,
    progress: StudyProgress,
    *,
    jobs: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> StudyDocument:
    """Train what the folder does not hold yet; write results.csv, results.json, report.html.

    Asked to stop, it writes down what is finished. Raises ConfigError or ModelError for settings,
    data or a network that cannot be used, before the first training.
    """
    cells = list(dict.fromkeys(all_cells(settings)))
    trainings = all_trainings(cells)
    data = load_study_data(settings.training.data)
    expect_all_fleets_possible(trainings, settings.training, data)
    build(settings.training, data, seed=0)
    folder = ResultFolder(directory, settings.training)
    found = folder.read(cells)
    tasks = [Task(t, _known(t, found)) for t in trainings if not _is_finished(t, found)]
    progress.begin(total=len(trainings), missing=len(tasks))
    for task, results in _run(tasks, settings, data, jobs, should_stop):
        for result in results:
            folder.write(result)
            found[result.cell] = result
        progress.finished(task.training.title, results)
    document = build_document(settings, len(cells), in_order(cells, found))
    write_files(directory, document)
    write_whole(directory / REPORT_FILE, render_page(document).encode())
    return document


def _is_finished(training: Training, found: Mapping[Cell, CellResult]) -> bool:
    return all(cell in found for cell in training.cells)


def _known(training: Training, found: Mapping[Cell, CellResult]) -> CellResult | None:
    """A finished cell whose training the others can take."""
    return next((found[cell] for cell in training.cells if cell in found), None)


def _run(
    tasks: list[Task],
    settings: StudySettings,
    data: StudyData,
    jobs: int,
    should_stop: Callable[[], bool],
) -> Iterator[Finished]:
    jobs = min(jobs, len(tasks))
    if jobs > 1:
        return run_in_processes(tasks, settings.training, jobs, should_stop)
    return run_here(tasks, settings.training, data, should_stop)
