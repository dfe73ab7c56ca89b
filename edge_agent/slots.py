"""The device's bundles on disk: two slots and the journal that says what they are.

A file in a slot counts only if it has the digest that the journal names. An installation is one
rename into the free slot and one rename of the journal, in this order, each flushed: a crash
between any two system calls leaves a journal whose active bundle is whole.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from edge_agent import journal as journals
from edge_agent.download import PartFile
from edge_agent.files import move_durably, write_atomically
from edge_agent.journal import JOURNAL_SCHEMA, Journal, SlotName, SlotRecord
from wire.messages import RolloutOffer

logger = logging.getLogger(__name__)

JOURNAL_FILE = "slots.json"


class SlotStore:
    """Bundles and journal below one directory; methods raise OSError when it cannot be written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._journal_path = directory / JOURNAL_FILE
        directory.mkdir(parents=True, exist_ok=True)
        self.part = PartFile(directory)
        self.journal = self._read_journal()
        self._remove_strays()

    def save(self, journal: Journal) -> None:
        """Make ``journal`` the one in force."""
        if journal == self.journal:
            return
        write_atomically(self._journal_path, msgspec.json.encode(journal))
        self.journal = journal

    def read(self, slot: SlotName) -> bytes | None:
        """The bundle in a slot, if it is what the journal says."""
        record = self.journal.slots.get(slot)
        if record is None:
            return None
        try:
            data = self._path(slot).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == record.digest else None

    def install(self, offer: RolloutOffer, record: SlotRecord) -> None:
        """Put the verified part file into the free slot and into use, on trial.

        A bundle that lies in the free slot already stays where it is.
        """
        slot = self.journal.free_slot
        if self.journal.slot_of(record.digest) is not slot or self.read(slot) is None:
            move_durably(self.part.path, self._path(slot))
        self.save(journals.install(self.journal, offer, record))
        self.part.discard()

    def _path(self, slot: SlotName) -> Path:
        return _slot_path(self._directory, slot)

    def _read_journal(self) -> Journal:
        try:
            return read_journal(self._directory)
        except (msgspec.DecodeError, ValueError) as exc:
            # Nothing here can be trusted any more: the device begins without a bundle.
            logger.warning("%s: bundles are fetched anew: %s", self._journal_path, exc)
            return Journal()

    def _remove_strays(self) -> None:
        """What a crash has left half written, and what no slot holds any more."""
        held = {self._path(slot).name for slot in self.journal.slots}
        for path in self._directory.iterdir():
            is_temporary = path.name.startswith(".") and path.name.endswith(".tmp")
            if is_temporary or (path.suffix == ".bundle" and path.name not in held):
                path.unlink(missing_ok=True)


def read_journal(directory: Path) -> Journal:
    """The journal below a state directory's ``bundles``; ValueError if it cannot be read."""
    try:
        raw = (directory / JOURNAL_FILE).read_bytes()
    except FileNotFoundError:
        return Journal()
    journal = msgspec.json.decode(raw, type=Journal)
    if journal.schema != JOURNAL_SCHEMA:
        raise ValueError(f"expected schema {JOURNAL_SCHEMA}, found {journal.schema}")
    return journal


def find_file_in_use(directory: Path) -> Path | None:
    """The file of the bundle that an agent uses; the agent may be running."""
    try:
        active = read_journal(directory).active
    except (msgspec.DecodeError, ValueError, OSError):
        return None
    return None if active is None else _slot_path(directory, active)


def _slot_path(directory: Path, slot: SlotName) -> Path:
    return directory / f"{slot.value}.bundle"
