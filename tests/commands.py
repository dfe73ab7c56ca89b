"""Commands run in the tests' own process, as their entry points run them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What it printed with ``--json``; fails if it did not end well."""
        assert self.code == 0, self.err
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


RunCommand = Callable[..., Ended]
"""Takes the words behind the command's name."""


def build_runner(
    name: str,
    main: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> RunCommand:
    """Runs ``name WORD...`` by its entry point ``main``."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code: object = 0
        with _handlers_kept():
            try:
                main()
            except SystemExit as exc:
                code = exc.code or 0
        shown = capfd.readouterr()
        assert isinstance(code, int), code
        return Ended(code, shown.out, shown.err)

    return run


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """A command that ends its process may leave its signal handlers; the tests go on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_run_file(directory: Path, text: str) -> Path:
    """A run's YAML file."""
    path = directory / "run.yaml"
    path.write_text(text)
    return path
