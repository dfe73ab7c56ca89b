"""``coordinator keys``: the keys that bundles are signed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from wire.errors import ConfigError
from wire.signing import PublicKey, generate_key, load_public_key, load_signing_key, write_key_pair
from wire.topics import NAME_RULE, is_valid_name

app = typer.Typer(help="Make and show the keys that bundles are signed with.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the two files.")] = "bundle",
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where to write them.")
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write a new Ed25519 key: NAME.key, which stays here (0600), and NAME.pub, for the agents.

    Never overwrites a file.

    Example: coordinator keys new fleet-2026 --dir keys
    """
    if not is_valid_name(name):
        raise typer.BadParameter(f"expected a name of {NAME_RULE}, got {name!r}")
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    key = generate_key()
    write_key_pair(key, private, public)
    facts = {"private": str(private), "public": str(public), **_describe(key.public)}
    _print(facts, as_json=as_json)


@app.command()
def show(
    file: Annotated[str, typer.Argument(help="A .pub or .key file, or a public key in base64.")],
    as_json: JsonOption = False,
) -> None:
    """Print a key's id, and the public key as an agent's bundle_keys may hold it.

    Example: coordinator keys show keys/fleet-2026.pub
    """
    try:
        key = load_public_key(file)
    except ConfigError:
        if not Path(file).is_file():
            raise
        try:
            key = load_signing_key(file).public
        except ConfigError as exc:
            raise ConfigError("expected an Ed25519 key in PEM", source=file) from exc
    _print(_describe(key), as_json=as_json)


def _describe(key: PublicKey) -> dict[str, str]:
    return {"id": key.key_id, "bundle_keys": key.text}


def _print(facts: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for label, value in facts.items():
        typer.echo(f"{label:<12} {value}")
