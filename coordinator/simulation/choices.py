"""Which policies a simulation compares, as a person names them: ``ugs``, ``lds``, ``lds@2``.

``lds@2`` is LDS with delta 2, ``lds@20%`` LDS with a deviation budget of 20 %. A name without
``@`` takes the delta or budget that holds for all. Every registered policy has a name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.allocation import POLICIES, Policy

REFERENCE = Policy.UGS.value


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """One column of a comparison: a policy with its settings, under the name it was given."""

    name: str
    policy: Policy
    delta: float | None = None
    deviation_budget: float | None = None


def parse_choices(
    names: Sequence[str], *, delta: float | None = None, deviation_budget: float | None = None
) -> tuple[PolicyChoice, ...]:
    """The policies to compare, UGS always among them: ratios are to it.

    names: without any, all registered policies. Raises ValueError for a name that is not known.
    """
    wanted = list(dict.fromkeys(names or [policy.value for policy in POLICIES]))
    if REFERENCE not in wanted:
        wanted.insert(0, REFERENCE)
    return tuple(_parse_choice(name, delta, deviation_budget) for name in wanted)


def _parse_choice(name: str, delta: float | None, deviation_budget: float | None) -> PolicyChoice:
    base, marked, value = name.partition("@")
    try:
        policy = Policy(base)
    except ValueError:
        known = ", ".join(POLICIES)
        raise ValueError(
            f"expected policies among {known} (lds also as lds@DELTA or lds@BUDGET%), "
            f"found {name!r}"
        ) from None
    if not marked:
        return PolicyChoice(name, policy, delta, deviation_budget)
    if policy is not Policy.LDS:
        raise ValueError(f"expected {base!r} without '@': only lds takes a value, found {name!r}")
    if value.endswith("%"):
        return PolicyChoice(name, policy, None, _number(value[:-1], name) / 100)
    return PolicyChoice(name, policy, _number(value, name), None)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"expected a number from 0 behind '@', as in lds@2 or lds@20%, found {name!r}"
        )
    return value
