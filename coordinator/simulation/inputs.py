"""Label counts, delays and caps from JSON files, as a person or another program wrote them.

Every refusal is a ConfigError that names the file, the place in it and what was expected.

Shapes: K devices, M classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation import validation
from coordinator.simulation.delay_models import DeviceDelays
from wire.errors import ConfigError

IntArray = NDArray[np.int64]
T = TypeVar("T")

LABEL_COUNTS_FORM = (
    "expected a matrix of whole numbers, one row per device with its samples of each class, "
    "such as [[30, 0], [5, 40]], or an object of such rows by device id"
)
DELAYS_FORM = (
    "expected one delay per device: seconds a step, [fixed_s, per_sample_s] or "
    '{"fixed_s": ..., "per_sample_s": ...}, in a list or in an object by device id'
)


@dataclass(frozen=True, slots=True, eq=False)
class GivenPopulation:
    """Label counts as a file or a run has them; ``names`` where it says whose they are."""

    label_counts_KM: IntArray
    names: tuple[str, ...] | None = None
    max_batch_K: IntArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GivenDelays:
    """Delays as a file or a run has them; ``names`` where it says whose they are."""

    delays: DeviceDelays
    names: tuple[str, ...] | None = None

    def in_order_of(self, names: tuple[str, ...] | None, *, source: str) -> DeviceDelays:
        """These delays for the devices of a population, by name where both have names.

        Raises ConfigError that names the device that has none.
        """
        if self.names is None or names is None or self.names == names:
            return self.delays
        place = {name: k for k, name in enumerate(self.names)}
        missing = [name for name in names if name not in place]
        if missing:
            raise ConfigError(f"expected a delay of device {missing[0]!r}", source=source)
        order = np.array([place[name] for name in names])
        return DeviceDelays(self.delays.fixed_s_K[order], self.delays.per_sample_s_K[order])


def read_label_counts(path: str) -> GivenPopulation:
    """Samples per device and class from a JSON file: a matrix, or rows by device id."""
    document = _unwrapped(_read_json(path, LABEL_COUNTS_FORM), "label_counts")
    names = None
    if isinstance(document, dict):
        names, document = tuple(document), list(document.values())
    if not isinstance(document, list) or not all(isinstance(row, list) for row in document):
        raise ConfigError(f"{LABEL_COUNTS_FORM}, found {_describe(document)}", source=path)
    counts_KM = _checked(lambda: validation.check_label_counts(document), path)
    if not counts_KM.any():
        raise ConfigError("expected at least one sample in all, found only zeros", source=path)
    return GivenPopulation(counts_KM, names)


def read_delays(path: str) -> GivenDelays:
    """Delays per device from a JSON file; see ``DELAYS_FORM``. Without a second part it is 0."""
    document = _unwrapped(_read_json(path, DELAYS_FORM), "delays", "delays_s")
    names = None
    if _is_columns(document):
        document = _rows_of(document, path)
    elif isinstance(document, dict):
        names, document = tuple(document), list(document.values())
    if not isinstance(document, list) or not document:
        raise ConfigError(f"{DELAYS_FORM}, found {_describe(document)}", source=path)
    labels = names or tuple(f"[{k}]" for k in range(len(document)))
    pairs = [
        _parse_delay(entry, label, path) for entry, label in zip(document, labels, strict=True)
    ]
    pairs_K2 = np.array(pairs, dtype=np.float64)
    return GivenDelays(DeviceDelays(pairs_K2[:, 0].copy(), pairs_K2[:, 1].copy()), names)


def read_max_batch(text: str, devices: int) -> IntArray:
    """``--max-batch``: one number for all devices, or a JSON file with one for each."""
    try:
        value: Any = int(text)
    except ValueError:
        if not text.endswith(".json") and not Path(text).exists():
            raise ConfigError(
                "expected a whole number from 1 or a JSON file with one per device, "
                f"found {text!r}",
                field="--max-batch",
            ) from None
        value = _read_json(text, "expected a list with the largest count of each device")
    caps_K = _checked(lambda: validation.check_max_batch(value, devices), "--max-batch")
    assert caps_K is not None
    return caps_K


def _is_columns(document: object) -> bool:
    """{"fixed_s": [...], "per_sample_s": [...]}: a list for each part."""
    return (
        isinstance(document, dict)
        and "fixed_s" in document
        and document.keys() <= {"fixed_s", "per_sample_s"}
        and all(isinstance(column, list) for column in document.values())
    )


def _rows_of(columns: dict[str, list[Any]], path: str) -> list[Any]:
    fixed = columns["fixed_s"]
    per_sample = columns.get("per_sample_s", [0.0] * len(fixed))
    if len(fixed) != len(per_sample):
        raise ConfigError(
            f"expected as many entries in fixed_s ({len(fixed)}) as in per_sample_s "
            f"({len(per_sample)})",
            source=path,
        )
    return [list(pair) for pair in zip(fixed, per_sample, strict=True)]


def _parse_delay(entry: Any, label: str, path: str) -> tuple[float, float]:
    """(fixed_s, per_sample_s) of one device."""
    parts: Any = entry
    if (
        isinstance(entry, dict)
        and "fixed_s" in entry
        and entry.keys() <= {"fixed_s", "per_sample_s"}
    ):
        parts = [entry["fixed_s"], entry.get("per_sample_s", 0.0)]
    elif not isinstance(entry, list):
        parts = [entry, 0.0]
    if len(parts) != 2 or not all(_is_seconds(part) for part in parts):
        raise ConfigError(
            "expected finite seconds from 0, or [fixed_s, per_sample_s] of such, "
            f"found {_describe(entry)}",
            source=path,
            field=label,
        )
    return float(parts[0]), float(parts[1])


def _is_seconds(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )


def _read_json(path: str, form: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as exc:
        raise ConfigError(f"expected a readable JSON file ({exc.strerror})", source=path) from exc
    except ValueError as exc:
        raise ConfigError(f"{form}; it is not JSON ({exc})", source=path) from exc


def _unwrapped(document: Any, *names: str) -> Any:
    """What stands under one of these names where it is all that there is."""
    if isinstance(document, dict) and len(document) == 1 and next(iter(document)) in names:
        return next(iter(document.values()))
    return document


def _checked(check: Callable[[], T], source: str) -> T:
    try:
        return check()
    except ValueError as exc:
        raise ConfigError(str(exc), source=source) from exc


def _describe(value: object) -> str:
    """A value in an error: short enough for one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
