"""Which samples of an epoch are free, planned or trained: every sample once an epoch.

A sample is a position in its device's order of the epoch: a permutation, or, where the policy plans
by class, one in which class after class has its own block. A range is free until it is taken
for a step, then outstanding until that step was applied (trained) or it is given back (free).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from wire.errors import LocalProtocolError

Range = tuple[int, int]  # offset, count


def class_blocks(label_counts: Sequence[int]) -> list[Range]:
    """The positions of each class in the order by class: class 0's first, then class 1's, …"""
    starts = accumulate(label_counts, initial=0)
    return list(zip(starts, label_counts, strict=False))


class DeviceAccount:
    """The ranges of one device in one epoch."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.trained = 0
        self._free: list[Range] = [(0, samples)] if samples else []
        self._outstanding: set[Range] = set()

    @property
    def free(self) -> int:
        """Samples that no step holds and that are not trained yet."""
        return sum(count for _, count in self._free)

    def free_within(self, block: Range) -> int:
        """Free samples of a block of positions."""
        start, stop = block[0], block[0] + block[1]
        parts = (min(offset + size, stop) - max(offset, start) for offset, size in self._free)
        return sum(part for part in parts if part > 0)

    def take(self, count: int, within: Range | None = None) -> list[Range]:
        """Take ``count`` free samples, lowest offsets first, as few ranges as that gives.

        ``within``: only from this block of positions.
        """
        block = (0, self.samples) if within is None else within
        if count > self.free_within(block):
            free = self.free_within(block)
            raise LocalProtocolError(f"cannot take {count} samples, {free} are free")
        taken: list[Range] = []
        free_after: list[Range] = []
        for offset, size in self._free:
            begin = max(offset, block[0])
            end = min(offset + size, block[0] + block[1], begin + count)
            if begin >= end:
                free_after.append((offset, size))
                continue
            taken.append((begin, end - begin))
            count -= end - begin
            around = ((offset, begin - offset), (end, offset + size - end))
            free_after += [span for span in around if span[1]]
        self._free = free_after
        self._outstanding.update(taken)
        return taken

    def give_back(self, span: Range) -> None:
        """Return an outstanding range to the free ones, joined with its neighbours."""
        self._settle(span)
        offset, count = span
        index = bisect_left(self._free, span)
        if index < len(self._free) and offset + count == self._free[index][0]:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            before, size = self._free.pop(index - 1)
            offset, count, index = before, size + count, index - 1
        self._free.insert(index, (offset, count))

    def mark_trained(self, span: Range) -> None:
        """Count an outstanding range as trained."""
        self._settle(span)
        self.trained += span[1]

    def _settle(self, span: Range) -> None:
        if span not in self._outstanding:
            raise LocalProtocolError(f"range {span} is not outstanding")
        self._outstanding.remove(span)

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        return {
            "samples": self.samples,
            "trained": self.trained,
            "free": [list(span) for span in self._free],
            "outstanding": [list(span) for span in sorted(self._outstanding)],
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> DeviceAccount:
        account = cls(document["samples"])
        account.trained = document["trained"]
        account._free = [(offset, count) for offset, count in document["free"]]
        account._outstanding = {(offset, count) for offset, count in document["outstanding"]}
        return account


class EpochAccount:
    """The accounts of all devices that have taken part in an epoch."""

    def __init__(self) -> None:
        self.devices: dict[str, DeviceAccount] = {}

    def add(self, device: str, samples: int) -> None:
        """Take a device in with all its samples; one that is known keeps its account."""
        self.devices.setdefault(device, DeviceAccount(samples))

    def holds(self, device: str, samples: int) -> bool:
        """Tell whether the device is unknown here, or known with just this many samples."""
        account = self.devices.get(device)
        return account is None or account.samples == samples

    def give_back(self, device: str, spans: Iterable[Range]) -> None:
        """Return outstanding ranges of a device to the free ones."""
        for span in spans:
            self.devices[device].give_back(span)

    def mark_trained(self, device: str, spans: Iterable[Range]) -> None:
        """Count outstanding ranges of a device as trained."""
        for span in spans:
            self.devices[device].mark_trained(span)

    def free(self, device: str) -> int:
        account = self.devices.get(device)
        return 0 if account is None else account.free

    def free_by_class(self, device: str, label_counts: Sequence[int]) -> list[int]:
        """Free samples of each class's block of the order by class."""
        account = self.devices[device]
        return [account.free_within(block) for block in class_blocks(label_counts)]

    def untrained(self) -> dict[str, int]:
        """Samples not trained, by device, where there are any."""
        rest = {name: a.samples - a.trained for name, a in sorted(self.devices.items())}
        return {name: count for name, count in rest.items() if count}

    def finished(self) -> dict[str, int]:
        """Samples by device, of those that have been trained on all of theirs."""
        return {name: a.samples for name, a in self.devices.items() if a.trained == a.samples}

    @property
    def samples(self) -> int:
        return sum(account.samples for account in self.devices.values())

    @property
    def trained(self) -> int:
        return sum(account.trained for account in self.devices.values())

    def document(self) -> dict[str, Any]:
        """State as JSON-able data."""
        return {name: account.document() for name, account in self.devices.items()}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> EpochAccount:
        account = cls()
        account.devices = {
            name: DeviceAccount.from_document(part) for name, part in document.items()
        }
        return account
