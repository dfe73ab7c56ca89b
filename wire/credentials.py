"""Secrets by name: files that the service manager lets a service read, and nobody else.

``credential:NAME`` in a settings file is the file NAME in ``$CREDENTIALS_DIRECTORY``. systemd sets
that variable for units with ``LoadCredential=``, and calls a file that comes from a directory
``ID_NAME``; our units load a directory as ``splitfleet``, so both names are looked for.
Source: systemd.exec(5), "Credentials".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from wire.errors import ConfigError

SCHEME = "credential:"
DIRECTORY_ID = "splitfleet"
VARIABLE = "CREDENTIALS_DIRECTORY"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def secret_path(value: str, *, field: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The file that a setting names: a path as it stands, or ``credential:NAME``.

    Looked up when it is used, so that commands which need no secret work without. Raises
    ConfigError naming ``field`` for a credential that is not there.
    """
    if not value.startswith(SCHEME):
        return Path(value)
    name = value.removeprefix(SCHEME)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"expected {SCHEME}NAME with letters, digits, '.', '_' and '-'; received {value!r}",
            field=field,
        )
    directory = environ.get(VARIABLE)
    if not directory:
        raise ConfigError(
            f"expected ${VARIABLE} for {value}: it is set for systemd services; by hand, name the "
            f"folder that holds {name}",
            field=field,
        )
    return _find(Path(directory), name, field)


def read_secret(value: str, *, field: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text of the file that a setting names, without white space around it.

    Raises ConfigError naming the file and ``field`` if it cannot be read as text.
    """
    path = secret_path(value, field=field, environ=environ)
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(
            f"expected a readable file ({exc.strerror})", source=path, field=field
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("expected UTF-8 text", source=path, field=field) from exc


def _find(directory: Path, name: str, field: str) -> Path:
    try:
        present = sorted(entry.name for entry in directory.iterdir())
    except OSError as exc:
        raise ConfigError(
            f"expected a readable folder in ${VARIABLE} ({exc.strerror})",
            source=directory,
            field=field,
        ) from exc
    for candidate in (name, f"{DIRECTORY_ID}_{name}"):
        if candidate in present:
            return directory / candidate
    found = ", ".join(entry.removeprefix(f"{DIRECTORY_ID}_") for entry in present) or "none"
    raise ConfigError(
        f"expected a credential {name!r}, found {found}", source=directory, field=field
    )
