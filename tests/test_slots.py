"""Bundles on disk: kill -9 between any two file operations leaves a whole, verified bundle."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent import journal as journals
from edge_agent.journal import Journal, SlotRecord, build_status
from edge_agent.slots import SlotStore
from wire.messages import RolloutOffer, RolloutPhase

CHUNK = 100


def _bundle(number: int) -> bytes:
    return bytes([number]) * 250


def _offer(number: int) -> RolloutOffer:
    data = _bundle(number)
    digest = hashlib.sha256(data).hexdigest()
    return RolloutOffer(
        digest=digest, size_bytes=len(data), chunk_bytes=CHUNK, campaign=f"c{number}"
    )


def _fetch(store: SlotStore, number: int) -> None:
    offer, data = _offer(number), _bundle(number)
    chunks = store.part.open(offer)
    while not chunks.is_complete:
        offset = chunks.first_missing
        store.part.add(offset, data[offset : offset + CHUNK])
        chunks.held.add(offset)
    store.part.read(offer)


def _update(store: SlotStore, number: int, *, good: bool = True) -> None:
    """A whole update, with each thing that is written down."""
    offer = _offer(number)
    store.save(journals.expect(store.journal, offer))
    if store.journal.slot_of(offer.digest) is None:
        _fetch(store, number)
    record = SlotRecord(digest=offer.digest, name="net", version=str(number), sequence=number)
    store.install(offer, record)
    store.save(journals.note(store.journal, build_status(offer, RolloutPhase.INSTALLED)))
    if good:
        store.save(journals.commit(store.journal))
    else:
        store.save(journals.revert(store.journal))


def _in_use(store: SlotStore) -> bytes | None:
    """What the device works with; it must be whole."""
    journal = store.journal
    if journal.active is None:
        return None
    data = store.read(journal.active)
    assert data is not None, f"the bundle in use is damaged: {journal}"
    return data


def test_store_gives_back_what_was_installed(tmp_path: Path) -> None:
    _update(SlotStore(tmp_path), 1)
    store = SlotStore(tmp_path)
    assert _in_use(store) == _bundle(1)
    _update(store, 2)
    assert _in_use(SlotStore(tmp_path)) == _bundle(2)
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "b.bundle", "slots.json"]


def test_bundle_that_is_here_already_is_not_written_again(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    _update(store, 1)
    _update(store, 2, good=True)
    before = (tmp_path / "a.bundle").stat().st_mtime_ns
    _update(store, 1)
    assert _in_use(store) == _bundle(1)
    assert (tmp_path / "a.bundle").stat().st_mtime_ns == before


def test_bundle_damaged_on_disk_is_as_good_as_absent(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    _update(store, 1)
    (tmp_path / "a.bundle").write_bytes(_bundle(1)[:-1])
    assert store.journal.active is not None
    assert store.read(store.journal.active) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"active": "c"}', "\xff"])
def test_unreadable_journal_means_no_bundle_and_no_end(tmp_path: Path, text: str) -> None:
    _update(SlotStore(tmp_path), 1)
    (tmp_path / "slots.json").write_text(text)
    store = SlotStore(tmp_path)
    assert store.journal == Journal()
    _update(store, 2)
    assert _in_use(SlotStore(tmp_path)) == _bundle(2)


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    _update(SlotStore(tmp_path), 1)
    (tmp_path / ".slots.json.123.tmp").write_text("{")
    (tmp_path / f"{'0' * 64}.bundle").write_text("of an earlier version")
    SlotStore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "slots.json"]


class _Killer:
    """Kills this process at the n-th file operation, before or after it is made."""

    def __init__(self, at: int, *, after: bool) -> None:
        self._left = at
        self._after = after

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            now = self._left == 0
            if now and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def install(self) -> None:
        for name in ("replace", "fsync", "open", "pwrite", "unlink", "mkdir", "close"):
            setattr(os, name, self.wrap(getattr(os, name)))
        io.open = builtins.open = self.wrap(io.open)  # type: ignore[assignment]


def _dies(work: Callable[[], None], killer: _Killer) -> bool:
    """Do the work in a child that the killer may end; whether it did."""
    child = os.fork()
    if child == 0:
        killer.install()
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("good", [True, False], ids=["committed", "reverted"])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_kill_at_every_file_operation_leaves_a_whole_bundle(
    tmp_path: Path, *, good: bool, after: bool
) -> None:
    seen = set()
    operation = 0
    while True:
        operation += 1
        directory = tmp_path / str(operation)
        _update(SlotStore(directory), 1)

        def work(directory: Path = directory) -> None:
            _update(SlotStore(directory), 2, good=good)

        if not _dies(work, _Killer(operation, after=after)):
            break
        store = SlotStore(directory)
        found = _in_use(store)
        assert found in (_bundle(1), _bundle(2)), operation
        committed = store.journal.committed
        assert committed is not None, operation
        seen.add(found)
        # Whatever the crash has left, the next update goes through.
        _update(store, 3)
        assert _in_use(SlotStore(directory)) == _bundle(3), operation
    assert operation > 20, "the killer saw no file operations"
    assert seen == {_bundle(1), _bundle(2)}


def test_first_bundle_killed_at_every_operation_is_whole_or_absent(tmp_path: Path) -> None:
    operation = 0
    while True:
        operation += 1
        directory = tmp_path / str(operation)
        if not _dies(lambda d=directory: _update(SlotStore(d), 1), _Killer(operation, after=True)):
            break
        assert _in_use(SlotStore(directory)) in (None, _bundle(1))
    assert operation > 20
