"""Reads a run's devices for ``--population-from`` and ``--delays-from``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wire.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from coordinator.simulation.recorded import RecordedRun

_STATE_FILE = "state.sqlite"


def read_recorded_run(where: str, option: str) -> RecordedRun:
    """The devices of a run: its folder, or the URL of its state store with ``#RUN`` if need be.

    In a folder the state store counts, as it is newer than the summary while the run is on.
    Raises ConfigError naming ``option`` or the file for what is no run.
    """
    from coordinator.simulation.recorded import recorded_run

    if "://" in where:
        url, _, run = where.partition("#")
        return _from_store(url, run or None, option)
    folder = Path(where)
    if (folder / _STATE_FILE).is_file():
        return _from_store(f"sqlite:///{folder / _STATE_FILE}", None, option)
    from coordinator.plots import read_summary
    from coordinator.recorder import SUMMARY_FILE

    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise ConfigError(
            f"expected a run's folder with {_STATE_FILE} or {SUMMARY_FILE}, or the URL of a state "
            f"store such as sqlite:///runs/lab/{_STATE_FILE}, found {where!r}",
            field=option,
        )
    try:
        return recorded_run(read_summary(folder).devices, str(path))
    except ModelError as exc:
        raise ConfigError(str(exc), field=option) from exc


def _from_store(url: str, run: str | None, option: str) -> RecordedRun:
    from coordinator.cli.stored_run import open_stored_run
    from coordinator.simulation.recorded import recorded_run

    try:
        with open_stored_run(None, url, run) as stored:
            _, records = stored.read()
            return recorded_run(records.values(), f"{stored.where}, run {stored.name}")
    except ConfigError as exc:
        if exc.field not in {"--run", "--state"}:
            raise
        hint = f"{exc.expected} (say {url}#NAME)" if exc.field == "--run" else exc.expected
        raise ConfigError(hint, field=option) from exc
