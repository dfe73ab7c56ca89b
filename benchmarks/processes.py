"""Device processes of a benchmark: started together, watched, ended together."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from coordinator.bound_process import end_processes, start_bound_process


class BenchmarkError(Exception):
    """The benchmark could not be carried out; the text says what happened."""


class Processes:
    """Processes by name, with their output in ``directory``; a context manager."""

    def __init__(self, commands: Mapping[str, Sequence[str]], directory: Path) -> None:
        self._commands = commands
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of the commands."""
        return [process.pid for process in self._processes.values()]

    def raise_if_ended(self) -> None:
        """Raise BenchmarkError with the last words of a process that has ended by itself."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                last = self._log(name).read_text(errors="replace").strip().splitlines()[-1:]
                words = " ".join(last) or "no output"
                raise BenchmarkError(f"{name} ended with code {process.returncode}: {words}")

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        for name, command in self._commands.items():
            descriptor = os.open(self._log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._processes[name] = start_bound_process(command, log_fd=descriptor)
            finally:
                os.close(descriptor)
        return self

    def __exit__(self, *_exc: object) -> None:
        end_processes(self._processes.values())

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"
