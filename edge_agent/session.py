"""What a device does next: the step protocol of the agent as a state machine.

No sockets, clock, files, threads or tensors. The device keeps no sampling state: an allocation
and the go of a step (``fleet/weights``, or ``fleet/state`` in a frozen run) say what is due, so
the same range can be asked for again, after a crash too, and means the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from wire.errors import PeerProtocolError, Refusal
from wire.messages import (
    Allocation,
    CutGradientHeader,
    FleetState,
    Mode,
    SampleOrder,
    Slot,
    WeightsHeader,
)

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SendActivations:
    """Run the client segment on this slot and publish its activations.

    ``ranges`` are its samples as (offset, count) in the allocation's order.
    """

    allocation: Allocation
    slot: Slot
    weights_version: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class SendGradients:
    """Run the client segment's backward pass on this slot and publish the gradients."""

    allocation: Allocation
    slot: Slot
    weights_version: int
    ranges: Ranges


@dataclass(slots=True)
class Session:
    """The latest word of the coordinator, and what this process has answered to it.

    ``samples`` is how many this device holds, ``bundle`` the digest of the installed one.
    """

    samples: int
    bundle: str | None = None
    allocation: Allocation | None = None
    weights: WeightsHeader | None = None
    fleet: FleetState | None = None
    _sent: set[Slot] = field(default_factory=set)
    _answered: set[Slot] = field(default_factory=set)
    # Of the allocation's slots, and of those sent: a newer one need not name the step under way.
    _ranges: dict[Slot, Ranges] = field(default_factory=dict)

    def on_allocation(self, allocation: Allocation) -> None:
        """Take a new allocation; raises PeerProtocolError for an older or impossible one."""
        held = self.allocation
        if held is not None and held.run == allocation.run and allocation.plan < held.plan:
            raise PeerProtocolError(Refusal.LATE, f"plan {held.plan} is newer")
        ranges = _ranges_of(allocation)
        for offset, count in chain.from_iterable(ranges.values()):
            if offset + count > self.samples:
                raise PeerProtocolError(
                    Refusal.NOT_ALLOCATED,
                    f"range [{offset}, {count}] is beyond {self.samples} samples",
                )
        if held is None or held.run != allocation.run or held.epoch != allocation.epoch:
            self._sent.clear()
            self._answered.clear()
        self._ranges = {slot: self._ranges[slot] for slot in self._sent} | ranges
        self.allocation = allocation

    def on_weights(self, header: WeightsHeader) -> None:
        """Take the go of a step."""
        held = self.weights
        if held is not None and held.run == header.run and header.step < held.step:
            raise PeerProtocolError(Refusal.LATE, f"step {held.step} is on")
        self.weights = header
        self._sent = {slot for slot in self._sent if slot.step >= header.step}
        self._answered = {slot for slot in self._answered if slot.step >= header.step}

    def drop_weights(self) -> None:
        """The newest weights cannot be used: nothing is due until others come."""
        self.weights = None

    def on_fleet_state(self, state: FleetState) -> None:
        """Take where the run is: the go of a frozen run."""
        self.fleet = state
        if self.allocation is not None and self.allocation.mode is Mode.FROZEN:
            self._sent = {slot for slot in self._sent if slot.step >= state.step}

    def on_cut_gradient(self, header: CutGradientHeader) -> SendGradients:
        """The backward pass that a cut gradient asks for; raises PeerProtocolError if none."""
        allocation, weights = self.allocation, self.weights
        if allocation is None or header.run != allocation.run:
            raise PeerProtocolError(Refusal.FOREIGN_RUN, f"run {header.run!r} is not ours")
        if allocation.bundle != self.bundle:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, "another bundle is in use by now")
        slot = Slot(header.step, header.offset, header.count)
        if weights is None or weights.run != header.run or weights.step != header.step:
            reason = Refusal.LATE if weights and header.step < weights.step else Refusal.EARLY
            raise PeerProtocolError(reason, f"the weights of step {header.step} are not here")
        if slot not in allocation.slots and slot not in self._sent:
            raise PeerProtocolError(Refusal.NOT_ALLOCATED, f"{slot} is not ours")
        if slot in self._answered:
            raise PeerProtocolError(Refusal.DUPLICATE, f"{slot} was answered")
        return SendGradients(allocation, slot, weights.version, self._ranges[slot])

    def next_work(self) -> SendActivations | None:
        """The next range to run forward, or None; ask again after each one."""
        allocation = self.allocation
        if allocation is None or allocation.bundle != self.bundle:
            return None
        due = [slot for slot in self._due(allocation) if slot not in self._sent]
        if not due:
            return None
        version = self.weights.version if self.weights and allocation.mode is Mode.LOCKSTEP else 0
        slot = min(due)
        return SendActivations(allocation, slot, version, self._ranges[slot])

    @property
    def is_mid_step(self) -> bool:
        """Activations are out whose cut gradient may still come: the step needs this bundle."""
        allocation, weights = self.allocation, self.weights
        if allocation is None or weights is None or allocation.mode is Mode.FROZEN:
            return False
        if self.fleet is not None and not self.fleet.online:
            return False
        if not allocation.bundle == weights.bundle == self.bundle:
            return False
        return any(slot.step == weights.step for slot in self._sent - self._answered)

    def mark_sent(self, work: SendActivations | SendGradients) -> None:
        """The answer was handed to the broker; without this it stays due."""
        done = self._sent if isinstance(work, SendActivations) else self._answered
        done.add(work.slot)

    def _due(self, allocation: Allocation) -> list[Slot]:
        if allocation.mode is Mode.FROZEN:
            state = self.fleet
            if state is None or state.run != allocation.run or not state.online:
                return []
            first, last = state.step, state.step + allocation.ahead
            return [slot for slot in allocation.slots if first <= slot.step <= last]
        weights = self.weights
        if weights is None or weights.run != allocation.run or weights.bundle != self.bundle:
            return []
        if weights.epoch != allocation.epoch:
            return []
        return [slot for slot in allocation.slots if slot.step == weights.step]


def _ranges_of(allocation: Allocation) -> dict[Slot, Ranges]:
    """The ranges that each slot is made of; PeerProtocolError where they contradict the slots."""
    if allocation.order is SampleOrder.SHUFFLED:
        return {slot: ((slot.offset, slot.count),) for slot in allocation.slots}
    if len(allocation.ranges) != len(allocation.slots):
        raise PeerProtocolError(
            Refusal.MALFORMED,
            f"expected ranges of {len(allocation.slots)} slots, received {len(allocation.ranges)}",
        )
    for slot, ranges in zip(allocation.slots, allocation.ranges, strict=True):
        if sum(count for _, count in ranges) != slot.count or ranges[0][0] != slot.offset:
            raise PeerProtocolError(Refusal.MALFORMED, f"the ranges of {slot} are not those of it")
    return dict(zip(allocation.slots, allocation.ranges, strict=True))
