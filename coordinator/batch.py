"""The global batch of a step as it fills: rows in device order, decoded straight into place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.planning import PlannedSlot, PlannedStep
from wire.codec import Tensors
from wire.precision import read_floats, read_labels

Floats = NDArray[np.float32]


class StepBatch:
    """Activations (B, …) and labels (B,) of one step, and the gradients that come back."""

    def __init__(
        self, plan: PlannedStep, *, activation_shape: tuple[int, ...], classes: int
    ) -> None:
        self.plan = plan
        self._classes = classes
        self._activations = np.empty((plan.samples, *activation_shape), np.float32)
        self._labels = np.empty(plan.samples, np.int64)
        self._gradients: dict[PlannedSlot, dict[str, Floats]] = {}  # wait for earlier slots
        self._total: dict[str, Floats] = {}
        self._summed = 0  # slots of the plan that are in the total, or never will be
        self._samples = 0  # in the total
        self._rows: dict[PlannedSlot, slice] = {}
        start = 0
        for slot in plan.slots:
            self._rows[slot] = slice(start, start + slot.count)
            start += slot.count

    def read_activations(self, slot: PlannedSlot, tensors: Tensors) -> None:
        """Decode a slot's activations and labels into their rows; PeerProtocolError if unfit."""
        rows = self._rows[slot]
        labels = read_labels(tensors, "labels", slot.count, self._classes)
        target = self._activations[rows]
        read_floats(tensors, "activations", target.shape, out=target)
        self._labels[rows] = labels

    def rows(self, slots: Sequence[PlannedSlot]) -> tuple[Floats, NDArray[np.int64]]:
        """Activations and labels of these slots, in this order; no copy when it is all of them."""
        if tuple(slots) == self.plan.slots:
            return self._activations, self._labels
        index = np.concatenate(
            [np.arange(r.start, r.stop) for r in map(self._rows.get, slots) if r]
        )
        return self._activations[index], self._labels[index]

    def class_counts(self, slots: Sequence[PlannedSlot]) -> NDArray[np.int64]:
        """Samples per class in these slots."""
        _, labels = self.rows(slots)
        return np.bincount(labels, minlength=self._classes).astype(np.int64)

    def add_gradients(self, slot: PlannedSlot, gradients: dict[str, Floats]) -> None:
        """Take a slot's parameter gradients (the arrays become the batch's own).

        Slots are summed in plan order, whenever they came, so that the order of arrival never
        shows in the bits; only those that wait for an earlier one are kept.
        """
        self._gradients[slot] = gradients
        slots = self.plan.slots
        while self._summed < len(slots) and slots[self._summed] in self._gradients:
            self._add_next()

    def sum_gradients(self, slots: Sequence[PlannedSlot], scale: float) -> dict[str, Floats]:
        """Sum over ``slots``, all that gave gradients, times ``scale``; the batch ends with it."""
        while self._summed < len(self.plan.slots):
            self._add_next()
        assert self._samples == sum(slot.count for slot in slots), "a slot gave no gradients"
        if scale != 1.0:
            for array in self._total.values():
                np.multiply(array, np.float32(scale), out=array)
        return self._total

    def _add_next(self) -> None:
        """Add the next slot of the plan to the sum, if it has contributed."""
        slot = self.plan.slots[self._summed]
        self._summed += 1
        gradients = self._gradients.pop(slot, None)
        if gradients is None:
            return
        self._samples += slot.count
        if not self._total:
            self._total = gradients
            return
        for name, array in gradients.items():
            self._total[name] += array
