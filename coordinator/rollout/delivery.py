"""What a campaign says to devices: offers, cancels, acknowledgements, and the bundle's chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.outgoing import Publish
from coordinator.rollout.chunks import Chunk, ChunkSchedule
from coordinator.rollout.records import CampaignRecord
from wire.codec import encode_tensors, exact
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.messages import (
    ChunkHeader,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutStatus,
    build_metadata,
    encode_message,
)
from wire.topics import Channel

logger = logging.getLogger(__name__)

# Small enough for a slow link to get through within a device's patience, and to lose little.
CHUNK_BYTES = 64 * 1024
CHUNK_EXPIRY_S = 60.0  # the device asks again long before


@dataclass(slots=True)
class _Load:
    """A bundle that is being sent; ``offsets`` tells how far each device is."""

    data: NDArray[np.uint8]
    schedule: ChunkSchedule
    offsets: dict[str, int] = field(default_factory=dict)


class Delivery:
    """Publishes for all campaigns; keeps bundles in memory while devices want them."""

    def __init__(self, publish: Publish, read_bundle: Callable[[str], bytes]) -> None:
        """``read_bundle`` gives the bytes of a digest, or raises ModelError."""
        self._publish = publish
        self._read_bundle = read_bundle
        self._loads: dict[tuple[str, bool], _Load] = {}

    def offer(self, record: CampaignRecord, device: str, attempt: int) -> None:
        """Offer the campaign's bundle to a device."""
        bundle, settings, limits = record.bundle, record.settings, record.settings.limits
        offer = RolloutOffer(
            digest=bundle.digest,
            size_bytes=bundle.size_bytes,
            chunk_bytes=CHUNK_BYTES,
            name=bundle.name,
            version=bundle.version,
            campaign=record.campaign,
            attempt=attempt,
            shared=settings.shared,
            good_steps=settings.good_steps,
            soak_s=settings.trial_s,
            download_limit_s=limits.download_s,
            self_test_limit_s=limits.self_test_s,
            commit_limit_s=limits.commit_s,
        )
        self._publish(Channel.ROLLOUT, encode_message(offer), device=device)

    def cancel(self, record: CampaignRecord, device: str, attempt: int, *, revert: bool) -> None:
        """Tell a device to stop, or to go back."""
        cancel = RolloutCancel(
            digest=record.bundle.digest, campaign=record.campaign, revert=revert, attempt=attempt
        )
        self._publish(Channel.ROLLOUT, encode_message(cancel), device=device)

    def acknowledge(self, device: str, status: RolloutStatus) -> None:
        """Tell a device that its status is written down."""
        if len(status.digest) != 64:
            return
        word = RolloutAcknowledge(
            digest=status.digest, campaign=status.campaign, sequence=status.sequence
        )
        self._publish(Channel.ROLLOUT, encode_message(word), device=device)

    def want(self, record: CampaignRecord, device: str, offset: int, now_s: float) -> None:
        """A device misses the chunk at ``offset``; raises PeerProtocolError if there is none."""
        size = record.bundle.size_bytes
        if offset >= size or offset % CHUNK_BYTES:
            raise PeerProtocolError(
                Refusal.MALFORMED,
                f"expected a multiple of {CHUNK_BYTES} below {size}, received {offset}",
            )
        load = self._load(record)
        if load is not None:
            load.offsets[device] = offset
            load.schedule.want(device, offset, now_s)

    def offset_of(self, record: CampaignRecord, device: str) -> int:
        """How many bytes the device is known to have, while it downloads."""
        load = self._loads.get((record.bundle.digest, record.settings.shared))
        return 0 if load is None else load.offsets.get(device, 0)

    def forget(self, record: CampaignRecord, device: str) -> None:
        """The device downloads no longer; a bundle that nobody wants leaves the memory."""
        key = (record.bundle.digest, record.settings.shared)
        load = self._loads.get(key)
        if load is None:
            return
        load.schedule.forget(device)
        load.offsets.pop(device, None)
        if not load.offsets and load.schedule.is_idle:
            del self._loads[key]

    def send_due(self, now_s: float) -> int:
        """Send the chunks that are due (monotonic time); how many."""
        sent = 0
        for (digest, _), load in list(self._loads.items()):
            for chunk in load.schedule.due(now_s):
                self._send(digest, load, chunk)
                sent += 1
        return sent

    @property
    def is_sending(self) -> bool:
        """Whether chunks are due or will be soon."""
        return any(not load.schedule.is_idle for load in self._loads.values())

    def _load(self, record: CampaignRecord) -> _Load | None:
        key = (record.bundle.digest, record.settings.shared)
        load = self._loads.get(key)
        if load is None:
            try:
                data = np.frombuffer(self._read_bundle(record.bundle.digest), np.uint8)
            except ModelError as exc:
                logger.error("%s: %s", record.campaign, exc)
                return None
            schedule = ChunkSchedule(len(data), CHUNK_BYTES, shared=record.settings.shared)
            load = self._loads[key] = _Load(data, schedule)
        return load

    def _send(self, digest: str, load: _Load, chunk: Chunk) -> None:
        header = ChunkHeader(digest=digest, offset_bytes=chunk.offset, size_bytes=load.data.nbytes)
        part = load.data[chunk.offset : chunk.offset + CHUNK_BYTES]
        payload = encode_tensors({"data": exact(part)}, build_metadata(header))
        if chunk.device is None:
            self._publish(Channel.SHARED_BUNDLE, payload, bundle=digest, expiry_s=CHUNK_EXPIRY_S)
        else:
            self._publish(Channel.BUNDLE, payload, device=chunk.device, expiry_s=CHUNK_EXPIRY_S)
