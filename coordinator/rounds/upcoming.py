"""The steps that are planned and not open yet, and what has come for them already.

In a frozen run devices run ahead: they answer planned steps before these are opened, and will not
answer the same step again. A plan that is dropped there takes its step numbers with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordinator.accounting import EpochAccount
from coordinator.planning import DelaysOf, Member, PlannedSlot, PlannedStep, WindowPlanner
from coordinator.rounds.settings import RoundSettings


class UpcomingSteps:
    """The window of planned steps; empty once nothing more can be planned."""

    def __init__(self, settings: RoundSettings) -> None:
        self._settings = settings
        self._planner = WindowPlanner(
            settings.policy, global_batch=settings.global_batch, seed=settings.seed
        )
        self._early: set[tuple[int, PlannedSlot]] = set()
        self._skipped_to = 0  # step numbers that a dropped plan of a frozen run has used

    def __iter__(self) -> Iterator[PlannedStep]:
        return iter(self._planner.window)

    def __bool__(self) -> bool:
        return bool(self._planner.window)

    @property
    def last_delta(self) -> float | None:
        """The delay weight that LDS used last."""
        return self._planner.last_delta

    @property
    def heeds_measured_delays(self) -> bool:
        """Whether other delays would give another plan."""
        return self._planner.heeds_measured_delays

    def find(self, step: int) -> PlannedStep | None:
        """The plan of a step, or None where it is not planned."""
        return next((plan for plan in self if plan.step == step), None)

    def counts_on(self, devices: set[str]) -> bool:
        """Whether the plan, or what would be planned next, holds any of these devices."""
        return bool(devices & self._planner.devices())

    # Planning

    def forget(self) -> None:
        """Heed changed members or samples at the next refill; what is planned stays."""
        self._planner.forget()

    def refill(
        self,
        account: EpochAccount,
        members: Mapping[str, Member],
        *,
        epoch: int,
        last_step: int,
        delays_of: DelaysOf,
    ) -> frozenset[str]:
        """Plan more steps where the window runs low; returns whose allocations that changes."""
        window = self._planner.window
        if len(window) > (self._settings.ahead if self._settings.frozen else 0):
            return frozenset()
        added = self._planner.refill(
            account,
            members,
            epoch=epoch,
            next_step=max(window[-1].step if window else last_step, self._skipped_to) + 1,
            steps=self._settings.window_steps,
            delays_of=delays_of,
        )
        return self._devices() if added else frozenset()

    def drop(self, account: EpochAccount) -> frozenset[str]:
        """Give all planned ranges back; returns the devices whose allocations have held them."""
        window, told = self._planner.window, self._devices()
        if window and self._settings.frozen:
            # Devices that ran ahead have sent some of these ranges and would not send them again:
            # the numbers are not used for other ranges, and what came early is of no use.
            self._skipped_to = window[-1].step
            self._early.clear()
        self._planner.clear(account)
        return told

    def _devices(self) -> frozenset[str]:
        return frozenset().union(*(plan.devices for plan in self))

    # Answers ahead of their step

    def has_come(self, step: int, slot: PlannedSlot) -> bool:
        """Whether activations of a planned step are there already."""
        return (step, slot) in self._early

    def came(self, step: int, slot: PlannedSlot) -> None:
        """Activations of a planned step are there."""
        self._early.add((step, slot))

    def take_first(self) -> tuple[PlannedStep, set[PlannedSlot]]:
        """The next step, and its slots whose activations are there already."""
        plan = self._planner.window.popleft()
        early = {slot for step, slot in self._early if step == plan.step} & plan.slot_set
        self._early = {(step, slot) for step, slot in self._early if step > plan.step}
        return plan, early

    def put_back(self, plan: PlannedStep) -> None:
        """A step that was opened is to be opened again; nothing has come for any step."""
        self._planner.window.appendleft(plan)
        self._early.clear()

    # Checkpoints

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        return {"skipped_to": self._skipped_to, "planner": self._planner.document()}

    def restore(self, document: dict[str, Any]) -> None:
        """Take up the state that ``document`` gave."""
        self._skipped_to = document["skipped_to"]
        self._planner.restore(document["planner"])
