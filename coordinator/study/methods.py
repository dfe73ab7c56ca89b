"""What a study compares: a policy with its settings, or the undivided network on shuffled data."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from coordinator.allocation import Policy
from wire.errors import ConfigError
from wire.settings import Settings

UNDIVIDED = "undivided"

# These never look at delays: their batches, and so what they learn, are the same with and without
# slow devices.
DELAY_BLIND = frozenset({Policy.FLS, Policy.FPLS, Policy.UGS})

_VARIANTS = {"delta": "delta", "budget": "deviation_budget"}
_Setting = Annotated[float, Meta(ge=0)]


class Method(Settings, frozen=True, kw_only=True):
    """One of the things compared. ``policy`` None is the undivided network on shuffled data.

    ``delta`` and ``deviation_budget`` are those of ``PolicySettings``; at most one is given.
    """

    policy: Policy | None = None
    delta: _Setting | None = None
    deviation_budget: _Setting | None = None

    @property
    def name(self) -> str:
        """As on the command line: ``ugs``, ``lds:delta=1``."""
        if self.policy is None:
            return UNDIVIDED
        if self.delta is not None:
            return f"{self.policy}:delta={self.delta:g}"
        if self.deviation_budget is not None:
            return f"{self.policy}:budget={self.deviation_budget:g}"
        return str(self.policy)

    @property
    def label(self) -> str:
        """For people: ``UGS``, ``LDS, delta 1``."""
        if self.policy is None:
            return UNDIVIDED
        # The acronyms are short; longer names are words.
        policy = self.policy.upper() if len(self.policy) <= 4 else str(self.policy)
        if self.delta is not None:
            return f"{policy}, delta {self.delta:g}"
        if self.deviation_budget is not None:
            return f"{policy}, budget {100 * self.deviation_budget:g} %"
        return policy

    @property
    def sees_delays(self) -> bool:
        """Whether slow devices change the batches."""
        return self.policy is not None and self.policy not in DELAY_BLIND


def all_methods() -> tuple[Method, ...]:
    """The undivided network and every policy there is, with its default settings."""
    return (Method(), *(Method(policy=policy) for policy in Policy))


def parse_method(text: str, *, source: str = "--policies") -> Method:
    """Read ``undivided``, a policy's name, or ``lds:delta=D`` or ``lds:budget=E``."""
    name, colon, setting = text.partition(":")
    if text == UNDIVIDED:
        return Method()
    if name not in set(Policy):
        known = ", ".join([UNDIVIDED, *Policy])
        raise ConfigError(f"expected some of {known}, found {text!r}", source=source)
    policy = Policy(name)
    if not colon:
        return Method(policy=policy)
    key, equals, number = setting.partition("=")
    if policy in DELAY_BLIND or key not in _VARIANTS or not equals:
        raise ConfigError(
            f"expected {_who_takes_settings()} with :delta=D or :budget=E, found {text!r}",
            source=source,
        )
    return Method(policy=policy, **{_VARIANTS[key]: _parse_number(number, text, source)})


def _who_takes_settings() -> str:
    return " or ".join(policy for policy in Policy if policy not in DELAY_BLIND)


def _parse_number(number: str, text: str, source: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"expected a finite number from 0 in {text!r}", source=source)
    return value
