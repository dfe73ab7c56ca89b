"""What both commands share: errors to exit codes, logging, signals."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from wire import __version__
from wire.errors import ConfigError, ModelError, SplitfleetError, TransportError
from wire.exit_codes import ExitCode


def build_app(name: str, summary: str) -> typer.Typer:
    """A command-line application with ``--version``, to which commands are added."""
    app = typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def _root(
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if version:
            typer.echo(f"{name} {__version__}")
            raise typer.Exit

    return app


def run_command(command: Callable[[], Any]) -> None:
    """Run a command-line application; turn our errors into one line and an exit code."""
    try:
        command()
    except SplitfleetError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(exit_code_of(exc))
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception:  # the last line of defence: a fault of ours, with its trace, and a known code
        traceback.print_exc()
        sys.exit(ExitCode.SOFTWARE)


def exit_code_of(exc: SplitfleetError) -> ExitCode:
    """The exit code that an error of ours ends a command with."""
    match exc:
        case ConfigError():
            return ExitCode.CONFIG
        case ModelError():
            return ExitCode.DATA
        case TransportError():
            return ExitCode.UNAVAILABLE
        case _:
            return ExitCode.SOFTWARE


def configure_logging(*, verbose: bool, quiet: bool = False) -> None:
    """Log to stderr: everything, warnings only (``quiet``), or what changes state."""
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(
        level=logging.DEBUG if verbose else level,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
    )


def stop_on_signals(stop: Callable[[], None]) -> None:
    """SIGINT and SIGTERM ask for a clean end; a second one ends at once."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
