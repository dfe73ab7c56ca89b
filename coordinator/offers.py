"""The run's bundle for devices that lack it: offered, then sent chunk by chunk as they ask.

The device asks for every chunk by offset, so nothing is kept per device here. Rollouts to devices
outside a run will come this way too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from coordinator.outgoing import Publish
from coordinator.registry import Device
from wire.codec import encode_tensors, exact
from wire.errors import PeerProtocolError, Refusal
from wire.messages import (
    ChunkHeader,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
    build_metadata,
    encode_message,
)
from wire.topics import Channel

if TYPE_CHECKING:  # a coordinator without a run does without PyTorch
    from coordinator.model import RunModel

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
CHUNK_EXPIRY_S = 60.0  # the device asks again long before


class BundleOffers:
    """Offers one bundle and answers what devices say to it."""

    def __init__(self, model: RunModel, publish: Publish) -> None:
        self._model = model
        self._publish = publish
        self._bytes = np.frombuffer(model.bundle_bytes, np.uint8)

    def offer(self, device: Device) -> None:
        """Tell a device that there is a bundle for it."""
        manifest = self._model.bundle.manifest
        offer = RolloutOffer(
            digest=self._model.digest,
            size_bytes=len(self._model.bundle_bytes),
            chunk_bytes=CHUNK_BYTES,
            good_steps=1,  # in use at once; a device that dies of it goes back by itself
            name=manifest.name,
            version=manifest.version,
        )
        self._publish(Channel.ROLLOUT, encode_message(offer), device=device.name)

    def answer(self, device: Device, status: RolloutStatus) -> None:
        """Act on a device's status; raises PeerProtocolError if it is about another bundle."""
        if status.digest != self._model.digest:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, f"bundle {status.digest[:12]}")
        match status.phase:
            case RolloutPhase.WANTED:
                self._send_chunk(device, status.offset_bytes)
            case RolloutPhase.REFUSED | RolloutPhase.FAILED | RolloutPhase.REVERTED:
                device.problem = f"{status.phase.value} the bundle: {status.detail}"
                logger.warning("%s: %s", device.name, device.problem)
            case _:
                pass  # the birth that names the bundle is what counts

    def _send_chunk(self, device: Device, offset: int) -> None:
        size = len(self._model.bundle_bytes)
        if offset >= size:
            raise PeerProtocolError(
                Refusal.MALFORMED, f"expected an offset below {size}, received {offset}"
            )
        header = ChunkHeader(digest=self._model.digest, offset_bytes=offset, size_bytes=size)
        chunk = self._bytes[offset : offset + CHUNK_BYTES]
        payload = encode_tensors({"data": exact(chunk)}, build_metadata(header))
        device.bytes_down += len(payload)
        self._publish(Channel.BUNDLE, payload, device=device.name, expiry_s=CHUNK_EXPIRY_S)
