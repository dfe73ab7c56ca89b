"""YAML settings to typed structures, in one function, strict for people.

Unknown keys are errors that name their path; every error is one line with file, field and what
was expected. Settings types are frozen msgspec structs beside the component that they configure.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import inspect

from wire.errors import ConfigError

T = TypeVar("T")

_NO_CHOICE = "Invalid enum value "
_PATH_STEP = re.compile(r"\.(?P<name>\w+)|\[[^\]]*\]")
_PATH_SUFFIX = re.compile(r" - at `(?P<path>.*)`$", re.DOTALL)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every settings structure."""


def load_settings(path: str | Path, settings_type: type[T]) -> T:
    """Read a YAML file into ``settings_type``; a ConfigError names file, field, expectation."""
    try:
        raw = Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"expected a readable YAML file ({exc.strerror})", source=path) from exc
    return parse_settings(raw, settings_type, source=str(path))


def parse_settings(raw: bytes, settings_type: type[T], *, source: str) -> T:
    """Parse YAML text into ``settings_type``; raise ConfigError naming field and expectation."""
    try:
        return msgspec.yaml.decode(raw, type=settings_type)
    except msgspec.ValidationError as exc:
        raise _from_validation(exc, settings_type, source) from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"expected valid YAML ({exc})", source=source) from exc


def convert_settings(document: object, settings_type: type[T], *, source: str) -> T:
    """Convert an already parsed document (dicts and lists) like ``parse_settings``."""
    try:
        return msgspec.convert(document, settings_type)
    except msgspec.ValidationError as exc:
        raise _from_validation(exc, settings_type, source) from exc


def _from_validation(
    exc: msgspec.ValidationError, settings_type: object, source: str
) -> ConfigError:
    text, path = str(exc), "$"
    if (match := _PATH_SUFFIX.search(text)) is not None:
        text, path = text[: match.start()], match["path"]
    if text.startswith(_NO_CHOICE) and (choices := _choices(settings_type, path)):
        text = f"expected one of {', '.join(choices)}, found {text.removeprefix(_NO_CHOICE)}"
    return ConfigError(text, source=source, field=path)


def _choices(settings_type: object, path: str) -> list[str]:
    """What the setting at ``path`` may be; empty where that is not a matter of choice."""
    found = [inspect.type_info(settings_type)]
    for step in _PATH_STEP.finditer(path):
        found = [inner for kind in found for inner in _below(kind, step["name"])]
    choices: list[str] = []
    for kind in found:
        for leaf in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
            if isinstance(leaf, inspect.EnumType):
                choices += [str(member.value) for member in leaf.cls]
            elif isinstance(leaf, inspect.LiteralType):
                choices += map(str, leaf.values)
    return choices


def _below(kind: inspect.Type, name: str | None) -> list[inspect.Type]:
    """The types of a field, or of the items where ``name`` is None."""
    match kind:
        case inspect.UnionType():
            return [inner for member in kind.types for inner in _below(member, name)]
        case inspect.StructType() if name is not None:
            return [field.type for field in kind.fields if field.encode_name == name]
        case inspect.ListType() | inspect.VarTupleType() if name is None:
            return [kind.item_type]
        case inspect.DictType() if name is None:
            return [kind.value_type]
    return []
