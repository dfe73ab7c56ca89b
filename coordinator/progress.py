"""Shows a run while it trains: live on a terminal, as plain lines in a pipe, as JSON lines.

Called from the run's one thread, and built to cost it nothing to speak of: steps are only added
up, and the display is drawn when the run reports its progress, a few times a second. Output that
fails (a closed pipe) goes silent; it never ends a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_text
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self, TextIO

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.progress_text import (
    EpochTotals,
    describe_epoch,
    describe_figures,
    describe_waited_for,
    describe_waiting,
)
from coordinator.recorder import EpochRecord, RunSummary, StepRecord
from coordinator.reporting import Progress, Reporter
from coordinator.tables import build_console, format_share, print_summary, printable

REFRESH_S = 1 / 8
LINE_EVERY_S = 5.0
WAITING_LINE_EVERY_S = 1.0  # devices of a large fleet come in faster than anybody reads
STALLED_LINE_EVERY_S = 60.0
JSON_EVERY_S = 1.0
_NO_DEVICES_YET = "waiting for devices"

Clock = Callable[[], float]


class _ReporterBase:
    """What the reporters share: sums of the epoch, its time, and a stream that may break."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock
        self._totals = EpochTotals()
        self._epoch_since_s: float | None = None
        self._epochs = 0
        self._is_broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def step(self, record: StepRecord) -> None:
        """Add the step to the epoch's sums; nothing is drawn."""
        self._totals.add(record)

    def _see(self, progress: Progress) -> float:
        """Note where the run is; returns the time."""
        now_s = self._clock()
        self._epochs = progress.epochs
        if self._epoch_since_s is None and progress.samples:
            self._epoch_since_s = now_s
        return now_s

    def _close_epoch(self, record: EpochRecord) -> tuple[str, EpochTotals]:
        """Line and sums of the epoch that is over; the next begins now."""
        now_s = self._clock()
        since_s = now_s if self._epoch_since_s is None else self._epoch_since_s
        totals, self._totals, self._epoch_since_s = self._totals, EpochTotals(), now_s
        line = describe_epoch(record, totals, epochs=self._epochs, seconds=now_s - since_s)
        return line, totals

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let a reader who has gone away not end the training."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the file was closed
            self._is_broken = True
            _discard_output(self._stream)

    def _write_line(self, text: str) -> None:
        if self._is_broken:
            return
        with self._writing():
            self._stream.write(text + "\n")
            self._stream.flush()


def _discard_output(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class PlainReporter(_ReporterBase):
    """Lines without control characters: one per epoch, and one in 5 s while it runs."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._line_s = float("-inf")
        self._last: object = None

    def note(self, text: str) -> None:
        """Print the note."""
        self._write_line(printable(text))

    def progress(self, progress: Progress) -> None:
        """Print a line if it is time for one."""
        now_s = self._see(progress)
        if progress.epoch >= progress.epochs:
            return
        waiting = describe_waiting(progress)
        state = waiting or (progress.step, progress.waited_for)
        every_s = WAITING_LINE_EVERY_S if waiting else LINE_EVERY_S
        if now_s - self._line_s < (STALLED_LINE_EVERY_S if state == self._last else every_s):
            return
        self._line_s, self._last = now_s, state
        self._write_line(waiting or self._progress_line(progress))

    def epoch(self, record: EpochRecord) -> None:
        """Print the epoch's line."""
        line, _ = self._close_epoch(record)
        self._line_s = self._clock()
        self._write_line(line)

    def finish(self, summary: RunSummary) -> None:
        """Print the summary's tables."""
        if self._is_broken:
            return
        with self._writing():
            print_summary(build_console(self._stream), summary)
            self._stream.flush()

    def _progress_line(self, progress: Progress) -> str:
        share = format_share(progress.trained / progress.samples)
        return (
            f"epoch {progress.epoch + 1}/{progress.epochs}  {share}  "
            f"{describe_figures(progress, self._totals)}  {describe_waited_for(progress)}"
        )


class JsonReporter(_ReporterBase):
    """One JSON object per line, each with an ``event``; progress at most once a second."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._line_s = float("-inf")

    def note(self, text: str) -> None:
        """Write a ``note``."""
        self._write("note", {"text": text})

    def progress(self, progress: Progress) -> None:
        """Write a ``progress`` if the last one is a second old."""
        now_s = self._see(progress)
        if now_s - self._line_s >= JSON_EVERY_S:
            self._line_s = now_s
            self._write("progress", dataclasses.asdict(progress))

    def epoch(self, record: EpochRecord) -> None:
        """Write an ``epoch``, with the means of its steps."""
        _, totals = self._close_epoch(record)
        means = {
            "train_loss": totals.loss,
            "train_accuracy": totals.accuracy,
            "mean_deviation": totals.deviation,
        }
        self._write("epoch", msgspec.to_builtins(record) | means)

    def finish(self, summary: RunSummary) -> None:
        """Write the ``summary``."""
        self._write("summary", msgspec.to_builtins(summary))

    def _write(self, event: str, document: dict[str, Any]) -> None:
        self._write_line(json_text.dumps({"event": event} | document))


class TerminalReporter(_ReporterBase):
    """A display of three lines that stays below notes, log lines and finished epochs."""

    def __init__(
        self, stream: TextIO, clock: Clock = time.monotonic, console: Console | None = None
    ) -> None:
        super().__init__(stream, clock)
        self._console = console or build_console(stream)
        self._drawn_s = float("-inf")
        self._exits = contextlib.ExitStack()
        self._live = Live(
            Text(_NO_DEVICES_YET),
            console=self._console,
            auto_refresh=False,  # no thread of its own: the run's reports draw it
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        self._exits.enter_context(self._live)
        # A second Ctrl-C ends the process at once, and nobody would give the cursor back.
        self._console.show_cursor(True)
        if sys.stderr.isatty():
            self._exits.enter_context(_logs_above_display())
        self._live.refresh()
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._writing():
            self._exits.close()

    def note(self, text: str) -> None:
        """Print the note above the display."""
        self._print(Text(printable(text)))

    def progress(self, progress: Progress) -> None:
        """Draw the display, unless that was done a moment ago."""
        now_s = self._see(progress)
        if now_s - self._drawn_s < REFRESH_S or self._is_broken:
            return
        self._drawn_s = now_s
        with self._writing():
            self._live.update(render_progress(progress, self._totals), refresh=True)

    def epoch(self, record: EpochRecord) -> None:
        """Print the epoch's line above the display."""
        line, _ = self._close_epoch(record)
        self._print(Text(line))

    def finish(self, summary: RunSummary) -> None:
        """Take the display away and print the summary's tables."""
        if self._is_broken:
            return
        with self._writing():
            self._live.update(Text(""), refresh=True)
            self._live.stop()
            print_summary(self._console, summary)

    def _print(self, renderable: RenderableType) -> None:
        if not self._is_broken:
            with self._writing():
                self._console.print(renderable)


def render_progress(progress: Progress, totals: EpochTotals) -> RenderableType:
    """The display: the epoch's bar, the figures, whom the run waits for."""
    waiting = describe_waiting(progress)
    if waiting is not None:
        return Text(waiting, style="yellow")
    if progress.epoch >= progress.epochs:
        return Text("writing the run down")
    row = Table.grid(padding=(0, 2))
    for _ in range(4):
        row.add_column(no_wrap=True)
    row.add_row(
        Text(f"epoch {progress.epoch + 1}/{progress.epochs}", style="bold"),
        ProgressBar(total=max(1, progress.samples), completed=progress.trained, width=32),
        Text(format_share(progress.trained / max(1, progress.samples))),
        Text(f"{progress.trained:,} of {progress.samples:,} samples", style="dim"),
    )
    figures = Text(describe_figures(progress, totals), no_wrap=True, overflow="ellipsis")
    devices = Text(describe_waited_for(progress), no_wrap=True, overflow="ellipsis", style="dim")
    return Group(row, figures, devices)


@contextlib.contextmanager
def _logs_above_display() -> Iterator[None]:
    """Let log handlers that hold the terminal write through the display's stand-in for stderr."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if type(handler) is logging.StreamHandler and handler.stream.isatty()
    ]
    moved = [(handler, handler.setStream(sys.stderr)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)


def build_reporter(
    stream: TextIO | None = None, json: bool = False, *, clock: Clock = time.monotonic
) -> AbstractContextManager[Reporter]:
    """The reporter that fits ``stream`` (stdout by default), to be used as a context manager."""
    stream = sys.stdout if stream is None else stream
    if json:
        return JsonReporter(stream, clock)
    if stream.isatty() and not build_console(stream).is_dumb_terminal:
        return TerminalReporter(stream, clock)
    return PlainReporter(stream, clock)
