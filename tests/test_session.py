"""What a device does next: allocations, weights, cut gradients, and running ahead."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_agent.session import SendActivations, SendGradients, Session
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

BUNDLE = "digest"
ALLOCATION = Allocation(
    run="run.1",
    epoch=0,
    seed=1,
    plan=1,
    bundle=BUNDLE,
    slots=(Slot(1, 0, 4), Slot(2, 4, 4), Slot(2, 12, 2), Slot(4, 8, 4)),
)


def _session(allocation: Allocation | None = ALLOCATION) -> Session:
    session = Session(samples=14, bundle=BUNDLE)
    if allocation is not None:
        session.on_allocation(allocation)
    return session


def _weights(step: int, **changes: object) -> WeightsHeader:
    header = WeightsHeader(run="run.1", epoch=0, step=step, version=step - 1, bundle=BUNDLE)
    return msgspec.structs.replace(header, **changes)


def _cut(step: int, offset: int, count: int, run: str = "run.1") -> CutGradientHeader:
    return CutGradientHeader(run=run, epoch=0, step=step, offset=offset, count=count)


def _changed(**changes: object) -> Allocation:
    return msgspec.structs.replace(ALLOCATION, **changes)


def _send_all(session: Session) -> list[Slot]:
    """Do all that is due now."""
    done = []
    while (work := session.next_work()) is not None:
        session.mark_sent(work)
        done.append(work.slot)
    return done


def _reason(session: Session, header: CutGradientHeader) -> Refusal:
    with pytest.raises(PeerProtocolError) as caught:
        session.on_cut_gradient(header)
    return caught.value.reason


def test_nothing_is_due_before_the_go() -> None:
    assert _session().next_work() is None
    assert Session(samples=14, bundle=BUNDLE).next_work() is None


def test_weights_are_the_go_of_their_own_step_only() -> None:
    session = _session()
    session.on_weights(_weights(1))
    assert session.next_work() == SendActivations(ALLOCATION, Slot(1, 0, 4), 0, ((0, 4),))
    assert _send_all(session) == [Slot(1, 0, 4)]
    session.on_weights(_weights(3))
    assert session.next_work() is None
    session.on_weights(_weights(4))
    assert session.next_work() == SendActivations(ALLOCATION, Slot(4, 8, 4), 3, ((8, 4),))


def test_weights_that_came_before_the_allocation_count() -> None:
    session = _session(None)
    session.on_weights(_weights(1))
    assert session.next_work() is None
    session.on_allocation(ALLOCATION)
    assert _send_all(session) == [Slot(1, 0, 4)]


def test_several_ranges_of_a_step_are_done_in_order() -> None:
    session = _session()
    session.on_weights(_weights(2))
    assert _send_all(session) == [Slot(2, 4, 4), Slot(2, 12, 2)]


def test_work_stays_due_until_it_was_handed_over() -> None:
    session = _session()
    session.on_weights(_weights(1))
    assert session.next_work() == session.next_work()
    work = session.next_work()
    assert work is not None
    session.mark_sent(work)
    assert session.next_work() is None


def test_same_go_again_asks_for_nothing_new() -> None:
    session = _session()
    session.on_weights(_weights(1))
    _send_all(session)
    session.on_weights(_weights(1))
    assert session.next_work() is None


@pytest.mark.parametrize(
    "changes",
    [{"run": "run.2"}, {"bundle": "other"}, {"epoch": 1}],
    ids=["run", "bundle", "epoch"],
)
def test_weights_of_something_else_are_no_go(changes: dict[str, object]) -> None:
    session = _session()
    session.on_weights(_weights(1, **changes))
    assert session.next_work() is None


def test_weights_of_an_earlier_step_are_late() -> None:
    session = _session()
    session.on_weights(_weights(2))
    with pytest.raises(PeerProtocolError) as caught:
        session.on_weights(_weights(1))
    assert caught.value.reason is Refusal.LATE
    assert session.weights == _weights(2)


def test_weights_that_cannot_be_used_are_waited_out() -> None:
    session = _session()
    session.on_weights(_weights(2))
    session.drop_weights()
    assert session.next_work() is None
    assert _reason(session, _cut(2, 4, 4)) is Refusal.EARLY
    session.on_weights(_weights(2))
    assert _send_all(session) == [Slot(2, 4, 4), Slot(2, 12, 2)]


def test_weights_of_another_run_may_begin_at_any_step() -> None:
    session = _session()
    session.on_weights(_weights(2))
    session.on_weights(_weights(1, run="run.2"))
    session.on_allocation(_changed(run="run.2", plan=1))
    assert _send_all(session) == [Slot(1, 0, 4)]


def test_nothing_is_due_with_another_bundle_installed() -> None:
    session = _session()
    session.bundle = "other"
    session.on_weights(_weights(1))
    assert session.next_work() is None
    session.bundle = BUNDLE
    assert session.next_work() is not None


def test_older_plan_is_late_and_changes_nothing() -> None:
    session = _session(_changed(plan=5))
    with pytest.raises(PeerProtocolError) as caught:
        session.on_allocation(_changed(plan=4, slots=()))
    assert caught.value.reason is Refusal.LATE
    assert session.allocation == _changed(plan=5)


def test_another_run_may_begin_with_any_plan_and_asks_for_everything_again() -> None:
    session = _session(_changed(plan=5))
    session.on_weights(_weights(1))
    _send_all(session)
    session.on_allocation(_changed(run="run.2", plan=1))
    assert session.next_work() is None
    session.on_weights(_weights(1, run="run.2"))
    assert _send_all(session) == [Slot(1, 0, 4)]


def test_range_beyond_the_samples_is_refused_and_changes_nothing() -> None:
    session = _session()
    with pytest.raises(PeerProtocolError, match="beyond 14 samples") as caught:
        session.on_allocation(_changed(plan=2, slots=(Slot(1, 12, 3),)))
    assert caught.value.reason is Refusal.NOT_ALLOCATED
    assert session.allocation == ALLOCATION


def test_replanning_in_the_middle_of_a_step_asks_for_nothing_twice() -> None:
    session = _session()
    session.on_weights(_weights(2))
    _send_all(session)
    session.on_allocation(_changed(plan=2, slots=(Slot(2, 4, 4), Slot(2, 12, 2), Slot(3, 0, 4))))
    assert session.next_work() is None


def test_cut_gradient_asks_for_the_backward_pass_once() -> None:
    session = _session()
    session.on_weights(_weights(2))
    _send_all(session)
    work = session.on_cut_gradient(_cut(2, 4, 4))
    assert work == SendGradients(ALLOCATION, Slot(2, 4, 4), 1, ((4, 4),))
    assert session.on_cut_gradient(_cut(2, 4, 4)) == work  # not handed over yet
    session.mark_sent(work)
    assert _reason(session, _cut(2, 4, 4)) is Refusal.DUPLICATE
    assert session.on_cut_gradient(_cut(2, 12, 2)).slot == Slot(2, 12, 2)


def test_cut_gradients_that_fit_nothing_are_refused_by_reason() -> None:
    session = _session()
    assert _reason(session, _cut(2, 4, 4)) is Refusal.EARLY  # no weights yet
    session.on_weights(_weights(2))
    _send_all(session)
    assert _reason(session, _cut(2, 4, 4, run="run.2")) is Refusal.FOREIGN_RUN
    assert _reason(session, _cut(1, 0, 4)) is Refusal.LATE
    assert _reason(session, _cut(4, 8, 4)) is Refusal.EARLY
    assert _reason(session, _cut(2, 4, 3)) is Refusal.NOT_ALLOCATED
    assert _reason(session, _cut(2, 0, 4)) is Refusal.NOT_ALLOCATED
    assert _reason(Session(samples=14), _cut(2, 4, 4)) is Refusal.FOREIGN_RUN


def test_range_that_was_sent_is_answered_even_if_a_new_plan_left_it_out() -> None:
    session = _session()
    session.on_weights(_weights(2))
    _send_all(session)
    session.on_allocation(_changed(plan=2, slots=(Slot(5, 0, 4),)))
    assert session.on_cut_gradient(_cut(2, 4, 4)).slot == Slot(2, 4, 4)


def test_restarted_device_answers_a_cut_gradient_that_is_sent_again() -> None:
    """Retained weights and a new allocation are all that a new process has."""
    restarted = Session(samples=14, bundle=BUNDLE)
    restarted.on_weights(_weights(2))
    restarted.on_allocation(_changed(plan=7))
    work = restarted.on_cut_gradient(_cut(2, 4, 4))
    assert (work.slot, work.weights_version) == (Slot(2, 4, 4), 1)


# Frozen runs: devices run ahead


def _frozen(step: int = 1, ahead: int = 2, slots: tuple[Slot, ...] = ()) -> Session:
    many = slots or tuple(Slot(number, number, 1) for number in range(1, 11))
    session = _session(_changed(mode=Mode.FROZEN, ahead=ahead, slots=many))
    session.on_fleet_state(FleetState(online=True, run="run.1", epoch=0, step=step))
    return session


def test_frozen_run_needs_no_weights_and_lets_devices_run_ahead_so_far() -> None:
    session = _frozen(ahead=2)
    work = session.next_work()
    assert work is not None
    assert work.weights_version == 0
    assert [slot.step for slot in _send_all(session)] == [1, 2, 3]
    session.on_fleet_state(FleetState(online=True, run="run.1", epoch=0, step=3))
    assert [slot.step for slot in _send_all(session)] == [4, 5]


def test_steps_that_are_over_are_not_done_any_more() -> None:
    session = _frozen(step=5)
    assert [slot.step for slot in _send_all(session)] == [5, 6, 7]


@pytest.mark.parametrize(
    "state",
    [
        FleetState(online=False, run="run.1", step=1),
        FleetState(online=True, run="run.2", step=1),
        None,
    ],
    ids=["offline", "foreign", "unknown"],
)
def test_frozen_run_stands_still_without_its_coordinator(state: FleetState | None) -> None:
    session = _session(_changed(mode=Mode.FROZEN, ahead=2))
    if state is not None:
        session.on_fleet_state(state)
    assert session.next_work() is None


def test_new_epoch_of_a_frozen_run_does_its_ranges_anew() -> None:
    session = _frozen(ahead=9)
    assert len(_send_all(session)) == 10
    again = _changed(mode=Mode.FROZEN, ahead=9, epoch=1, plan=2, slots=(Slot(10, 10, 1),))
    session.on_allocation(again)
    assert [slot.step for slot in _send_all(session)] == [10]


def test_steps_already_sent_are_forgotten_only_when_they_are_over() -> None:
    session = _frozen(ahead=3)
    _send_all(session)
    session.on_fleet_state(FleetState(online=True, run="run.1", step=2))
    assert [slot.step for slot in _send_all(session)] == [5]
    session.on_fleet_state(FleetState(online=True, run="run.1", step=2))
    assert session.next_work() is None


BY_CLASS = msgspec.structs.replace(
    ALLOCATION,
    order=SampleOrder.BY_CLASS,
    slots=(Slot(1, 2, 5), Slot(2, 0, 2)),
    ranges=(((2, 3), (9, 2)), ((0, 2),)),
)


def test_slots_of_the_order_by_class_carry_their_ranges() -> None:
    session = _session(BY_CLASS)
    session.on_weights(_weights(1))
    work = session.next_work()
    assert work is not None
    assert (work.slot, work.ranges) == (Slot(1, 2, 5), ((2, 3), (9, 2)))


def test_ranges_of_a_slot_under_way_outlive_an_allocation_that_does_not_name_it() -> None:
    session = _session(BY_CLASS)
    session.on_weights(_weights(1))
    work = session.next_work()
    assert work is not None
    session.mark_sent(work)
    rest = {"slots": BY_CLASS.slots[1:], "ranges": BY_CLASS.ranges[1:]}
    session.on_allocation(msgspec.structs.replace(BY_CLASS, plan=2, **rest))
    assert session.on_cut_gradient(_cut(1, 2, 5)).ranges == ((2, 3), (9, 2))


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ((), Refusal.MALFORMED),
        ((((2, 3), (9, 2)),), Refusal.MALFORMED),
        ((((2, 3), (9, 1)), ((0, 2),)), Refusal.MALFORMED),
        ((((3, 3), (9, 2)), ((0, 2),)), Refusal.MALFORMED),
        (((), ((0, 2),)), Refusal.MALFORMED),
        ((((2, 3), (99_999, 2)), ((0, 2),)), Refusal.NOT_ALLOCATED),
    ],
)
def test_ranges_that_are_not_those_of_the_slots_are_refused(
    ranges: tuple[Any, ...], reason: Refusal
) -> None:
    session = _session(None)
    with pytest.raises(PeerProtocolError) as refused:
        session.on_allocation(msgspec.structs.replace(BY_CLASS, ranges=ranges))
    assert refused.value.reason is reason
    assert session.allocation is None
