"""Updates of a device's bundles that end with kill -9 at every file operation in turn.

Run as a program of its own: it forks for each operation, which takes a small process a millisecond
and one that has loaded PyTorch a quarter of a second.

    python -m tests.slot_crashes DIRECTORY first | committed-after | reverted-before | ...
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent import journal as journals
from edge_agent.journal import SlotRecord, build_status
from edge_agent.slots import SlotStore
from wire.messages import RolloutOffer, RolloutPhase

CHUNK = 100


def bundle_of(number: int) -> bytes:
    return bytes([number]) * 250


def _offer(number: int) -> RolloutOffer:
    data = bundle_of(number)
    digest = hashlib.sha256(data).hexdigest()
    return RolloutOffer(
        digest=digest, size_bytes=len(data), chunk_bytes=CHUNK, campaign=f"c{number}"
    )


def _fetch(store: SlotStore, number: int) -> None:
    offer, data = _offer(number), bundle_of(number)
    chunks = store.part.open(offer)
    while not chunks.is_complete:
        offset = chunks.first_missing
        store.part.add(offset, data[offset : offset + CHUNK])
        chunks.held.add(offset)
    store.part.read(offer)


def update(store: SlotStore, number: int, *, good: bool = True) -> None:
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


def in_use(store: SlotStore) -> bytes | None:
    """What the device works with; it must be whole."""
    journal = store.journal
    if journal.active is None:
        return None
    data = store.read(journal.active)
    assert data is not None, f"the bundle in use is damaged: {journal}"
    return data


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


def crash_updates(directory: Path, *, good: bool, after: bool) -> None:
    """A second update, killed before or after each of its operations, until one gets through."""
    seen = set()
    operation = 0
    while True:
        operation += 1
        place = directory / str(operation)
        update(SlotStore(place), 1)

        def work(place: Path = place) -> None:
            update(SlotStore(place), 2, good=good)

        if not _dies(work, _Killer(operation, after=after)):
            break
        store = SlotStore(place)
        found = in_use(store)
        assert found in (bundle_of(1), bundle_of(2)), operation
        assert store.journal.committed is not None, operation
        seen.add(found)
        # Whatever the crash has left, the next update goes through.
        update(store, 3)
        assert in_use(SlotStore(place)) == bundle_of(3), operation
    assert operation > 20, "the killer saw no file operations"
    assert seen == {bundle_of(1), bundle_of(2)}


def crash_first_update(directory: Path) -> None:
    """The same for a device that has no bundle yet."""
    operation = 0
    while True:
        operation += 1
        place = directory / str(operation)
        if not _dies(lambda d=place: update(SlotStore(d), 1), _Killer(operation, after=True)):
            break
        assert in_use(SlotStore(place)) in (None, bundle_of(1)), operation
    assert operation > 20, "the killer saw no file operations"


if __name__ == "__main__":
    where, case = Path(sys.argv[1]), sys.argv[2]
    if case == "first":
        crash_first_update(where)
    else:
        end, moment = case.split("-")
        crash_updates(where, good=end == "committed", after=moment == "after")
