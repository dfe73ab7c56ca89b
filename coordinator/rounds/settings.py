"""What the round state machine needs to know of a run's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.patience import DeadlineSettings
from coordinator.planning import PolicySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What the state machine needs to know of a run's settings."""

    global_batch: int
    epochs: int
    policy: PolicySettings = field(default_factory=PolicySettings)
    deadline: DeadlineSettings = field(default_factory=DeadlineSettings)
    min_devices: int = 1
    frozen: bool = False
    ahead: int = 4
    seed: int = 0

    @property
    def window_steps(self) -> int:
        """Steps planned at a time: until the next refit, and enough to run ahead on."""
        return max(self.policy.refit_every, 2 * self.ahead if self.frozen else 1)
