"""Which devices there are, what they hold and what was refused from them. Pure.

A device is online by its birth unless a state with the birth's own boot counter says otherwise:
last wills can arrive after the next birth, and are then not about it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.planning import Member
from wire.errors import PeerProtocolError, Refusal
from wire.messages import Birth, DeviceState, Precision, SampleOrder, Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a device must have to take part in the run."""

    bundle: str
    input_shape: tuple[int, ...]
    classes: int
    trainable: bool
    precision: Precision
    by_class: bool = False


@dataclass(slots=True)
class Device:
    """One device as the coordinator knows it; bytes are payload bytes."""

    name: str
    birth: Birth | None = None
    state: DeviceState | None = None
    problem: str = ""  # why it cannot take part
    refused: Counter[str] = field(default_factory=Counter)
    telemetry: Telemetry | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def is_online(self) -> bool:
        if self.birth is None:
            return False
        state = self.state
        return state is None or state.boot != self.birth.boot or state.online

    def shortcoming(self, required: Requirements) -> str:  # noqa: PLR0911 (a list of checks)
        """Why the device cannot take part, whatever its bundle; empty if it can."""
        birth = self.birth
        if birth is None:
            return "no birth message yet"
        if birth.sample_shape != required.input_shape:
            return f"samples have shape {birth.sample_shape}, expected {required.input_shape}"
        if len(birth.label_counts) > required.classes:
            return f"{len(birth.label_counts)} classes, expected at most {required.classes}"
        if required.trainable and not birth.capabilities.backward:
            return f"cannot train: {birth.capabilities.reason or 'no backward pass'}"
        if required.precision not in birth.capabilities.precisions:
            return f"precision {required.precision.value} is not supported"
        if required.by_class and SampleOrder.BY_CLASS not in birth.capabilities.orders:
            return "cannot take samples by class, as policy class-targeted asks"
        return ""

    def has_bundle(self, required: Requirements) -> bool:
        return self.birth is not None and self.birth.bundle == required.bundle

    def member(self, classes: int, largest_batch: int) -> Member:
        """The device as the planner sees it; ``largest_batch`` is what one message can carry."""
        birth = self.birth
        assert birth is not None
        counts = birth.label_counts + (0,) * (classes - len(birth.label_counts))
        limit = min(birth.max_batch or largest_batch, largest_batch)
        return Member(self.name, counts, limit)


class Registry:
    """All devices of the fleet by id."""

    def __init__(self) -> None:
        self.devices: dict[str, Device] = {}
        self.refused: Counter[str] = Counter()  # from nobody known

    def device(self, name: str) -> Device:
        """The device, known from now on."""
        return self.devices.setdefault(name, Device(name))

    def known(self, name: str) -> Device:
        """A device that has announced itself; raises PeerProtocolError for any other."""
        device = self.devices.get(name)
        if device is None or device.birth is None:
            raise PeerProtocolError(Refusal.UNKNOWN_DEVICE, f"{name} has sent no birth")
        return device

    def on_birth(self, name: str, birth: Birth) -> Device:
        """Take a birth; raises PeerProtocolError for one that contradicts itself."""
        if sum(birth.label_counts) != birth.samples:
            raise PeerProtocolError(
                Refusal.MALFORMED,
                f"label_counts sum to {sum(birth.label_counts)}, samples is {birth.samples}",
            )
        device = self.device(name)
        if device.birth is not None and birth.boot < device.birth.boot:
            raise PeerProtocolError(Refusal.LATE, f"boot {device.birth.boot} is newer")
        device.birth = birth
        return device

    def on_state(self, name: str, state: DeviceState) -> Device:
        """Take an online or offline message; one of an earlier boot changes nothing."""
        device = self.device(name)
        if device.birth is not None and state.boot < device.birth.boot:
            raise PeerProtocolError(Refusal.LATE, f"boot {device.birth.boot} is newer")
        device.state = state
        return device

    def count_refusal(self, name: str | None, reason: Refusal) -> int:
        """Count a dropped message; the number so far with this reason."""
        device = None if name is None else self.devices.get(name)
        counter = self.refused if device is None else device.refused
        counter[reason.value] += 1
        return counter[reason.value]

    def refused_in_all(self) -> dict[str, int]:
        """Dropped messages by reason, over all devices."""
        total = Counter(self.refused)
        for device in self.devices.values():
            total.update(device.refused)
        return dict(sorted(total.items()))
