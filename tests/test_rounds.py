"""The step protocol of the coordinator: its way, what is refused, and what losses cost."""

from __future__ import annotations

import pytest

from coordinator.actions import (
    AbandonStep,
    ApplyStep,
    EndEpoch,
    OpenStep,
    Phase,
    ResendCutGradients,
    RunServer,
    SendAllocations,
)
from coordinator.planning import Member, PlannedSlot
from coordinator.rounds import Rounds
from tests.round_owner import (
    DEADLINE,
    SAMPLES,
    Owner,
    build_fleet,
    build_settings,
    in_backward,
    refusal_of,
    slot_of,
)
from wire.errors import LocalProtocolError, Refusal

# The way of a run


def test_run_waits_for_enough_devices() -> None:
    owner = Owner(build_settings(min_devices=2))
    owner.ready("a", 20)
    assert (owner.rounds.phase, owner.actions) == (Phase.WAITING, [])
    assert owner.rounds.deadline_s is None
    owner.ready("b", 16)
    assert owner.rounds.phase is Phase.FORWARD
    assert isinstance(owner.actions[0], SendAllocations)
    assert isinstance(owner.actions[-1], OpenStep)


def test_device_that_left_before_the_start_does_not_count() -> None:
    owner = Owner(build_settings(min_devices=2))
    owner.ready("a", 20)
    owner.gone("a")
    owner.ready("b", 16)
    assert owner.rounds.phase is Phase.WAITING
    owner.ready("a", 20)
    assert owner.rounds.phase is Phase.FORWARD


def test_whole_run_trains_every_sample_once_an_epoch() -> None:
    owner = build_fleet()
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {})] * 2
    assert owner.rounds.trained == {"a": 40, "b": 32, "c": 24}
    assert [apply.step for apply in owner.applied] == list(range(1, 9))
    assert all(sum(slot.count for slot in apply.slots) == 12 for apply in owner.applied)
    assert owner.rounds.deadline_s is None
    assert owner.rounds.waited_for == ()


def test_server_runs_when_the_last_activations_are_there_and_not_before() -> None:
    owner = build_fleet()
    *rest, last = owner.owed()
    owner.answer(rest)
    assert owner.rounds.phase is Phase.FORWARD
    assert owner.rounds.waited_for == (last.device,)
    owner.answer([last])
    assert owner.rounds.phase is Phase.BACKWARD
    assert owner.rounds.waited_for == ("a", "b", "c")


def test_step_is_applied_with_the_last_gradients_and_names_the_slowest() -> None:
    owner = in_backward(build_fleet())
    owner.now_s += 3.0
    *rest, last = owner.owed()
    owner.answer(rest)
    assert owner.applied == []
    owner.answer([last])
    [apply] = owner.applied
    assert (apply.step, apply.lost, apply.slowest) == (1, (), last.device)
    assert apply.duration_s == 3.0
    assert owner.rounds.step == 2


def test_events_of_the_owner_out_of_place_are_its_own_fault() -> None:
    rounds = build_fleet().rounds
    with pytest.raises(LocalProtocolError, match="not planned"):
        rounds.planned(99)
    with pytest.raises(LocalProtocolError, match="BACKWARD"):
        rounds.accept_gradients(PlannedSlot("a", 0, 1), 0.0)
    with pytest.raises(LocalProtocolError, match="under way"):
        rounds.document()
    with pytest.raises(LocalProtocolError, match="FORWARD"):
        Rounds(build_settings()).server_done(0.0)


def test_member_says_how_many_samples_it_holds() -> None:
    assert Member("a", (3, 0, 4)).samples == 7


def test_ended_epoch_is_reported_once() -> None:
    owner = build_fleet()
    owner.run_until(Phase.DONE)
    ends = [action for action in owner.actions if isinstance(action, EndEpoch)]
    assert [end.epoch for end in ends] == [0, 1]
    assert sum(isinstance(action, ApplyStep) for action in owner.actions) == 8


# Refusals


def test_activations_that_fit_nothing_are_refused_by_reason() -> None:
    owner = build_fleet()
    send, slot, step = owner.send_activations, slot_of(owner, "a"), owner.step
    strange = PlannedSlot("a", slot.offset, slot.count + 1)
    foreign = PlannedSlot("stranger", slot.offset, slot.count)
    assert refusal_of(owner, send, step, strange) is Refusal.NOT_ALLOCATED
    assert refusal_of(owner, send, step, foreign) is Refusal.NOT_ALLOCATED
    assert refusal_of(owner, send, step, slot, version=1) is Refusal.STALE_WEIGHTS
    assert refusal_of(owner, send, step, slot, epoch=1) is Refusal.EARLY
    assert refusal_of(owner, send, step + 1, slot) is Refusal.EARLY
    assert refusal_of(owner, send, step - 1, slot) is Refusal.LATE
    owner.answer([slot])
    assert refusal_of(owner, send, step, slot) is Refusal.DUPLICATE


def test_activations_of_steps_and_epochs_that_are_over_are_late() -> None:
    owner = build_fleet()
    slot = slot_of(owner, "a")
    owner.run_until(Phase.FORWARD, 2)
    assert refusal_of(owner, owner.send_activations, 1, slot, version=0) is Refusal.LATE
    owner.run_until(Phase.FORWARD, 5)
    assert owner.rounds.epoch == 1
    assert refusal_of(owner, owner.send_activations, 1, slot, version=0, epoch=0) is Refusal.LATE


def test_activations_in_the_backward_phase_are_duplicates() -> None:
    owner = in_backward(build_fleet())
    assert (
        refusal_of(owner, owner.send_activations, owner.step, slot_of(owner, "b"))
        is Refusal.DUPLICATE
    )


def test_activations_of_a_range_that_the_step_goes_on_without_are_late() -> None:
    owner = build_fleet()
    slot = slot_of(owner, "a")
    owner.answer(owner.owed("b"))
    owner.gone("a")
    owner.ready("a", 20)
    assert owner.rounds.phase is Phase.FORWARD
    assert refusal_of(owner, owner.send_activations, owner.step, slot) is Refusal.LATE


def test_gradients_that_fit_nothing_are_refused_by_reason() -> None:
    owner = build_fleet()
    send, slot, step = owner.send_gradients, slot_of(owner, "a"), owner.step
    assert refusal_of(owner, send, step, slot) is Refusal.EARLY  # before the server pass
    in_backward(owner)
    strange = PlannedSlot("a", slot.offset, slot.count + 1)
    foreign = PlannedSlot("stranger", slot.offset, slot.count)
    assert refusal_of(owner, send, step, strange) is Refusal.NOT_ALLOCATED
    assert refusal_of(owner, send, step, foreign) is Refusal.NOT_ALLOCATED
    assert refusal_of(owner, send, step, slot, version=7) is Refusal.STALE_WEIGHTS
    assert refusal_of(owner, send, step, slot, epoch=1) is Refusal.EARLY
    assert refusal_of(owner, send, step + 1, slot) is Refusal.EARLY
    assert refusal_of(owner, send, step - 1, slot) is Refusal.LATE
    owner.answer([slot])
    assert refusal_of(owner, send, step, slot) is Refusal.DUPLICATE
    owner.run_until(Phase.FORWARD, 2)
    assert refusal_of(owner, send, 1, slot, version=0) is Refusal.LATE


def test_gradients_of_a_range_that_the_step_goes_on_without_are_late() -> None:
    owner = in_backward(build_fleet())
    slot = slot_of(owner, "a")
    owner.gone("a")
    assert refusal_of(owner, owner.send_gradients, owner.step, slot) is Refusal.LATE


def test_messages_before_the_start_and_after_the_end_are_refused() -> None:
    slot = PlannedSlot("a", 0, 4)
    waiting = Owner(build_settings())
    assert refusal_of(waiting, waiting.send_activations, 1, slot) is Refusal.EARLY
    assert refusal_of(waiting, waiting.send_gradients, 1, slot) is Refusal.LATE
    done = build_fleet()
    done.run_until(Phase.DONE)
    assert refusal_of(done, done.send_activations, 8, slot, epoch=1) is Refusal.LATE
    assert refusal_of(done, done.send_gradients, 8, slot, epoch=1) is Refusal.LATE


# Losses


def test_device_lost_before_the_server_pass_costs_its_range_and_nothing_else() -> None:
    owner = build_fleet()
    lost = slot_of(owner, "a")
    owner.answer(owner.owed("a"))
    owner.answer(owner.owed("b"))
    owner.gone("a")  # nobody would be there for its backward pass
    owner.answer(owner.owed("c"))
    run = next(action for action in owner.actions if isinstance(action, RunServer))
    assert lost not in run.slots
    owner.run_until(Phase.FORWARD, 2)
    assert owner.applied[0].lost == ()
    assert {slot.device for slot in owner.applied[0].slots} == {"b", "c"}


def test_device_lost_after_the_server_pass_is_named_as_lost() -> None:
    owner = in_backward(build_fleet())
    lost = slot_of(owner, "a")
    owner.answer(owner.owed("b"))
    owner.gone("a")
    owner.answer(owner.owed("c"))
    assert owner.applied[0].lost == (lost,)
    assert {slot.device for slot in owner.applied[0].slots} == {"b", "c"}


def test_device_lost_after_its_gradients_came_has_contributed() -> None:
    owner = in_backward(build_fleet())
    owner.answer(owner.owed("a"))
    owner.gone("a")
    owner.answer(owner.owed("b") + owner.owed("c"))
    assert owner.applied[0].lost == ()
    assert "a" in {slot.device for slot in owner.applied[0].slots}


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_step_that_everybody_leaves_is_abandoned_and_all_is_planned_again(phase: Phase) -> None:
    owner = build_fleet()
    owner.run_until(phase)
    for device in SAMPLES:
        owner.gone(device)
    assert isinstance(owner.actions[-1], AbandonStep)
    assert owner.rounds.phase is Phase.WAITING
    assert owner.rounds.deadline_s is None  # nobody there: the epoch waits without end
    owner.pass_time(10_000.0)
    assert owner.rounds.phase is Phase.WAITING
    for device, samples in SAMPLES.items():
        owner.ready(device, samples)
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {})] * 2


def test_range_of_a_lost_device_is_planned_again_when_it_returns_in_the_same_epoch() -> None:
    owner = build_fleet()
    owner.gone("a")
    owner.run_until(Phase.FORWARD, 2)
    owner.ready("a", 20)
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {})] * 2


def test_device_that_stays_away_is_waited_for_and_then_missed_by_name() -> None:
    owner = build_fleet()
    owner.gone("a")
    owner.answer(owner.owed())
    while owner.rounds.phase is not Phase.WAITING:
        owner.answer(owner.owed()[:1])
    assert owner.rounds.waited_for == ("a",)
    assert owner.rounds.deadline_s == owner.now_s + DEADLINE.return_grace_s
    owner.pass_time(DEADLINE.return_grace_s - 0.01)
    assert owner.epochs == []
    owner.pass_time(0.01)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(28, {"a": 20})]
    assert owner.rounds.missed == {"a": 20}


def test_device_that_returns_while_it_is_waited_for_is_trained() -> None:
    owner = build_fleet()
    owner.gone("a")
    while owner.rounds.phase is not Phase.WAITING:
        owner.answer(owner.owed()[:1])
    owner.pass_time(DEADLINE.return_grace_s - 1.0)
    owner.ready("a", 20)
    assert owner.rounds.phase is Phase.FORWARD
    owner.run_until(Phase.FORWARD, 7)
    assert owner.epochs[0].missed == {}


def _between_two_epochs() -> Owner:
    owner = build_fleet()
    owner.hold_epochs = True
    owner.run_until(Phase.EPOCH_END)
    return owner


def _gone_between_two_epochs() -> Owner:
    owner = _between_two_epochs()
    owner.gone("a")
    owner.begin_held_epoch()
    return owner


def test_device_that_is_away_between_two_epochs_is_trained_when_it_returns() -> None:
    owner = _gone_between_two_epochs()
    owner.run_until(Phase.WAITING)
    assert owner.rounds.waited_for == ("a",)
    owner.ready("a", 20)
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {}), (48, {})]


def test_device_that_stays_away_from_the_end_of_an_epoch_on_is_missed_by_name() -> None:
    owner = _gone_between_two_epochs()
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {}), (28, {"a": 20})]


def test_device_that_returns_between_two_epochs_with_other_data_counts_with_these() -> None:
    owner = _between_two_epochs()
    owner.ready("a", 21)
    owner.begin_held_epoch()
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(48, {}), (49, {})]


def test_next_epoch_does_not_wait_for_devices_that_were_missed_in_this_one() -> None:
    owner = build_fleet()
    owner.gone("a")
    owner.run_until(Phase.DONE)
    assert [(end.samples, end.missed) for end in owner.epochs] == [(48, {"a": 20}), (28, {})]


def test_newcomer_is_taken_in_during_the_epoch() -> None:
    owner = build_fleet({"a": 40, "b": 40})
    owner.run_until(Phase.FORWARD, 2)
    owner.ready("c", 12)
    owner.run_until(Phase.DONE)
    assert [(end.trained, end.missed) for end in owner.epochs] == [(92, {})] * 2
    assert owner.rounds.trained["c"] == 24


def test_newcomer_with_other_data_sits_this_epoch_out_and_comes_in_by_itself() -> None:
    owner = build_fleet()
    owner.run_until(Phase.FORWARD, 2)
    owner.ready("a", 21)  # same device, one sample more
    assert "a" not in owner.rounds.members
    owner.run_until(Phase.DONE)
    first, second = owner.epochs
    assert first.samples == 48
    assert set(first.missed) == {"a"}
    assert (second.samples, second.missed) == (49, {})


def test_nobody_waits_for_a_device_that_can_only_come_in_with_the_next_epoch() -> None:
    owner = build_fleet({"a": 20})
    owner.ready("a", 30)
    assert owner.epochs[0].missed == {"a": 20}
    assert owner.rounds.epoch == 1
    assert owner.rounds.phase is Phase.FORWARD


def test_device_connected_again_during_the_backward_pass_is_told_again() -> None:
    owner = in_backward(build_fleet())
    owner.actions.clear()
    owner.ready("b", 16)
    assert owner.actions == [SendAllocations(frozenset({"b"})), ResendCutGradients("b")]
    owner.answer(owner.owed("b"))
    owner.actions.clear()
    owner.ready("b", 16)
    assert owner.actions == [SendAllocations(frozenset({"b"}))]


def test_device_never_sees_another_range_under_a_step_and_offset_that_it_was_told() -> None:
    """Allocations told to a device agree with each other on all that it may have answered."""
    owner = build_fleet()
    owner.answer(owner.owed("b"))
    before = dict(owner.told["b"][1])
    owner.gone("a")
    assert dict(owner.told["b"][1])[owner.step] == before[owner.step]
