"""Options that commands share as dataclasses, and what the help makes of option texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from coordinator.cli.app import app as coordinator_app
from coordinator.cli.grouped import grouped
from edge_agent.cli import app as agent_app


@dataclass(frozen=True, kw_only=True)
class Place:
    host: Annotated[str, typer.Option("-h", "--host", help="Where.")] = "here"
    port: Annotated[int, typer.Option(min=1, help="Which.")] = 1883


@dataclass(frozen=True, kw_only=True)
class Choice:
    name: Annotated[str, typer.Option(help="Who.")]
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="What.")] = None


def build_app() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @grouped
    def greet(
        word: Annotated[str, typer.Argument()],
        place: Place,
        choice: Choice,
        loud: Annotated[bool, typer.Option("--loud")] = False,
    ) -> None:
        """Say a word."""
        typer.echo(f"{word} {place} {choice} {loud}")

    @app.command()
    @grouped
    def leave(place: Place) -> None:
        """Go."""
        typer.echo(place)

    return app


def run(*words: str) -> Any:
    return CliRunner().invoke(build_app(), list(words))


def test_fields_are_options_of_every_command_that_takes_the_class() -> None:
    ended = run("greet", "hello", "--port", "7", "--name", "a", "--kind", "b", "--kind", "c")
    place, choice = Place(port=7), Choice(name="a", kinds=["b", "c"])
    assert ended.output == f"hello {place} {choice} False\n"
    assert run("leave", "-h", "there").output == f"{Place(host='there')}\n"


def test_checks_and_required_options_hold() -> None:
    assert run("leave", "--port", "0").exit_code == 2
    ended = run("greet", "hello")
    assert ended.exit_code == 2
    assert "--name" in ended.output


def test_help_is_that_of_the_command() -> None:
    shown = run("greet", "--help").output
    assert "Say a word." in shown
    for text in ("--host", "-h", "Where.", "--kind", "word"):
        assert text in shown


def commands_of(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    waiting = list(group.commands.items())
    while waiting:
        name, command = waiting.pop()
        yield name, command
        waiting += [(f"{name} {sub}", c) for sub, c in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("app", [coordinator_app, agent_app], ids=["coordinator", "edge-agent"])
def test_help_texts_hold_nothing_that_the_help_takes_for_markup(app: typer.Typer) -> None:
    options = [(name, option) for name, command in commands_of(app) for option in command.params]
    assert len(options) > 10
    for name, option in options:
        text = getattr(option, "help", None) or ""
        assert not re.search(r"\[[a-z#/@]", text), f"{name} {option.name}: {text}"
