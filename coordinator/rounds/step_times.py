"""What answers took: how slow each device is, how long to wait, and who has changed for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.delays import DelayEstimator, FleetDelays
from coordinator.patience import DeadlineSettings, PhaseClock
from coordinator.planning import PlannedSlot
from wire.messages import RangeHeader

EstimatorOf = Callable[[str], DelayEstimator | None]

# A fleet that keeps changing must not be planned anew at every step: a plan costs as much as many
# of its steps where there are thousands of devices.
REPLAN_PAUSE_STEPS = 5
REMEMBERED_STEPS = 64  # how far back a late message still tells how slow its device is


class StepTimes:
    """Measures devices and phases; all times are of the owner's monotonic clock."""

    def __init__(self, settings: DeadlineSettings) -> None:
        self.delays = FleetDelays()
        self._forward = PhaseClock(settings, self._expected_forward_s)
        self._backward = PhaseClock(settings, self._expected_backward_s)
        self._opened_at: dict[int, float] = {}
        self._beliefs: dict[tuple[str, str], tuple[float, float]] = {}
        self._speed_changed = False  # of some device, for good, since it was last asked
        self._quiet_until_step = 0

    # How long to wait

    def forward_allowance_s(self, slots: tuple[PlannedSlot, ...]) -> float:
        """Seconds that these slots' activations may take."""
        return self._forward.allowance_s(slots)

    def backward_allowance_s(self, slots: tuple[PlannedSlot, ...]) -> float:
        """Seconds that these slots' parameter gradients may take."""
        return self._backward.allowance_s(slots)

    def _expected_forward_s(self, device: str, count: int) -> float | None:
        return self._believed_s(self.delays.forward, device, count)

    def _expected_backward_s(self, device: str, count: int) -> float | None:
        return self._believed_s(self.delays.backward, device, count)

    def _believed_s(self, phase: EstimatorOf, device: str, count: int) -> float | None:
        """What is known of a device, looked up once a window: a fit costs as much as a message."""
        key = (phase.__name__, device)
        if key not in self._beliefs:
            estimator = phase(device)
            if estimator is None:
                return None
            self._beliefs[key] = (estimator.fixed_s, estimator.per_sample_s)
        fixed_s, per_sample_s = self._beliefs[key]
        return fixed_s + per_sample_s * count

    # What was measured

    def step_opened(self, step: int, now_s: float) -> None:
        """The go for a step was given."""
        self._opened_at[step] = now_s
        self._opened_at.pop(step - REMEMBERED_STEPS, None)

    def activations_came(self, device: str, count: int, seconds: float) -> None:
        """All that a device owed of the forward phase is there, ``seconds`` after the go."""
        self._speed_changed |= self.delays.observe_forward(device, count, max(0.0, seconds))

    def activations_came_late(self, device: str, header: RangeHeader, now_s: float) -> None:
        """A device answered a step that is over: that tells how slow it is."""
        opened_s = self._opened_at.get(header.step)
        # It may have come while the owner was at work, before the step was opened: no measure.
        if opened_s is not None and now_s >= opened_s:
            self.activations_came(device, header.count, now_s - opened_s)
            self._beliefs.pop((self.delays.forward.__name__, device), None)

    def gradients_came(self, device: str, count: int, seconds: float) -> None:
        """All that a device owed of the backward phase is there, ``seconds`` after its start."""
        self._speed_changed |= self.delays.observe_backward(device, count, max(0.0, seconds))

    def forward_took(self, seconds: float) -> None:
        """A forward phase in which nobody was lost took so long."""
        self._forward.durations_s.append(seconds)

    def backward_took(self, seconds: float) -> None:
        """A backward phase in which nobody was lost took so long."""
        self._backward.durations_s.append(seconds)

    # What follows for the plan

    def take_speed_change(self, step: int) -> bool:
        """Tell, once, that a device has changed its speed for good; not at every step anew."""
        if not self._speed_changed or step < self._quiet_until_step:
            return False
        self._speed_changed = False
        self._quiet_until_step = step + REPLAN_PAUSE_STEPS
        return True

    def plan_made(self) -> None:
        """Look at every device anew."""
        self._beliefs.clear()

    # Checkpoints

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        return {
            "forward_s": list(self._forward.durations_s),
            "backward_s": list(self._backward.durations_s),
            "delays": self.delays.state(),
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Take up the state that ``document`` gave."""
        self._forward.durations_s.extend(document["forward_s"])
        self._backward.durations_s.extend(document["backward_s"])
        self.delays = FleetDelays.from_state(document["delays"])
