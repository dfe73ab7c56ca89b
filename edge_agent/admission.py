"""Whether a device takes a bundle: no clock, no files. A refusal is a ModelError with the reason.

The clock of a gateway may be wrong. One that is behind the bundle's own making is certainly
wrong, and nothing is called expired by it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from edge_agent.download import MAX_CHUNKS
from edge_agent.journal import Journal
from wire.bundle import Manifest
from wire.errors import ModelError
from wire.messages import RolloutOffer

CLOCK_TOLERANCE = timedelta(days=1)


def check_offer(offer: RolloutOffer, journal: Journal, *, max_bundle_bytes: int) -> None:
    """Raise ModelError for a bundle that is not even fetched."""
    if offer.size_bytes > max_bundle_bytes:
        raise ModelError(
            f"expected a bundle of at most {max_bundle_bytes} bytes, offered {offer.size_bytes}"
        )
    if offer.size_bytes > offer.chunk_bytes * MAX_CHUNKS:
        raise ModelError(
            f"expected at most {MAX_CHUNKS} chunks, offered {offer.size_bytes} bytes in chunks "
            f"of {offer.chunk_bytes}"
        )
    if offer.campaign:
        return
    if offer.digest in journal.blocked:
        raise ModelError(
            f"{journal.blocked[offer.digest]}; only a rollout brings this bundle again"
        )
    busy = journal.pending or journal.trial
    if busy is not None and busy.campaign:
        what = "on trial with" if busy is journal.trial else "fetching"
        raise ModelError(f"busy {what} bundle {busy.digest[:12]} of rollout {busy.campaign}")


def check_manifest(
    manifest: Manifest,
    journal: Journal,
    *,
    now: datetime,
    agent_version: str,
    check_sequence: bool,
) -> None:
    """Raise ModelError for a bundle that is expired, too new for this agent, or too old.

    ``check_sequence`` is off for a run's bundle on a device that accepts unsigned ones.
    """
    _check_expiry(manifest, now)
    if _version(manifest.minimum_agent) > _version(agent_version):
        raise ModelError(
            f"{manifest.name} {manifest.version}: expected agent {manifest.minimum_agent} or "
            f"later, this is {agent_version}"
        )
    highest = journal.highest.get(manifest.name, 0)
    if check_sequence and manifest.sequence < highest:
        raise ModelError(
            f"{manifest.name} {manifest.version}: older than what this device has had: expected "
            f"sequence {highest} or higher, found {manifest.sequence}"
        )


def _check_expiry(manifest: Manifest, now: datetime) -> None:
    if not manifest.expires:
        return
    expires = _time("expires", manifest.expires)
    created = _time("created", manifest.created)
    if now + CLOCK_TOLERANCE < created:
        return
    if now >= expires:
        raise ModelError(f"{manifest.name} {manifest.version}: expired on {manifest.expires}")


def _time(field: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ModelError(f"manifest.json: {field}: expected a time, found {text!r}") from exc
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.2.1rc1 is (0, 2, 1)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
