"""MQTT 5 packets cut out of a byte stream, without copies of large payloads. No sockets.

Source: MQTT 5.0 (OASIS, 7 March 2019), sections 2.1 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

PUBLISH = 0x30

_BUFFER_BYTES = 1 << 16  # holds what is before a payload, and many small packets at once
_MAX_LENGTH_BYTES = 4


class MalformedPacketError(ValueError):
    """What came is not MQTT: the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class Packet:
    """Any packet but PUBLISH: ``first`` is its first byte, ``body`` all behind the length."""

    first: int
    body: bytes


@dataclass(frozen=True, slots=True)
class PublishPacket:
    """A message. ``payload`` is memory of its own; ``properties`` begin with their length."""

    first: int
    topic: bytes
    mid: int
    properties: bytes
    payload: bytearray

    @property
    def qos(self) -> int:
        return (self.first >> 1) & 3

    @property
    def retain(self) -> bool:
        return bool(self.first & 1)

    @property
    def dup(self) -> bool:
        return bool(self.first & 8)


class PacketReader:
    """Read into ``room()``, say how much came with ``filled``, then take packets with ``next``.

    Small packets are read many at a time. The payload of a large one is read to where it stays:
    only what came with its beginning is copied.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = 0  # of what has not been taken
        self._end = 0
        self._message: PublishPacket | None = None  # whose payload is under way
        self._received = 0  # bytes of that payload

    def room(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._message is not None:
            return memoryview(self._message.payload)[self._received :]
        if self._end == len(self._buffer):
            self._make_room()
        return memoryview(self._buffer)[self._end :]

    def filled(self, count: int) -> None:
        """``count`` bytes were written to the beginning of ``room()``."""
        if self._message is not None:
            self._received += count
        else:
            self._end += count

    @property
    def is_mid_packet(self) -> bool:
        """Whether the rest of a packet is still to come."""
        return self._message is not None or self._start < self._end

    def next(self) -> Packet | PublishPacket | None:
        """The next whole packet, or None until more has come; MalformedPacketError for nonsense."""
        if self._message is None:
            return self._cut()
        if self._received < len(self._message.payload):
            return None
        message, self._message = self._message, None
        return message

    def _cut(self) -> Packet | PublishPacket | None:
        buffer, start, end = self._buffer, self._start, self._end
        if start == end:
            self._start = self._end = 0
            return None
        if (length := _read_length(buffer, start + 1, end)) is None:
            return None
        size, begin = length
        first = buffer[start]
        if first & 0xF0 == PUBLISH:
            return self._cut_publish(first, begin, size)
        if begin + size > end:
            return None
        self._start = begin + size
        return Packet(first, bytes(buffer[begin : begin + size]))

    def _cut_publish(self, first: int, begin: int, size: int) -> PublishPacket | None:
        buffer, end = self._buffer, min(self._end, begin + size)
        is_whole = end == begin + size
        position = begin + 2
        topic_end = position + int.from_bytes(buffer[begin:position], "big")
        properties_at = topic_end + (2 if first & 0x06 else 0)
        length = _read_length(buffer, properties_at, end) if position <= end else None
        payload_at = end + 1 if length is None else length[0] + length[1]
        if payload_at > end:
            if is_whole:
                raise MalformedPacketError("a PUBLISH packet ends before its payload begins")
            return None
        payload = bytearray(begin + size - payload_at)
        here = end - payload_at
        payload[:here] = memoryview(buffer)[payload_at:end]
        message = PublishPacket(
            first,
            bytes(buffer[position:topic_end]),
            int.from_bytes(buffer[topic_end:properties_at], "big"),
            bytes(buffer[properties_at:payload_at]),
            payload,
        )
        self._start = end
        if is_whole:
            return message
        self._start = self._end = 0
        self._message, self._received = message, here
        return None

    def _make_room(self) -> None:
        """Move what is left to the front; a larger buffer where it fills this one."""
        left = self._buffer[self._start : self._end]
        size = len(self._buffer)
        self._buffer = bytearray(size if len(left) < size else 2 * size)
        self._buffer[: len(left)] = left
        self._start, self._end = 0, len(left)


def _read_length(buffer: bytearray, start: int, end: int) -> tuple[int, int] | None:
    """A variable byte integer and where it ends; None while bytes of it are missing."""
    value = 0
    for number, position in enumerate(range(start, start + _MAX_LENGTH_BYTES)):
        if position >= end:
            return None
        byte = buffer[position]
        value |= (byte & 127) << (7 * number)
        if byte < 128:
            return value, position + 1
    raise MalformedPacketError("a length takes more than four bytes")
