"""A coordinator in a thread of the tests' process.

``coordinator train`` takes six seconds of processor time to load PyTorch and its exporter. Tests of
what happens between a run and its devices need no process for it: here that is paid once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from coordinator.config import RunSettings
from coordinator.progress import PlainReporter
from coordinator.service import CoordinatorService
from tests.brokers import WAIT_S
from wire.exit_codes import ExitCode


class LocalCoordinator:
    """Stands where a ``Process`` may stand; it cannot be killed, only asked to end."""

    name = "coordinator"

    def __init__(self, settings: RunSettings, log: Path) -> None:
        self._settings = settings
        self._log = log
        self._service: CoordinatorService | None = None
        self._ended: ExitCode | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._stream: TextIO | None = None

    def start(self) -> None:
        """Build network and bundle, then train in the thread; errors of the start are raised."""
        self._stream = self._log.open("w", buffering=1)
        reporter = PlainReporter(self._stream)
        self._service = CoordinatorService(self._settings, source="test", reporter=reporter)
        self._thread.start()

    def signal(self, number: int) -> None:
        assert number == signal.SIGTERM, "that needs a process"
        assert self._service is not None
        self._service.stop()

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit code, once the run is over."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the coordinator runs on:\n{self.output()[-3000:]}"
        if isinstance(self._ended, BaseException):
            raise self._ended
        assert self._ended is not None
        return self._ended

    def stop(self) -> None:
        if self._thread.is_alive():
            self.signal(signal.SIGTERM)
            self._thread.join(WAIT_S)
        if self._stream is not None:
            self._stream.close()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def _run(self) -> None:
        assert self._service is not None
        assert self._stream is not None
        try:
            with _logged_to(self._stream):
                self._ended = self._service.run()
        except BaseException as exc:  # raised again where the test waits
            self._ended = exc


@contextlib.contextmanager
def _logged_to(stream: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
