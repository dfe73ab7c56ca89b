"""The journal in force and the statuses that the coordinator has not written down yet."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_agent import journal as journals
from edge_agent.journal import Journal
from edge_agent.slots import SlotStore
from wire.messages import RolloutAcknowledge, RolloutStatus

logger = logging.getLogger(__name__)

REPEAT_S = 10.0  # an unacknowledged status is said again


class Ledger:
    """Keeps the journal on disk and says statuses; ``say`` loses them while offline."""

    def __init__(self, store: SlotStore, say: Callable[[RolloutStatus], None]) -> None:
        self._store = store
        self._say = say
        self._repeat_s: float | None = None  # None: something has just been said

    @property
    def journal(self) -> Journal:
        """What holds now."""
        return self._store.journal

    def keep(self, journal: Journal) -> None:
        """Make it hold. If it cannot be written it holds until the process ends."""
        try:
            self._store.save(journal)
        except OSError as exc:
            logger.warning("the account of bundles is not written: %s", exc)
            self._store.journal = journal

    def note(self, status: RolloutStatus) -> None:
        """Say a status; a campaign's is numbered and said again until it is acknowledged."""
        if not status.campaign:
            self._say(status)
            return
        self._repeat_s = None
        self.keep(journals.note(self.journal, status))
        record = self.journal.record_of(status.campaign)
        assert record is not None, "it has just been noted"
        self._say(record.status)

    def acknowledge(self, message: RolloutAcknowledge) -> None:
        """A status is written down."""
        self.keep(journals.acknowledge(self.journal, message.campaign, message.sequence))

    def say_again(self, campaign: str, now_s: float) -> None:
        """The coordinator has asked: its account may lack the campaign's last status."""
        self.keep(journals.owe_again(self.journal, campaign))
        self.say_owed(now_s)

    def say_owed(self, now_s: float) -> None:
        """Say all that is owed."""
        self._repeat_s = now_s + REPEAT_S
        for status in self.journal.owed:
            self._say(status)

    def tick(self, now_s: float) -> None:
        """Say what is owed when it is time; call it while connected."""
        if self._repeat_s is None:
            self._repeat_s = now_s + REPEAT_S
        elif now_s >= self._repeat_s:
            self.say_owed(now_s)
