"""A bundle that is not in use yet: its download, its checks and its self-test.

One at a time. Whatever ends it raises UpdateEndedError, for the updater to say; a write that fails
ends the update, never the agent. Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent import journal as journals
from edge_agent.admission import check_manifest
from edge_agent.download import BrokenDownloadError, Download
from edge_agent.journal import build_status
from edge_agent.ledger import Ledger
from edge_agent.self_test import Job, SelfTest
from edge_agent.slots import SlotStore
from edge_agent.update_host import Host, Policy, UpdateEndedError
from wire.bundle import Bundle
from wire.errors import ConfigError, ModelError, PeerProtocolError, Refusal
from wire.messages import ChunkHeader, RolloutOffer, RolloutPhase, SelfTestReport

STEP_WAIT_S = 60.0  # longest wait for the end of a step: its deadline has passed by then


@dataclass(frozen=True, slots=True)
class Ready:
    """A bundle that has passed everything: it can be used."""

    offer: RolloutOffer
    bundle: Bundle
    report: SelfTestReport


@dataclass(slots=True)
class _Testing:
    """A verified bundle in its self-test; then, with a report, waiting for the end of a step."""

    offer: RolloutOffer
    bundle: Bundle
    test: SelfTest
    report: SelfTestReport | None = None
    ready_s: float = 0.0


class Incoming:
    """The update under way, if there is one."""

    def __init__(self, store: SlotStore, ledger: Ledger, policy: Policy, host: Host) -> None:
        self._store = store
        self._ledger = ledger
        self._policy = policy
        self._host = host
        self._download: Download | None = None
        self._testing: _Testing | None = None

    @property
    def offer(self) -> RolloutOffer | None:
        """What is being brought in."""
        held = self._download or self._testing
        return None if held is None else held.offer

    def begin(self, offer: RolloutOffer, now_s: float) -> None:
        """Fetch what is missing of the offered bundle; what lies in a slot need not come again."""
        slot = self._ledger.journal.slot_of(offer.digest)
        if slot is not None:
            data = self._store.read(slot)
            if data is not None:
                self._test(offer, data, now_s)
                return
            self._ledger.keep(journals.forget(self._ledger.journal, slot))
        try:
            chunks = self._store.part.open(offer)
        except OSError as exc:
            raise _cannot_write(offer, exc) from exc
        deadline_s = now_s + offer.download_limit_s
        self._download = Download(offer, chunks, deadline_s, resumed=bool(chunks.held))
        if chunks.is_complete:
            self._finish_download(self._download, now_s)
            return
        if offer.shared:
            self._host.listen(offer.digest)
        self.ask(now_s)

    def ask(self, now_s: float) -> None:
        """Ask for the first chunk that is missing."""
        if self._download is not None:
            self._host.say(self._download.request(now_s))

    def take(self, header: ChunkHeader, data: bytes, *, shared: bool, now_s: float) -> None:
        """Take a chunk; raises PeerProtocolError for one that is not missing."""
        download = self._download
        if download is None:
            raise PeerProtocolError(Refusal.EARLY, "no bundle was asked for")
        download.chunks.check(header, len(data))
        try:
            self._store.part.add(header.offset_bytes, data)
        except OSError as exc:
            raise _cannot_write(download.offer, exc) from exc
        download.took(header.offset_bytes, shared=shared, now_s=now_s)
        if download.chunks.is_complete:
            self._finish_download(download, now_s)
        elif not shared:
            self.ask(now_s)

    def tick(self, now_s: float, *, mid_step: bool) -> Ready | None:
        """Ask again, end what takes too long; a bundle that may be used now."""
        download = self._download
        if download is not None and now_s >= download.deadline_s:
            raise _too_slow(download)
        if download is not None and now_s >= download.ask_s:
            self.ask(now_s)
        testing = self._testing
        if testing is None or not self._has_passed(testing, now_s):
            return None
        if mid_step and now_s < testing.ready_s + STEP_WAIT_S:
            return None
        self._testing = None
        assert testing.report is not None, "it has passed"
        return Ready(testing.offer, testing.bundle, testing.report)

    def stop(self) -> None:
        """End it; what has come stays, for the next time."""
        self._end_download()
        testing, self._testing = self._testing, None
        if testing is not None:
            testing.test.kill()

    def _finish_download(self, download: Download, now_s: float) -> None:
        offer = download.offer
        self._end_download()
        try:
            data = self._store.part.read(offer)
        except OSError as exc:
            raise _cannot_write(offer, exc) from exc
        except BrokenDownloadError as exc:
            if not download.resumed:
                raise UpdateEndedError(offer, RolloutPhase.FAILED, str(exc)) from exc
            # A power cut may have kept the list and lost the bytes: once more from the beginning.
            self._store.part.discard()
            self.begin(offer, now_s)
            return
        self._test(offer, data, now_s)

    def _test(self, offer: RolloutOffer, data: bytes, now_s: float) -> None:
        """Check all that can be checked without running it, then run it in another process."""
        try:
            bundle = self._check(offer, data)
            self._host.prepare(bundle.manifest)
        except (ModelError, ConfigError) as exc:
            raise UpdateEndedError(offer, RolloutPhase.REFUSED, str(exc)) from exc
        if offer.campaign:
            self._ledger.note(build_status(offer, RolloutPhase.VERIFIED))
        policy = self._policy
        job = Job(bundle, policy.compute, policy.self_test_max_bytes)
        limit_s = offer.self_test_limit_s
        try:
            test = SelfTest(job, limit_s=limit_s, now_s=now_s, wake=self._host.wake)
        except OSError as exc:
            reason = f"self-test: no process can be started ({exc.strerror})"
            raise UpdateEndedError(offer, RolloutPhase.FAILED, reason) from exc
        self._testing = _Testing(offer, bundle, test)

    def _check(self, offer: RolloutOffer, data: bytes) -> Bundle:
        policy = self._policy
        bundle = Bundle.from_bytes(data, max_bytes=policy.max_bundle_bytes, trust=policy.trust)
        check_manifest(
            bundle.manifest,
            self._ledger.journal,
            now=policy.clock(),
            agent_version=policy.agent_version,
            check_sequence=bool(offer.campaign) or policy.trust is not None,
        )
        self._host.check(bundle.manifest)
        return bundle

    def _has_passed(self, testing: _Testing, now_s: float) -> bool:
        if testing.report is None:
            outcome = testing.test.poll(now_s)
            if outcome is None:
                return False
            if outcome.report is None:
                raise UpdateEndedError(testing.offer, RolloutPhase.FAILED, outcome.failure)
            testing.report, testing.ready_s = outcome.report, now_s
        return True

    def _end_download(self) -> None:
        download, self._download = self._download, None
        if download is not None and download.offer.shared:
            self._host.unlisten(download.offer.digest)


def _too_slow(download: Download) -> UpdateEndedError:
    offer = download.offer
    held = min(len(download.chunks.held) * offer.chunk_bytes, offer.size_bytes)
    reason = (
        f"download not done within {offer.download_limit_s:g} s: {held} of {offer.size_bytes} "
        "bytes came"
    )
    return UpdateEndedError(offer, RolloutPhase.FAILED, reason)


def _cannot_write(offer: RolloutOffer, exc: OSError) -> UpdateEndedError:
    reason = f"cannot write the bundle to the state directory ({exc.strerror or exc})"
    return UpdateEndedError(offer, RolloutPhase.FAILED, reason)
