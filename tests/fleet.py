"""A fleet of real processes for tests: coordinator and agents against a real broker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.bound_process import start_bound_process
from coordinator.config import RunSettings
from coordinator.recorder import StepRecord, read_steps
from tests.brokers import WAIT_S

if TYPE_CHECKING:
    from tests.local_coordinator import LocalCoordinator

RUN_TIMEOUT_S = 120.0

ONNX = {"forward": "onnxruntime", "backward": "onnxruntime"}
"""Agents that are up in a fraction of a second, and small: they never import torch."""


@dataclass
class Process:
    """A child process with its output in a file."""

    name: str
    command: list[str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.popen = start_bound_process(self.command, log_fd=descriptor)
        finally:
            os.close(descriptor)

    def signal(self, number: int) -> None:
        assert self.popen is not None
        self.popen.send_signal(number)

    def kill(self) -> None:
        """kill -9, and reap."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        assert self.popen is not None
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs on:\n{self.output()[-3000:]}") from None

    def stop(self) -> None:
        if self.popen is not None and self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Fleet:
    """Settings files, data files and processes of one test, all below ``directory``."""

    directory: Path
    port: int
    name: str
    processes: list[Process | LocalCoordinator] = field(default_factory=list)

    def write_data(self, name: str, x: NDArray[Any], y: NDArray[Any]) -> str:
        path = self.directory / f"{name}.npz"
        np.savez(path, x=x, y=y)
        return str(path)

    def agent(
        self,
        device: str,
        data: dict[str, Any],
        *,
        start: bool = True,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> Process:
        """An ``edge-agent run`` process, on ONNX Runtime by default; ``data`` is its data block."""
        document: dict[str, Any] = {
            "device": device,
            "fleet": self.name,
            "mqtt": {"port": self.port, "reconnect_min_s": 0.2, "reconnect_max_s": 0.5},
            "data": data,
            "compute": ONNX,
            "state_dir": str(self.directory / f"state-{device}"),
            "telemetry_every_s": 0.5,
            **settings,
        }
        path = self.directory / f"{device}.yaml"
        path.write_bytes(msgspec.yaml.encode(document))
        command = [sys.executable, "-m", "edge_agent", "run", "-c", str(path)]
        if environment:
            command = ["env", *(f"{k}={v}" for k, v in environment.items()), *command]
        return self._add(Process(device, command, self.directory / f"{device}.log"), start)

    def coordinator(
        self, *arguments: str, start: bool = True, run: str = "test", **settings: Any
    ) -> Process:
        """A ``coordinator train`` process; its files are in ``directory/run``."""
        path = self.run_file(run=run, **settings)
        command = [sys.executable, "-m", "coordinator", "train", "-c", str(path), *arguments]
        return self._add(Process("coordinator", command, self.directory / "coordinator.log"), start)

    def local_coordinator(self, *, run: str = "test", **settings: Any) -> LocalCoordinator:
        """The same in a thread of this process, which saves seconds; started."""
        from tests.local_coordinator import LocalCoordinator

        document = self._run_settings(run, settings)
        one = LocalCoordinator(
            msgspec.convert(document, RunSettings), self.directory / "coordinator.log"
        )
        self.processes.append(one)
        one.start()
        return one

    def run_file(self, *, run: str = "test", **settings: Any) -> Path:
        """The settings of a run, for ``coordinator train -c``."""
        path = self.directory / "coordinator.yaml"
        path.write_bytes(msgspec.yaml.encode(self._run_settings(run, settings)))
        return path

    def _run_settings(self, run: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "run": run,
            "fleet": self.name,
            "out": str(self.out),
            "mqtt": {"port": self.port, "reconnect_min_s": 0.2, "reconnect_max_s": 0.5},
            "threads": 1,
            **settings,
        }

    @property
    def out(self) -> Path:
        return self.directory / "run"

    def summary(self) -> dict[str, Any]:
        document: dict[str, Any] = msgspec.json.decode((self.out / "summary.json").read_bytes())
        return document

    def steps(self) -> list[StepRecord]:
        return read_steps(self.out / "steps.jsonl")

    def wait_for_steps(self, count: int) -> None:
        """Wait until the coordinator has written down that many steps."""
        self.wait_until(lambda: len(self.steps()) >= count, f"{count} steps")

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = RUN_TIMEOUT_S
    ) -> None:
        """Poll a condition that real processes bring about; fail with their last words."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{what} did not come about:\n{self.last_words()}")
            time.sleep(0.02)

    def last_words(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.output()[-1500:]}" for p in self.processes)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()

    def _add(self, process: Process, start: bool) -> Process:
        self.processes.append(process)
        if start:
            process.start()
        return process


@contextlib.contextmanager
def running_fleet(directory: Path, port: int, name: str) -> Iterator[Fleet]:
    """A fleet whose processes are stopped at the end, however the test ends."""
    fleet = Fleet(directory, port, name)
    try:
        yield fleet
    finally:
        fleet.stop()


def assert_trained_exactly_once(
    steps: list[StepRecord], samples: dict[str, int], *, epochs: int
) -> None:
    """Every sample of every device stands in exactly one step of each epoch."""
    for epoch in range(epochs):
        for device, held in samples.items():
            seen = np.zeros(held, np.int64)
            for step in steps:
                for name, offset, count in step.slots:
                    if step.epoch == epoch and name == device:
                        seen[offset : offset + count] += 1
            assert (seen == 1).all(), f"epoch {epoch}, {device}: {np.bincount(seen)}"


def terminate(process: Process | LocalCoordinator) -> None:
    process.signal(signal.SIGTERM)
