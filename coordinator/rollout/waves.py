"""Waves: how many devices each one takes, and in which order devices come. Pure."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence

from wire.errors import ConfigError

_WAVE = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,6})?)(?P<percent>%?)")

WAVES_RULE = "growing counts or percentages, such as 1,10%,50%,100%"


def wave_sizes(waves: str, devices: int) -> tuple[int, ...]:
    """Number of devices that each wave adds, from totals such as ``1,10%,50%,100%``.

    A percentage of ``devices`` is rounded up. Waves that add nobody, because an earlier one
    has reached as many, fall away. Raises ConfigError for text that is no list of growing waves.
    """
    sizes: list[int] = []
    reached = 0
    for total in _totals(waves, devices):
        if total > reached:
            sizes.append(total - reached)
            reached = total
    return tuple(sizes)


def _totals(waves: str, devices: int) -> list[int]:
    """How many devices are reached with each wave, at most all."""
    totals = []
    previous = {"": 0.0, "%": 0.0}
    for text in waves.split(","):
        match = _WAVE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"expected {WAVES_RULE}, received {text.strip()!r}", field="waves")
        number, unit = float(match["number"]), match["percent"]
        _check(number, unit, previous[unit])
        previous[unit] = number
        wanted = math.ceil(round(devices * number / 100, 6)) if unit else int(number)
        totals.append(min(devices, wanted))
    return totals


def _check(number: float, unit: str, previous: float) -> None:
    shown = f"{number:g}{unit}"
    if number <= 0 or (unit and number > 100):
        raise ConfigError(f"expected waves from 1 device to 100%, received {shown}", field="waves")
    if not unit and number != int(number):
        raise ConfigError(f"expected a whole number of devices, received {shown}", field="waves")
    if number <= previous:
        raise ConfigError(
            f"expected {WAVES_RULE}: {shown} does not come after {previous:g}{unit}", field="waves"
        )


def order_devices(campaign: str, devices: Iterable[str], first: Sequence[str] = ()) -> list[str]:
    """The campaign's order: those of ``first`` as given, then a shuffle seeded by its id.

    By SHA-256 of id and device, so that it depends on nothing else: not on who is online, not
    on which other devices there are.
    """
    known = set(devices)
    ahead = [name for name in dict.fromkeys(first) if name in known]
    rest = known.difference(ahead)
    return ahead + sorted(rest, key=lambda name: _shuffle_key(campaign, name))


def _shuffle_key(campaign: str, device: str) -> bytes:
    return hashlib.sha256(f"{campaign}\n{device}".encode()).digest()
