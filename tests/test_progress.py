"""What a run shows while it trains: on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.progress import (
    JsonReporter,
    PlainReporter,
    TerminalReporter,
    build_reporter,
    render_progress,
)
from coordinator.progress_text import EpochTotals, describe_waited_for
from coordinator.reporting import Progress
from coordinator.tables import (
    build_console,
)
from tests.run_reports import device, epoch, progress, step, summary


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


# Plain lines


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_running_epoch_gives_a_line_every_five_seconds(stream: io.StringIO, clock: Clock) -> None:
    with PlainReporter(stream, clock) as reporter:
        for number in range(48):  # twelve seconds of reports
            reporter.progress(progress(step=number))
            clock.now_s += 0.25
    assert len(lines(stream)) == 3
    assert lines(stream)[0].startswith("epoch 1/3  33.3 %  step 0  loss 0.312")
    for part in ("test accuracy 91.2 %", "deviation 0.41", "45.3 steps/s", "waits for gw-1"):
        assert part in lines(stream)[0]


def test_a_stalled_run_gives_a_line_a_minute(stream: io.StringIO, clock: Clock) -> None:
    with PlainReporter(stream, clock) as reporter:
        for _ in range(4 * 121):
            reporter.progress(progress())
            clock.now_s += 0.25
    assert len(lines(stream)) == 3


def test_waiting_for_devices_is_told_when_their_number_changes(
    stream: io.StringIO, clock: Clock
) -> None:
    with PlainReporter(stream, clock) as reporter:
        for ready in (0, 0, 3, 3, 7):
            reporter.progress(progress(samples=0, trained=0, waited_for=(), ready=ready))
            clock.now_s += 1.0
    assert lines(stream) == [
        "waiting for devices: 0 of 8",
        "waiting for devices: 3 of 8",
        "waiting for devices: 7 of 8",
    ]


def test_a_fleet_that_has_left_is_waited_for(stream: io.StringIO, clock: Clock) -> None:
    with PlainReporter(stream, clock) as reporter:
        reporter.progress(progress(ready=0, waited_for=()))
    assert lines(stream) == ["waiting for devices: all have left"]


def test_an_epoch_line_has_means_weighted_with_samples_and_its_time(
    stream: io.StringIO, clock: Clock
) -> None:
    with PlainReporter(stream, clock) as reporter:
        reporter.progress(progress())
        reporter.step(step(samples=90, loss=1.0, deviation=0.2))
        reporter.step(step(samples=10, loss=2.0, deviation=0.4))
        clock.now_s += 4.0
        reporter.epoch(epoch(0))
    assert lines(stream)[-1] == (
        "epoch 1/3  1,344 samples  loss 1.100  test accuracy 95.0 %  deviation 0.30  4.00 s"
    )


def test_each_epoch_has_sums_of_its_own(stream: io.StringIO, clock: Clock) -> None:
    with PlainReporter(stream, clock) as reporter:
        for number, loss in enumerate((2.0, 1.0)):
            reporter.step(step(epoch=number, loss=loss))
            reporter.epoch(epoch(number))
    assert ["loss 2.000" in lines(stream)[0], "loss 1.000" in lines(stream)[1]] == [True, True]


def test_an_epoch_without_test_data_shows_the_accuracy_of_its_batches(
    stream: io.StringIO, clock: Clock
) -> None:
    with PlainReporter(stream, clock) as reporter:
        reporter.step(step())
        reporter.epoch(epoch(0, test_accuracy=None, trained=1300, missed={"gw-1": 44}))
    assert "train accuracy 75.0 %" in lines(stream)[0]
    assert "1,300 samples (44 missed)" in lines(stream)[0]


def test_nothing_is_shown_of_progress_after_the_last_epoch(
    stream: io.StringIO, clock: Clock
) -> None:
    with PlainReporter(stream, clock) as reporter:
        reporter.progress(progress(epoch=3, samples=0, trained=0, waited_for=()))
    assert stream.getvalue() == ""


def test_piped_output_has_no_control_characters(stream: io.StringIO, clock: Clock) -> None:
    with PlainReporter(stream, clock) as reporter:
        reporter.note("refused: \x1b[2J\x07 [bold]all[/bold]\r\nsecond line")
        reporter.progress(progress())
        reporter.epoch(epoch(0))
        reporter.finish(summary(devices=(device("gw-1", refused={"late": 2}),)))
    assert "[bold]all[/bold]" in lines(stream)[0]
    assert all(char.isprintable() for char in stream.getvalue().replace("\n", ""))


def test_lines_are_flushed_as_they_are_written(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "out.txt"
    with path.open("w") as stream, PlainReporter(stream, clock) as reporter:
        reporter.note("started")
        assert path.read_text() == "started\n"


def test_at_most_three_devices_are_named() -> None:
    named = describe_waited_for(progress(waited_for=("a", "b", "c", "d", "e")))
    assert named == "8 of 8 devices ready  waits for a, b, c +2"


# A reader that goes away


def test_a_closed_pipe_does_not_end_the_training() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as stream:
        os.close(read_end)
        with PlainReporter(stream) as reporter:
            reporter.note("nobody reads this")
            reporter.progress(progress())
            reporter.epoch(epoch(0))
            reporter.finish(summary())


def test_a_program_ends_well_after_its_reader_has_gone() -> None:
    code = (
        "from coordinator.progress import build_reporter\n"
        "with build_reporter() as reporter:\n"
        "    for number in range(2000):\n"
        "        reporter.note('x' * 100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"x" * 100 + b"\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 0


# JSON


def test_json_lines_hold_every_event(stream: io.StringIO, clock: Clock) -> None:
    with JsonReporter(stream, clock) as reporter:
        reporter.note("hello")
        reporter.progress(progress())
        reporter.progress(progress())  # in the same second
        reporter.step(step())
        reporter.epoch(epoch(0))
        reporter.finish(summary())
    events = [json.loads(line) for line in lines(stream)]
    assert [event["event"] for event in events] == ["note", "progress", "epoch", "summary"]
    assert events[1]["waited_for"] == ["gw-1"]
    assert events[2]["train_accuracy"] == 0.75
    assert events[3]["samples_trained"] == 4032


# Terminal


def test_the_reporter_fits_the_stream() -> None:
    assert isinstance(build_reporter(io.StringIO()), PlainReporter)
    assert isinstance(build_reporter(io.StringIO(), json=True), JsonReporter)
    assert isinstance(build_reporter(FakeTerminal()), TerminalReporter)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(build_reporter(FakeTerminal()), PlainReporter)


def rendered(shown: Progress, width: int = 100) -> str:
    console = build_console(io.StringIO())
    console.width = width
    totals = EpochTotals()
    totals.add(step())
    console.print(render_progress(shown, totals))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_display_shows_epoch_bar_figures_and_whom_it_waits_for() -> None:
    shown = rendered(progress(epoch=1))
    for part in ("epoch 2/3", "33.3 %", "448 of 1,344 samples", "step 7", "loss 0.312", "gw-1"):
        assert part in shown
    for part in ("test accuracy 91.2 %", "deviation 0.41", "45.3 steps/s", "8 of 8 devices ready"):
        assert part in shown


def test_before_the_first_test_the_display_shows_the_accuracy_of_batches() -> None:
    assert "train accuracy 75.0 %" in rendered(progress(test_accuracy=None))


def test_the_display_never_grows_beyond_three_lines() -> None:
    waited_for = tuple(f"gateway-in-hall-{number}-of-the-plant" for number in range(100))
    assert len(rendered(progress(waited_for=waited_for), width=60).splitlines()) == 3


def test_the_display_says_which_devices_are_missing() -> None:
    shown = rendered(progress(samples=0, trained=0, waited_for=(), ready=3))
    assert shown.strip() == "waiting for devices: 3 of 8"


def test_the_display_is_drawn_at_most_eight_times_a_second(clock: Clock) -> None:
    terminal = FakeTerminal()
    with TerminalReporter(terminal, clock) as reporter:
        for number in range(1000):  # one second of reports
            reporter.progress(progress(step=5000 + number))
            clock.now_s += 0.001
    assert 1 <= terminal.getvalue().count("step 5,") <= 9


def test_notes_and_epochs_stand_above_the_display_and_tables_at_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    terminal = FakeTerminal()
    with TerminalReporter(terminal, clock) as reporter:
        reporter.progress(progress())
        reporter.note("[gw-1] has \x1b[31mcome")
        reporter.epoch(epoch(0))
        reporter.finish(summary())
    shown = terminal.getvalue()
    assert "[gw-1] has  [31mcome" in shown
    assert shown.index("epoch 1/3  1,344 samples") < shown.index("every sample once per epoch")


def on_a_terminal(code: str) -> str:
    """Run Python code in a process whose three streams are a terminal; returns what it shows."""
    terminal, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while block := os.read(terminal, 65_536):
            shown += block
    os.close(terminal)
    assert process.wait(30) == 0, shown.decode()
    return shown.decode()


USE_A_TERMINAL = """
import logging
from coordinator.progress import build_reporter
from tests.run_reports import progress, summary

logging.basicConfig(format="%(message)s")
with build_reporter() as reporter:
    reporter.progress(progress())
    logging.warning("the broker is away")
    reporter.finish(summary())
logging.warning("after the end")
"""


def test_log_lines_stand_above_the_display_on_a_real_terminal() -> None:
    shown = on_a_terminal(USE_A_TERMINAL)
    before, after = shown.split("the broker is away")
    # The display was erased before the line was written, and drawn again below it.
    assert "epoch 1/3" in before
    assert before.endswith("\x1b[2K")
    assert "epoch 1/3" in after
    assert shown.rstrip().endswith("after the end")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is visible
