"""An operator's command talks to the coordinator: requests and answers over MQTT, bundles up."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from coordinator.rollout.records import BundleFacts
from coordinator.rollout.requests import (
    ErrorReply,
    Reply,
    ReplyEnvelope,
    Request,
    RequestEnvelope,
    UploadReply,
    UploadRequest,
    decode_envelope,
    encode_envelope,
)
from wire.brief_connection import brief_connection
from wire.codec import encode_tensors, exact
from wire.errors import ConfigError, ModelError, PeerProtocolError, TransportError
from wire.inbox import Disconnected, Inbox, Received
from wire.messages import ChunkHeader, build_metadata
from wire.mqtt import MqttConnection, MqttSettings
from wire.topics import Channel, build_client_id, operator_subscriptions

R = TypeVar("R", bound=Reply)

CONNECT_S = 10.0
ANSWER_S = 15.0
REPEAT_S = 3.0
UPLOAD_CHUNK_BYTES = 256 * 1024
CHUNKS_A_TURN = 16  # then the coordinator is asked how far it is


class OperatorClient:
    """A connection to a fleet's coordinator."""

    def __init__(self, connection: MqttConnection, inbox: Inbox, name: str, where: str) -> None:
        self._connection = connection
        self._inbox = inbox
        self._name = name
        self._where = where
        self._number = 0

    def ask(self, request: Request, reply_type: type[R]) -> R:
        """Ask, again until there is an answer.

        Raises ConfigError or ModelError with the coordinator's words if it refuses, and
        TransportError if none answers.
        """
        self._number += 1
        envelope = RequestEnvelope(number=f"{self._number}", request=request)
        deadline_s = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline_s:
            self._connection.publish(
                Channel.OPERATOR_REQUEST, encode_envelope(envelope), device=self._name
            )
            reply = self._await(envelope.number, min(deadline_s, time.monotonic() + REPEAT_S))
            if reply is not None:
                return _expect(reply, reply_type)
        raise TransportError(
            f"no coordinator answers for {self._where}: is `coordinator serve` or `coordinator "
            "train` running, and may this user write below op/?"
        )

    def upload(self, bundle: BundleFacts, data: bytes) -> None:
        """Bring a bundle to the coordinator, unless it has it."""
        request = UploadRequest(digest=bundle.digest, size_bytes=bundle.size_bytes)
        deadline_s = time.monotonic() + ANSWER_S
        held = -1
        while not (reply := self.ask(request, UploadReply)).is_complete:
            if reply.offset_bytes > held:
                deadline_s = time.monotonic() + ANSWER_S
            elif time.monotonic() > deadline_s:
                raise TransportError(f"the coordinator has {held} of {len(data)} bytes and stalls")
            held = reply.offset_bytes
            self._send(bundle.digest, data, held)

    def _send(self, digest: str, data: bytes, start: int) -> None:
        stop = min(len(data), start + CHUNKS_A_TURN * UPLOAD_CHUNK_BYTES)
        for offset in range(start, stop, UPLOAD_CHUNK_BYTES):
            part = np.frombuffer(data[offset : offset + UPLOAD_CHUNK_BYTES], np.uint8)
            header = ChunkHeader(digest=digest, offset_bytes=offset, size_bytes=len(data))
            payload = encode_tensors({"data": exact(part)}, build_metadata(header))
            self._connection.publish(Channel.OPERATOR_BUNDLE, payload, device=self._name)

    def _await(self, number: str, deadline_s: float) -> Reply | None:
        """The answer to this request, or None when the time is over."""
        while (rest_s := deadline_s - time.monotonic()) > 0:
            match self._inbox.get(rest_s):
                case Received(payload=payload):
                    reply = _read(payload)
                    if reply.number == number:
                        return reply.reply
                case Disconnected(reason=reason):
                    raise TransportError(reason)
                case _:
                    pass
        return None


def _read(payload: bytes) -> ReplyEnvelope:
    try:
        return decode_envelope(payload, ReplyEnvelope)
    except PeerProtocolError as exc:
        raise TransportError(
            f"the coordinator's answer cannot be read, is it of another version? ({exc.detail})"
        ) from exc


def _expect(reply: Reply, reply_type: type[R]) -> R:
    if isinstance(reply, ErrorReply):
        if reply.is_data:
            raise ModelError(reply.text)
        raise ConfigError(reply.text, field=reply.field and f"--{reply.field}")
    if not isinstance(reply, reply_type):
        raise TransportError(f"expected a {reply_type.__name__}, received {type(reply).__name__}")
    return reply


@contextmanager
def operator_client(settings: MqttSettings, fleet: str) -> Iterator[OperatorClient]:
    """Connect as an operator; raises TransportError if the broker does not answer."""
    name = f"op-{secrets.token_hex(6)}"
    with brief_connection(
        settings,
        client_id=build_client_id(fleet, purpose=name),
        fleet=fleet,
        subscriptions=operator_subscriptions(fleet, name),
        timeout_s=CONNECT_S,
    ) as (connection, inbox):
        where = f"fleet {fleet!r} at {settings.host}:{settings.port}"
        yield OperatorClient(connection, inbox, name, where)
