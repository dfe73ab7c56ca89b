"""The coordinator's side of a rollout on the wire, as little of it as a device needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import numpy as np

from wire.bundle import bundle_digest
from wire.codec import encode_tensors, exact
from wire.inbox import Inbox, Received
from wire.messages import (
    Birth,
    ChunkHeader,
    RolloutAcknowledge,
    RolloutMessage,
    RolloutOffer,
    RolloutPhase,
    RolloutStatus,
    build_metadata,
    decode_message,
    encode_message,
)
from wire.mqtt import MqttConnection, MqttSettings, wait_for_connection
from wire.topics import Channel, build_client_id, coordinator_subscriptions, parse_topic

CHUNK_BYTES = 4096
WAIT_S = 60.0


class RolloutPeer:
    """Offers bundles to one device, serves chunks, acknowledges; writes down what it hears."""

    def __init__(self, port: int, fleet: str, device: str) -> None:
        self._device = device
        self._inbox = Inbox()
        self._bundles: dict[str, bytes] = {}
        self.acknowledges = True
        self.shared = False
        self.births: list[Birth] = []
        self.statuses: list[RolloutStatus] = []
        self.chunks_sent = 0
        self._connection = MqttConnection(
            MqttSettings(port=port),
            client_id=build_client_id(fleet),
            fleet=fleet,
            subscriptions=coordinator_subscriptions(fleet),
            inbox=self._inbox,
            next_boot=lambda: 1,
            build_will=None,
        )

    def __enter__(self) -> RolloutPeer:
        self._connection.start()
        wait_for_connection(self._inbox, WAIT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.stop()

    def offer(self, data: bytes, campaign: str, **fields: object) -> RolloutOffer:
        offer = RolloutOffer(
            digest=bundle_digest(data),
            size_bytes=len(data),
            chunk_bytes=CHUNK_BYTES,
            campaign=campaign,
            shared=self.shared,
            **fields,  # type: ignore[arg-type]
        )
        self._bundles[offer.digest] = data
        self.say(offer)
        return offer

    def say(self, message: RolloutMessage) -> None:
        self._connection.publish(Channel.ROLLOUT, encode_message(message), device=self._device)

    def run_for(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while (rest_s := deadline_s - time.monotonic()) > 0:
            self._turn(rest_s)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what} did not come about: {self.statuses[-5:]}"
            self._turn(0.1)

    def wait_for(self, phase: RolloutPhase, campaign: str) -> RolloutStatus:
        """The first status of a campaign in this phase."""

        def found() -> list[RolloutStatus]:
            return [s for s in self.statuses if (s.phase, s.campaign) == (phase, campaign)]

        self.wait_until(lambda: bool(found()), f"{phase} of {campaign}")
        return found()[0]

    def _turn(self, timeout_s: float) -> None:
        event = self._inbox.get(timeout_s)
        if not isinstance(event, Received):
            return
        match parse_topic(event.topic).channel:
            case Channel.BIRTH:
                self.births.append(decode_message(event.payload, Birth))
            case Channel.ROLLOUT_STATUS:
                self._answer(decode_message(event.payload, RolloutStatus))

    def _answer(self, status: RolloutStatus) -> None:
        self.statuses.append(status)
        if status.phase is RolloutPhase.WANTED:
            self._send_chunks(status)
        elif self.acknowledges:
            self.say(
                RolloutAcknowledge(
                    digest=status.digest, campaign=status.campaign, sequence=status.sequence
                )
            )

    def _send_chunks(self, status: RolloutStatus) -> None:
        """One chunk to the device, or all from there on to all who listen."""
        data = self._bundles[status.digest]
        end = len(data) if self.shared else status.offset_bytes + 1
        for offset in range(status.offset_bytes, end, CHUNK_BYTES):
            header = ChunkHeader(digest=status.digest, offset_bytes=offset, size_bytes=len(data))
            chunk = np.frombuffer(data[offset : offset + CHUNK_BYTES], np.uint8)
            payload = encode_tensors({"data": exact(chunk)}, build_metadata(header))
            if self.shared:
                self._connection.publish(Channel.SHARED_BUNDLE, payload, bundle=status.digest)
            else:
                self._connection.publish(Channel.BUNDLE, payload, device=self._device)
            self.chunks_sent += 1
