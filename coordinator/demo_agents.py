"""The agents of a demo: processes that are started together, watched, and ended together."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from coordinator.bound_process import end_processes, start_bound_process
from edge_agent.config import AgentSettings
from wire.errors import ConfigError, SplitfleetError


class DemoError(SplitfleetError):
    """The fleet on this machine could not be started or has fallen apart."""


class AgentProcesses:
    """The agents' processes; a thread watches them and stops the service when one has failed."""

    def __init__(
        self,
        agents: Sequence[AgentSettings],
        directory: Path,
        *,
        python: str,
        stop: Callable[[], None],
    ) -> None:
        """``directory`` gets their settings and logs; ``stop`` is called from the thread."""
        self._agents = agents
        self._directory = directory
        self._python = python
        self._stop = stop
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, Path] = {}
        self._ending = threading.Event()
        self._failed: str | None = None
        self._watcher = threading.Thread(target=self._watch, name="demo-agents", daemon=True)

    def __enter__(self) -> AgentProcesses:
        directory = self._directory
        directory.mkdir(parents=True, exist_ok=True)
        for agent in self._agents:
            config = directory / f"{agent.device}.yaml"
            config.write_bytes(msgspec.yaml.encode(agent))
            self._logs[agent.device] = directory / f"{agent.device}.log"
            self._processes[agent.device] = self._start(config, self._logs[agent.device])
        self._watcher.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ending.set()
        end_processes(self._processes.values())
        self._watcher.join()

    def raise_if_failed(self) -> None:
        """Raise DemoError with the last words of an agent that ended by itself."""
        if self._failed is not None:
            raise DemoError(self._failed)

    def _start(self, config: Path, log: Path) -> subprocess.Popen[bytes]:
        command = [self._python, "-m", "edge_agent", "run", "-c", str(config)]
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            return start_bound_process(command, log_fd=descriptor)
        except OSError as exc:
            raise ConfigError(
                f"expected a Python interpreter at {self._python} ({exc.strerror})",
                source="--agent-python",
            ) from exc
        finally:
            os.close(descriptor)

    def _watch(self) -> None:
        while not self._ending.wait(0.5):
            for device, process in self._processes.items():
                if process.poll() is not None and not self._ending.is_set():
                    last = self._logs[device].read_text(errors="replace").strip().splitlines()[-1:]
                    self._failed = (
                        f"agent {device} ended with code {process.returncode}: "
                        f"{' '.join(last) or 'no output'} ({self._logs[device]})"
                    )
                    self._stop()
                    return
