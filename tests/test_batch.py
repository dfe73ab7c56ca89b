"""The global batch of a step: rows in device order, whatever the order of arrival."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from coordinator.batch import StepBatch
from coordinator.planning import PlannedSlot, PlannedStep
from wire.codec import Tensors
from wire.errors import PeerProtocolError

A, B, C = PlannedSlot("a", 0, 2), PlannedSlot("b", 4, 3), PlannedSlot("c", 0, 1)
PLAN = PlannedStep(7, (A, B, C))
SHAPE = (2, 2)


def _tensors(slot: PlannedSlot, value: float, label: int = 0) -> Tensors:
    activations = np.full((slot.count, *SHAPE), value, np.float32)
    labels = np.full(slot.count, label, np.int64)
    return Tensors({}, {"activations": activations, "labels": labels})


def _batch() -> StepBatch:
    return StepBatch(PLAN, activation_shape=SHAPE, classes=4)


def _filled() -> StepBatch:
    batch = _batch()
    for slot, value, label in ((C, 3.0, 3), (A, 1.0, 0), (B, 2.0, 1)):
        batch.read_activations(slot, _tensors(slot, value, label))
    return batch


def test_rows_are_in_plan_order_whatever_the_order_of_arrival() -> None:
    x, y = _filled().rows(PLAN.slots)
    assert x.shape == (6, *SHAPE)
    assert x[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 3]
    assert y.tolist() == [0, 0, 1, 1, 1, 3]


def test_all_rows_are_not_copied_and_parts_are_independent() -> None:
    batch = _filled()
    assert batch.rows(PLAN.slots)[0] is batch.rows(PLAN.slots)[0]
    part, _ = batch.rows((A,))
    part[:] = 99.0
    assert batch.rows(PLAN.slots)[0].max() == 3.0


def test_rows_of_some_slots_leave_the_others_out() -> None:
    x, y = _filled().rows((A, C))
    assert x[:, 1, 1].tolist() == [1, 1, 3]
    assert y.tolist() == [0, 0, 3]


def test_class_counts_have_every_class() -> None:
    assert _filled().class_counts(PLAN.slots).tolist() == [2, 3, 0, 1]
    assert _filled().class_counts((B,)).tolist() == [0, 3, 0, 0]


def test_refused_activations_leave_the_labels_and_other_rows_alone() -> None:
    batch = _filled()
    bad = _tensors(B, np.inf, 2)
    with pytest.raises(PeerProtocolError):
        batch.read_activations(B, bad)
    with pytest.raises(PeerProtocolError):
        batch.read_activations(B, _tensors(B, 0.0, 4))
    x, y = batch.rows((A, C))
    assert x[:, 0, 0].tolist() == [1, 1, 3]
    batch.read_activations(B, _tensors(B, 5.0, 2))
    assert batch.rows((B,))[0].tolist() == np.full((3, *SHAPE), 5.0).tolist()
    assert y.tolist() == [0, 0, 3]


def test_range_that_is_not_planned_has_no_place() -> None:
    with pytest.raises(KeyError):
        _batch().read_activations(PlannedSlot("a", 0, 3), _tensors(A, 1.0))


def _gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(40, 3)).astype(np.float32),
        "b": rng.normal(size=40).astype(np.float32),
    }


def test_sum_of_gradients_does_not_depend_on_the_order_of_arrival() -> None:
    sums = []
    for order in ((A, B, C), (C, B, A), (B, A, C)):
        batch = _batch()
        for slot in order:
            batch.add_gradients(slot, _gradients(slot.offset + slot.count))
        sums.append(batch.sum_gradients(PLAN.slots, 1.0))
    for other in sums[1:]:
        assert all(np.array_equal(sums[0][name], other[name]) for name in ("w", "b"))


def test_sum_leaves_out_lost_slots_and_scales_to_those_that_are_left() -> None:
    batch = _batch()
    for slot in (C, A):
        batch.add_gradients(slot, _gradients(slot.count))
    total = batch.sum_gradients((A, C), 6 / 3)
    expected = 2 * (_gradients(A.count)["w"].astype(np.float64) + _gradients(C.count)["w"])
    np.testing.assert_allclose(total["w"], expected, rtol=1e-6, atol=1e-7)


def test_only_gradients_that_wait_for_an_earlier_slot_are_kept() -> None:
    batch = _batch()
    references = []
    for slot in (B, A, C):
        gradients = {"w": np.full((40, 3), float(slot.count), np.float32)}
        references.append(weakref.ref(gradients["w"]))
        batch.add_gradients(slot, gradients)
        del gradients
    alive = [reference() is not None for reference in references]
    assert alive == [False, True, False]  # A's memory has become the sum's
    assert batch.sum_gradients(PLAN.slots, 1.0)["w"][0, 0] == sum(s.count for s in PLAN.slots)
