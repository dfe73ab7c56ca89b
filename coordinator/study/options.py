"""From the command line's words to a study's settings; every refusal names the option."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from coordinator.study.methods import parse_method
from coordinator.study.schemes import parse_scheme
from coordinator.study.settings import QUICK, StudySettings
from wire.errors import ConfigError
from wire.settings import convert_settings

T = TypeVar("T")

_MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True)
class Option:
    """An option's value for a field of ``StudySettings`` by its dotted path; None leaves it."""

    name: str
    path: str
    value: Any


def build_settings(options: Iterable[Option], *, quick: bool) -> StudySettings:
    """The defaults, or those of --quick, with the options in place.

    Raises ConfigError naming the option.
    """
    settings = QUICK if quick else StudySettings()
    for option in options:
        if option.value is not None:
            settings = _with(settings, option)
    return settings


def _with(settings: StudySettings, option: Option) -> StudySettings:
    document = msgspec.to_builtins(settings)
    *path, last = option.path.split(".")
    place = document
    for part in path:
        place = place[part]
    place[last] = msgspec.to_builtins(option.value)
    try:
        return convert_settings(document, StudySettings, source=option.name)
    except ConfigError as exc:
        found = option.value if isinstance(option.value, (int, float, str)) else ""
        raise ConfigError(f"{exc.expected}, found {found}", source=option.name) from exc


def parse_methods(text: str | None) -> Any:
    """``--policies``: names, separated by commas."""
    return _parse_list(text, "--policies", parse_method)


def parse_schemes(text: str | None) -> Any:
    """``--schemes``: names or C/ALPHA, separated by commas."""
    return _parse_list(text, "--schemes", parse_scheme)


def parse_numbers(text: str | None, option: str) -> Any:
    """Numbers, separated by commas."""
    return _parse_list(text, option, _number)


def parse_whole_numbers(text: str | None, option: str) -> Any:
    """Whole numbers, separated by commas."""
    return _parse_list(text, option, _whole_number)


def parse_seeds(text: str | None, option: str = "--seeds") -> Any:
    """Whole numbers and ranges with both ends, such as ``0-2,7``."""
    if text is None:
        return None
    seeds: list[int] = []
    for part in _words(text, option):
        first, dash, last = part.partition("-")
        low = _whole_number(first, source=option)
        high = _whole_number(last, source=option) if dash else low
        if not low <= high < low + _MOST_SEEDS:
            raise ConfigError(f"expected a range such as 0-4, found {part!r}", source=option)
        seeds.extend(range(low, high + 1))
    return tuple(dict.fromkeys(seeds))


def parse_json_object(text: str | None, option: str) -> Any:
    """A JSON object."""
    if text is None:
        return None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"expected a JSON object ({exc})", source=option) from exc
    if not isinstance(document, dict):
        raise ConfigError(f"expected a JSON object, found {text!r}", source=option)
    return document


def _parse_list(text: str | None, option: str, parse: Callable[..., T]) -> tuple[T, ...] | None:
    """Each once, in the order given."""
    if text is None:
        return None
    return tuple(dict.fromkeys(parse(word, source=option) for word in _words(text, option)))


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"expected values separated by commas, found {text!r}", source=option)
    return words


def _number(word: str, *, source: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"expected numbers, found {word!r}", source=source) from None


def _whole_number(word: str, *, source: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 15):
        raise ConfigError(f"expected whole numbers, found {word!r}", source=source)
    return int(word)
