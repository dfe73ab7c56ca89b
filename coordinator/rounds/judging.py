"""Which slot a message belongs to, or why it fits none: nothing is changed by it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.actions import Phase
from coordinator.planning import PlannedSlot, PlannedStep
from coordinator.rounds.open_step import StepUnderWay
from coordinator.rounds.settings import RoundSettings
from coordinator.rounds.upcoming import UpcomingSteps
from wire.errors import PeerProtocolError, Refusal
from wire.messages import RangeHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the run is when a message comes in."""

    phase: Phase
    epoch: int
    step: int  # under way, or the last one
    version: int  # of the weights
    settings: RoundSettings
    opened: StepUnderWay | None
    upcoming: UpcomingSteps


def find_activations(
    standing: Standing, device: str, header: RangeHeader, weights_version: int
) -> PlannedSlot:
    """The slot that activations belong to; raises PeerProtocolError if they fit none."""
    _check_epoch(standing, header)
    opened = standing.opened
    if opened is None or header.step != opened.plan.step:
        return _find_ahead(standing, device, header)
    slot = _find_slot(opened.plan, device, header)
    if slot in opened.lost:
        raise PeerProtocolError(Refusal.LATE, f"step {header.step} goes on without this range")
    if slot in opened.received:
        raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has this range")
    if not standing.settings.frozen:
        _check_version(standing, weights_version)
    return slot


def find_gradients(
    standing: Standing, device: str, header: RangeHeader, weights_version: int
) -> PlannedSlot:
    """The slot that gradients belong to; raises PeerProtocolError if they fit none."""
    _check_epoch(standing, header)
    opened = standing.opened
    if header.step < standing.step or opened is None:
        raise PeerProtocolError(Refusal.LATE, f"step {header.step} is over")
    if header.step > standing.step or standing.phase is not Phase.BACKWARD:
        raise PeerProtocolError(Refusal.EARLY, f"step {header.step} awaits no gradients")
    slot = _find_slot(opened.plan, device, header)
    if slot in opened.lost:
        raise PeerProtocolError(Refusal.LATE, f"step {header.step} goes on without this range")
    if slot not in opened.awaited:
        raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has this range")
    _check_version(standing, weights_version)
    return slot


def _find_ahead(standing: Standing, device: str, header: RangeHeader) -> PlannedSlot:
    """Activations for a step that is not open: late, or ahead of it in a frozen run."""
    on, settings = standing.step, standing.settings
    if header.step <= on:
        raise PeerProtocolError(Refusal.LATE, f"step {header.step} is over")
    if not settings.frozen or header.step > on + settings.ahead:
        raise PeerProtocolError(Refusal.EARLY, f"step {on} is on, not {header.step}")
    plan = standing.upcoming.find(header.step)
    if plan is None:
        raise PeerProtocolError(Refusal.NOT_ALLOCATED, f"step {header.step} is not planned")
    slot = _find_slot(plan, device, header)
    if standing.upcoming.has_come(header.step, slot):
        raise PeerProtocolError(Refusal.DUPLICATE, f"step {header.step} has it")
    return slot


def _check_epoch(standing: Standing, header: RangeHeader) -> None:
    if header.epoch != standing.epoch:
        reason = Refusal.LATE if header.epoch < standing.epoch else Refusal.EARLY
        raise PeerProtocolError(reason, f"epoch {standing.epoch} is on, not {header.epoch}")


def _check_version(standing: Standing, weights_version: int) -> None:
    if weights_version != standing.version:
        raise PeerProtocolError(
            Refusal.STALE_WEIGHTS,
            f"expected weights version {standing.version}, received {weights_version}",
        )


def _find_slot(plan: PlannedStep, device: str, header: RangeHeader) -> PlannedSlot:
    slot = plan.slots_by_name.get((device, header.offset, header.count))
    if slot is None:
        raise PeerProtocolError(
            Refusal.NOT_ALLOCATED,
            f"step {header.step} holds no range [{header.offset}, {header.count}] of {device}",
        )
    return slot
