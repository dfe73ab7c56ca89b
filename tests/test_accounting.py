"""Sample accounting: each sample is free, outstanding or trained, never two of them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.accounting import DeviceAccount, EpochAccount, Range, class_blocks
from wire.errors import LocalProtocolError

FREE, OUTSTANDING, TRAINED = "free", "outstanding", "trained"


def _spans(document: dict[str, Any], key: str) -> list[Range]:
    return [(offset, count) for offset, count in document[key]]


class AccountMachine(RuleBasedStateMachine):
    """The account against a plain list with one state per sample."""

    @initialize(samples=st.integers(0, 40))
    def begin(self, samples: int) -> None:
        self.account = DeviceAccount(samples)
        self.samples = [FREE] * samples
        self.taken: list[Range] = []

    def _mark(self, span: Range, state: str) -> None:
        offset, count = span
        self.samples[offset : offset + count] = [state] * count

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.samples.count(FREE)))
        spans = self.account.take(count)
        positions = [p for offset, size in spans for p in range(offset, offset + size)]
        lowest = [p for p, state in enumerate(self.samples) if state == FREE][:count]
        assert positions == lowest
        for span in spans:
            self._mark(span, OUTSTANDING)
        self.taken += spans

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(self.taken))
        self.account.give_back(span)
        self.taken.remove(span)
        self._mark(span, FREE)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def mark_trained(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(self.taken))
        self.account.mark_trained(span)
        self.taken.remove(span)
        self._mark(span, TRAINED)

    @rule()
    def write_down_and_take_up(self) -> None:
        self.account = DeviceAccount.from_document(json.loads(json.dumps(self.account.document())))

    @rule(offset=st.integers(0, 40), count=st.integers(1, 40))
    def foreign_ranges_are_refused_and_change_nothing(self, offset: int, count: int) -> None:
        if (offset, count) in self.taken:
            return
        before = self.account.document()
        with pytest.raises(LocalProtocolError, match="not outstanding"):
            self.account.give_back((offset, count))
        with pytest.raises(LocalProtocolError, match="not outstanding"):
            self.account.mark_trained((offset, count))
        assert self.account.document() == before

    @rule(excess=st.integers(1, 5))
    def more_than_is_free_is_refused_and_changes_nothing(self, excess: int) -> None:
        before = self.account.document()
        with pytest.raises(LocalProtocolError, match="are free"):
            self.account.take(self.account.free + excess)
        assert self.account.document() == before

    @invariant()
    def ranges_say_what_the_samples_say(self) -> None:
        document = self.account.document()
        for key in (FREE, OUTSTANDING):
            covered = [p for o, c in _spans(document, key) for p in range(o, o + c)]
            assert sorted(covered) == [p for p, s in enumerate(self.samples) if s == key]
        assert self.account.trained == self.samples.count(TRAINED)
        assert self.account.free == self.samples.count(FREE)

    @invariant()
    def free_ranges_are_sorted_and_as_few_as_can_be(self) -> None:
        spans = _spans(self.account.document(), FREE)
        assert all(sum(left) < right[0] for left, right in pairwise(spans))


AccountMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAccountMachine = AccountMachine.TestCase


def test_ranges_given_back_join_both_neighbours() -> None:
    account = DeviceAccount(30)
    first, second, third = (account.take(10)[0] for _ in range(3))
    account.give_back(first)
    account.give_back(third)
    account.give_back(second)
    assert account.take(30) == [(0, 30)]


def test_fragmented_free_samples_are_taken_as_several_ranges() -> None:
    account = DeviceAccount(12)
    spans = [account.take(3)[0] for _ in range(4)]
    account.give_back(spans[0])
    account.give_back(spans[2])
    assert account.take(5) == [(0, 3), (6, 2)]


def test_epoch_counts_what_is_untrained_by_name() -> None:
    epoch = EpochAccount()
    for name, samples in {"b": 4, "a": 3, "c": 2}.items():
        epoch.add(name, samples)
    [span] = epoch.devices["a"].take(3)
    epoch.devices["a"].mark_trained(span)
    epoch.devices["b"].mark_trained(epoch.devices["b"].take(1)[0])
    assert epoch.untrained() == {"b": 3, "c": 2}
    assert (epoch.samples, epoch.trained, epoch.free("b"), epoch.free("nobody")) == (9, 4, 3, 0)


def test_known_device_keeps_its_account_when_added_again() -> None:
    epoch = EpochAccount()
    epoch.add("a", 5)
    epoch.devices["a"].mark_trained(epoch.devices["a"].take(5)[0])
    epoch.add("a", 5)
    assert epoch.trained == 5
    assert epoch.free("a") == 0


def test_device_with_another_number_of_samples_is_told_apart() -> None:
    epoch = EpochAccount()
    epoch.add("a", 5)
    assert epoch.holds("a", 5)
    assert not epoch.holds("a", 6)
    assert epoch.holds("b", 6)


def test_epoch_survives_being_written_down() -> None:
    epoch = EpochAccount()
    epoch.add("a", 9)
    epoch.add("b", 0)
    spans = [epoch.devices["a"].take(2)[0] for _ in range(3)]
    epoch.devices["a"].mark_trained(spans[0])
    epoch.devices["a"].give_back(spans[1])
    copy = EpochAccount.from_document(json.loads(json.dumps(epoch.document())))
    assert copy.document() == epoch.document()
    copy.devices["a"].mark_trained(spans[2])
    assert (copy.trained, epoch.trained) == (4, 2)


def test_samples_are_taken_from_the_block_of_a_class() -> None:
    account = DeviceAccount(20)
    blocks = class_blocks([6, 0, 10, 4])
    assert blocks == [(0, 6), (6, 0), (6, 10), (16, 4)]
    assert account.take(4, within=blocks[2]) == [(6, 4)]
    assert account.take(2, within=blocks[0]) == [(0, 2)]
    assert [account.free_within(block) for block in blocks] == [4, 0, 6, 4]
    assert account.take(6, within=blocks[2]) == [(10, 6)]
    account.give_back((6, 4))
    assert account.take(3, within=blocks[2]) == [(6, 3)]
    with pytest.raises(LocalProtocolError, match="cannot take 2 samples, 1 are free"):
        account.take(2, within=blocks[2])
    assert account.free == 9


def test_all_blocks_together_are_all_samples_once() -> None:
    account = DeviceAccount(12)
    taken = [
        position
        for block in class_blocks([5, 4, 3])
        for count in (2, 1)
        for offset, size in account.take(count, within=block)
        for position in range(offset, offset + size)
    ]
    rest = [p for offset, size in account.take(account.free) for p in range(offset, offset + size)]
    assert sorted(taken + rest) == list(range(12))
