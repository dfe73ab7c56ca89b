"""Checks of what callers hand to the planner; each refusal says what was expected and received.

Shapes: K devices, M classes.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Beyond this a float no longer holds every whole number, and sums of counts could overflow.
LARGEST_COUNT = 2**53


def check_whole_numbers(
    values: ArrayLike, name: str, *, ndim: int, least: int = 0, most: int = LARGEST_COUNT
) -> IntArray:
    """Return ``values`` as a new int64 array of ``ndim`` axes, each from ``least`` to ``most``.

    Floats are taken where they are whole; anything else raises ValueError.
    """
    raw = _numeric(values, name, "whole numbers")
    if raw.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, received shape {raw.shape}")
    if raw.dtype.kind == "f" and not bool(np.all(np.isfinite(raw) & (raw == np.floor(raw)))):
        raise ValueError(f"{name}: expected whole numbers, received {_first_not_whole(raw)}")
    if raw.size and (raw.min() < least or raw.max() > most):
        found = raw.min() if raw.min() < least else raw.max()
        raise ValueError(f"{name}: expected whole numbers from {least} to {most}, received {found}")
    return raw.astype(np.int64, order="C", copy=True)


def check_label_counts(values: ArrayLike) -> IntArray:
    """Samples per device and class, (K, M) with K and M at least 1."""
    counts_KM = check_whole_numbers(values, "label_counts", ndim=2)
    if 0 in counts_KM.shape:
        raise ValueError(
            "label_counts: expected at least one device and one class, "
            f"received shape {counts_KM.shape}"
        )
    return counts_KM


def check_remaining(values: ArrayLike, held_K: IntArray, *, at_most_held: bool) -> IntArray:
    """Samples left per device, (K,); a device without labelled samples can have none left."""
    left_K = check_whole_numbers(values, "remaining", ndim=1)
    _same_length(left_K.shape, held_K.size, "remaining")
    limit_K = held_K if at_most_held else np.where(held_K > 0, LARGEST_COUNT, 0)
    if np.any(left_K > limit_K):
        k = int(np.argmax(left_K > limit_K))
        raise ValueError(
            f"remaining[{k}]: expected at most the {held_K[k]} samples of its label counts, "
            f"received {left_K[k]}"
        )
    return left_K


def check_remaining_by_class(values: ArrayLike, held_KM: IntArray) -> IntArray:
    """Samples left per device and class, (K, M), at most those that are held."""
    left_KM = check_whole_numbers(values, "remaining", ndim=2)
    if left_KM.shape != held_KM.shape:
        raise ValueError(f"remaining: expected shape {held_KM.shape}, received {left_KM.shape}")
    if np.any(left_KM > held_KM):
        k, m = (int(i) for i in np.argwhere(left_KM > held_KM)[0])
        raise ValueError(
            f"remaining[{k}][{m}]: expected at most the {held_KM[k, m]} samples of its label "
            f"counts, received {left_KM[k, m]}"
        )
    return left_KM


def check_delays(values: ArrayLike, devices: int, name: str = "delays_s") -> FloatArray:
    """Seconds per device, (K,), finite and not negative."""
    raw = _numeric(values, name, "seconds").astype(np.float64)
    _same_length(raw.shape, devices, name)
    wrong_K = ~(np.isfinite(raw) & (raw >= 0))
    if np.any(wrong_K):
        k = int(np.argmax(wrong_K))
        raise ValueError(f"{name}[{k}]: expected finite seconds from 0, received {raw[k]}")
    return raw


def check_max_batch(values: ArrayLike | None, devices: int) -> IntArray | None:
    """Largest count per device and step, (K,); one number holds for all, None for no cap.

    A cap may be as large as an integer can be: that is how callers write "no cap" for one device.
    """
    if values is None:
        return None
    if np.ndim(values) == 0:
        return np.full(
            devices, min(check_whole_number(values, "max_batch", least=1), LARGEST_COUNT)
        )
    caps_K = check_whole_numbers(values, "max_batch", ndim=1, least=1, most=np.iinfo(np.int64).max)
    _same_length(caps_K.shape, devices, "max_batch")
    return caps_K


def check_whole_number(value: object, name: str, *, least: int) -> int:
    """One whole number from ``least``."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, received {value!r}")
    return int(value)


def check_not_negative(value: object, name: str) -> float:
    """One finite number from 0."""
    return _number(value, name, "a finite number from 0", above_zero=False)


def check_positive(value: object, name: str) -> float:
    """One finite number above 0."""
    return _number(value, name, "a finite number above 0", above_zero=True)


def _number(value: object, name: str, expected: str, *, above_zero: bool) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name}: expected {expected}, received {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
        raise ValueError(f"{name}: expected {expected}, received {value!r}")
    return number


def _numeric(values: ArrayLike, name: str, expected: str) -> NDArray[np.generic]:
    try:
        raw = np.asarray(values)
    except ValueError as exc:
        raise ValueError(f"{name}: expected {expected}, received rows of unequal length") from exc
    if raw.size == 0 and raw.dtype.kind == "f":
        return raw.astype(np.int64)
    if raw.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected {expected}, received values of type {raw.dtype}")
    return raw


def _same_length(shape: tuple[int, ...], devices: int, name: str) -> None:
    if shape != (devices,):
        raise ValueError(f"{name}: expected shape ({devices},), received {shape}")


def _first_not_whole(raw: NDArray[np.generic]) -> object:
    flat = raw.astype(np.float64).ravel()
    wrong = ~(np.isfinite(flat) & (flat == np.floor(flat)))
    return flat[int(np.argmax(wrong))]
