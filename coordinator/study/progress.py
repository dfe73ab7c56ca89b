"""Shows how far a study is: a bar on a terminal, a line for each training elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Self, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from coordinator.study.results import CellResult
from coordinator.tables import build_console, format_seconds, format_share

Clock = Callable[[], float]


class StudyProgress:
    """Counts trainings. Used as a context manager; notes stay above the bar."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._console = build_console(stream)
        self._clock = clock
        self._begun_s = clock()
        self._total = 0
        self._done = 0
        self._to_do = 0
        self._bar: Progress | None = None
        self._task = None
        if stream.isatty() and not self._console.is_dumb_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text))

    def begin(self, *, total: int, missing: int) -> None:
        """Trainings in all, and how many are not there yet; now they begin."""
        self._begun_s = self._clock()
        self._total, self._done, self._to_do = total, total - missing, missing
        if self._done:
            self.note(f"{self._done} of {total} trainings are there; going on with the rest")
        if self._bar is not None:
            self._bar.add_task("training", total=total, completed=self._done)

    def finished(self, title: str, results: Iterable[CellResult]) -> None:
        """One training is over."""
        self._done += 1
        line = f"[{self._done}/{self._total}] {title}: {_outcome(list(results))}"
        if self._bar is None:
            self.note(f"{line}{self._left_text()}")
            return
        self.note(line)
        [task] = self._bar.task_ids
        self._bar.update(task, completed=self._done, description=self._left_text().strip(", "))

    def _left_text(self) -> str:
        """Time that the rest will take if it goes on like this."""
        left = self._total - self._done
        done_here = self._to_do - left
        if not left or not done_here:
            return ""
        seconds = (self._clock() - self._begun_s) / done_here * left
        return f", about {format_seconds(seconds)} left"


def _outcome(results: list[CellResult]) -> str:
    accuracy = format_share(results[0].accuracy)
    return f"accuracy {accuracy} after {format_seconds(results[0].trained_s)}"
