"""``coordinator devices``: the devices of a run as its coordinator last saw them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import typer

from coordinator.cli.stored_run import (
    ConfigOption,
    JsonOption,
    RunOption,
    StateOption,
    open_stored_run,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from coordinator.journal import DeviceRecord


def devices(
    config: ConfigOption = None,
    state: StateOption = None,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the devices of a run: presence, samples, delays, bytes, refused messages.

    Example: coordinator devices -c configs/lab.yaml
    """
    with open_stored_run(config, state, run) as stored:
        _, records = stored.read()
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(record) for record in records.values()]))
        return
    from coordinator.tables import build_console

    console = build_console(sys.stdout)
    if not records:
        console.print(f"run {stored.name}: no device has reported yet")
        return
    console.print(devices_table(records.values()))
    console.print(describe_presence(records.values()))
    if backends := describe_backends(records.values()):
        console.print(backends, markup=False)


def devices_table(records: Iterable[DeviceRecord]) -> Table:
    """One row per device; delays are what the coordinator believes, fixed and per sample.

    ``measured`` is from how many steps; JSON has both phases and how often the speed has changed.
    """
    from rich.text import Text

    from coordinator.tables import describe_refused, format_bytes, new_table, printable

    table = new_table(
        ["device", "state"],
        ["samples", "trained", "late", "delay + a sample", "measured", "up", "down"],
        ["refused messages"],
    )
    for record in records:
        table.add_row(
            Text(printable(record.device)),
            _state(record),
            f"{record.samples:,}",
            f"{record.samples_trained:,}",
            f"{record.missed_deadlines:,}",
            _delay(record),
            _measured(record),
            format_bytes(record.bytes_up),
            format_bytes(record.bytes_down),
            Text(describe_refused(record.refused)),
        )
    return table


def describe_presence(records: Iterable[DeviceRecord]) -> str:
    """How many devices there are, and how many of them can train."""
    known = list(records)
    online = sum(record.online for record in known)
    ready = sum(record.ready for record in known)
    return f"{len(known)} devices: {online} online, {ready} ready"


def describe_backends(records: Iterable[DeviceRecord]) -> str:
    """How many devices run the backward pass on what; empty if none does."""
    from coordinator.tables import printable

    used = Counter(printable("+".join(record.backends)) for record in records if record.backends)
    counts = ", ".join(f"{count} on {name}" for name, count in sorted(used.items()))
    return f"backward pass: {counts}" if counts else ""


def _state(record: DeviceRecord) -> Text:
    """A problem is said in the device's or the coordinator's own words."""
    from rich.text import Text

    from coordinator.tables import printable

    if record.problem:
        problem = printable(record.problem)
        return Text(problem if record.online else f"offline; {problem}", style="red")
    if not record.online:
        return Text("offline", style="yellow")
    return Text("ready", style="green") if record.ready else Text("preparing", style="yellow")


def _delay(record: DeviceRecord) -> str:
    """Fixed part, then what each sample adds."""
    from coordinator.tables import NONE, format_seconds

    if record.fixed_s is None or record.per_sample_s is None:
        return NONE
    return f"{format_seconds(record.fixed_s)} + {format_seconds(record.per_sample_s)}"


def _measured(record: DeviceRecord) -> str:
    """Steps that the delay was measured in."""
    from coordinator.tables import NONE

    phases = [phase for phase in (record.forward, record.backward) if phase is not None]
    if not phases:
        return NONE
    return f"{max(phase.observations for phase in phases):,}"
