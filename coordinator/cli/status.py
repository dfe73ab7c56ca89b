"""``coordinator status``: where a run is, from its record in the state store."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from coordinator.cli.devices import describe_presence
from coordinator.cli.stored_run import (
    ConfigOption,
    JsonOption,
    RunOption,
    StateOption,
    StoredRun,
    open_stored_run,
)
from wire.command import stop_on_signals
from wire.exit_codes import ExitCode

if TYPE_CHECKING:
    from coordinator.journal import DeviceRecord, RunRecord

# The coordinator writes its record every second, and at its end says that it is offline.
GONE_AFTER_S = 5.0
LEAST_INTERVAL_S = 0.2
PAUSE_PIECE_S = 0.1  # how long Ctrl-C may go unnoticed


class Liveness(StrEnum):
    """What has become of the coordinator's process."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    GONE = "gone"


def status(
    config: ConfigOption = None,
    state: StateOption = None,
    run: RunOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until Ctrl-C.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=LEAST_INTERVAL_S, help="Seconds between two looks.")
    ] = 1.0,
) -> None:
    """Show where a run is: phase, epoch, step, loss, accuracy, speed, whom it waits for.

    Ends with code 1 if the coordinator has gone without a word. With --json --watch one object
    per line.

    Example: coordinator status -c configs/lab.yaml --watch
    """
    with open_stored_run(config, state, run) as stored:
        if watch:
            _watch(stored, as_json=as_json, interval_s=interval_s)
            return
        record, devices = stored.read()
    now_s = time.time()
    if as_json:
        typer.echo(json.dumps(status_document(record, devices, now_s)))
    else:
        _print(record, devices, now_s)
    if liveness(record, now_s) is Liveness.GONE:
        raise typer.Exit(ExitCode.FAILED)


def liveness(record: RunRecord, now_s: float) -> Liveness:
    """Judge by the record and its age; ``now_s`` is Unix time."""
    if record.online:
        return Liveness.GONE if age_s(record, now_s) > GONE_AFTER_S else Liveness.RUNNING
    is_finished = record.epochs > 0 and record.epoch >= record.epochs
    return Liveness.FINISHED if is_finished else Liveness.STOPPED


def age_s(record: RunRecord, now_s: float) -> float:
    """Seconds since the record was written; clocks of two hosts may differ a little."""
    return max(0.0, now_s - record.updated_s)


def status_document(
    record: RunRecord, devices: dict[str, DeviceRecord], now_s: float
) -> dict[str, Any]:
    """The record as it is stored, with what follows from it."""
    return {
        **msgspec.to_builtins(record),
        "state": liveness(record, now_s).value,
        "age_s": round(age_s(record, now_s), 3),
        "devices": {
            "known": len(devices),
            "online": sum(device.online for device in devices.values()),
            "ready": sum(device.ready for device in devices.values()),
        },
    }


def status_facts(
    record: RunRecord, devices: dict[str, DeviceRecord], now_s: float
) -> list[tuple[str, str]]:
    """Pairs of what and how much."""
    from coordinator.tables import NONE, describe_names, format_rate, format_share, printable

    is_running = liveness(record, now_s) is Liveness.RUNNING
    epoch = min(record.epoch + 1, record.epochs)
    waited_for = describe_names([printable(name) for name in record.waited_for])
    speed = format_rate(record.steps_per_s) + ("" if is_running else " (when last seen)")
    return [
        ("run", f"{record.run} (fleet {record.fleet}, attempt {record.attempt})"),
        ("state", _describe_liveness(record, now_s)),
        ("epoch", f"{epoch} of {record.epochs}" if record.epochs else NONE),
        ("step", f"{record.step:,} ({record.version:,} applied)"),
        ("loss", NONE if record.loss is None else f"{record.loss:.4f}"),
        ("test accuracy", format_share(record.test_accuracy)),
        ("speed", speed),
        ("waits for", waited_for or NONE),
        ("devices", describe_presence(devices.values())),
        ("bundle", record.bundle[:16] or NONE),
    ]


def _describe_liveness(record: RunRecord, now_s: float) -> str:
    from coordinator.tables import format_seconds

    age = format_seconds(age_s(record, now_s))
    match liveness(record, now_s):
        case Liveness.RUNNING:
            return f"running, waits for {record.phase}; written {age} ago"
        case Liveness.FINISHED:
            return f"finished {age} ago"
        case Liveness.STOPPED:
            return f"stopped {age} ago; train --resume goes on"
        case Liveness.GONE:
            return (
                f"NO SIGN OF LIFE for {age}: the process is gone or hangs; train --resume goes "
                "on from the last checkpoint"
            )


def _print(record: RunRecord, devices: dict[str, DeviceRecord], now_s: float) -> None:
    from coordinator.tables import build_console, facts_table

    build_console(sys.stdout).print(facts_table(status_facts(record, devices, now_s)))


def _watch(stored: StoredRun, *, as_json: bool, interval_s: float) -> None:
    """Show the run again and again; Ctrl-C is how this is meant to end."""
    pause = Pause()
    # Not by KeyboardInterrupt, which is lost where it meets a finalizer.
    stop_on_signals(pause.end)
    if as_json or not sys.stdout.isatty():
        _watch_lines(stored, pause, as_json=as_json, interval_s=interval_s)
    else:
        _watch_live(stored, pause, interval_s)


class Pause:
    """A wait that ``end`` cuts short, from a signal handler too; no lock is involved."""

    def __init__(self) -> None:
        self.is_ended = False

    def end(self) -> None:
        """Let the wait that is on, and all later ones, return at once."""
        self.is_ended = True

    def wait(self, seconds: float) -> None:
        """Sleep in short pieces: a signal handler that returns does not wake a sleep."""
        deadline_s = time.monotonic() + seconds
        while not self.is_ended and (rest_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(rest_s, PAUSE_PIECE_S))


def _watch_lines(stored: StoredRun, pause: Pause, *, as_json: bool, interval_s: float) -> None:
    while not pause.is_ended:
        record, devices = stored.read()
        now_s = time.time()
        document = json.dumps(status_document(record, devices, now_s))
        print(document if as_json else _line(record, devices, now_s), flush=True)
        pause.wait(interval_s)


def _watch_live(stored: StoredRun, pause: Pause, interval_s: float) -> None:
    from rich.live import Live

    from coordinator.tables import build_console, facts_table

    with Live(console=build_console(sys.stdout), auto_refresh=False) as live:
        while not pause.is_ended:
            record, devices = stored.read()
            facts = status_facts(record, devices, time.time())
            live.update(facts_table(facts), refresh=True)
            pause.wait(interval_s)


def _line(record: RunRecord, devices: dict[str, DeviceRecord], now_s: float) -> str:
    facts = dict(status_facts(record, devices, now_s))
    shown = ("epoch", "step", "loss", "test accuracy", "speed", "waits for")
    return "  ".join([facts["state"], *(f"{name} {facts[name]}" for name in shown)])
