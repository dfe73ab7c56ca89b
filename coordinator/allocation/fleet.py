"""What a policy is told, and what it has to answer.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from coordinator.allocation.supply import Speeds
from coordinator.allocation.validation import FloatArray, IntArray

State = dict[str, Any]


class Policy(StrEnum):
    """Names of the policies."""

    FLS = "fls"
    FPLS = "fpls"
    UGS = "ugs"
    LDS = "lds"
    CLASS_TARGETED = "class-targeted"

    @property
    def is_by_class(self) -> bool:
        """Whether it counts samples per device and class, so that devices sample by class."""
        return self is Policy.CLASS_TARGETED


@dataclass(frozen=True, slots=True, eq=False)
class Delays:
    """Seconds of a device's step, (K,): as a line in its samples, and for a typical contribution.

    ``typical_K``: of B samples in proportion to what the devices hold.
    """

    speeds: Speeds
    typical_K: FloatArray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delays):
            return NotImplemented
        ours, theirs = self.speeds, other.speeds
        return np.array_equal(ours.fixed_K, theirs.fixed_K) and np.array_equal(
            ours.per_sample_K, theirs.per_sample_K
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What a policy may know of the devices and of the user's choice.

    beta_MK: label distributions, a column per device. held_K: samples of a whole epoch.
    delta: given, or None to choose it from ``deviation_budget``.
    """

    beta_MK: FloatArray
    held_K: IntArray
    delays: Delays
    global_batch: int
    delta: float | None
    deviation_budget: float
    refit_every: int


@runtime_checkable
class StepPolicy(Protocol):
    """One policy over one epoch."""

    @property
    def delta(self) -> float | None:
        """Delta of the step drawn last; None where the policy has none."""

    def draw(self, rng: np.random.Generator, remaining_K: IntArray, room_K: IntArray) -> IntArray:
        """Counts of the next step, (K,); room_K is at most remaining_K and not all 0."""

    def expected_share(self, remaining_K: IntArray) -> FloatArray:
        """Share of the next step that each device is expected to supply, caps left aside."""

    def replan(self, delays: Delays) -> None:
        """Take new delays, and forget what was derived from an earlier state of the fleet."""

    def state(self) -> State:
        """What ``restore`` needs beyond the constructor's arguments, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""


@runtime_checkable
class ClassPolicy(Protocol):
    """A policy that says of which class a device's samples are."""

    delta: float | None

    def draw_by_class(
        self, rng: np.random.Generator, remaining_MK: IntArray, room_K: IntArray
    ) -> IntArray:
        """Counts of the next step, (M, K); room_K as in ``StepPolicy.draw``."""

    def replan(self, delays: Delays) -> None:
        """As in ``StepPolicy``."""

    def state(self) -> State:
        """As in ``StepPolicy``."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """As in ``StepPolicy``."""
