"""MQTT packets cut out of a stream: whole, however they arrive."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.packets import MalformedPacketError, Packet, PacketReader, PublishPacket

PUBACK = bytes([0x40, 2, 0, 7])


def length(value: int) -> bytes:
    """A variable byte integer, as section 1.5.5 of the standard encodes it."""
    out = bytearray()
    while True:
        value, digit = divmod(value, 128)
        out.append(digit | (128 if value else 0))
        if not value:
            return bytes(out)


def publish(topic: bytes, payload: bytes, *, qos: int = 1, properties: bytes = b"") -> bytes:
    body = struct.pack("!H", len(topic)) + topic
    body += struct.pack("!H", 5) if qos else b""
    body += length(len(properties)) + properties + payload
    return bytes([0x30 | qos << 1]) + length(len(body)) + body


def feed(reader: PacketReader, data: bytes, sizes: Iterator[int]) -> list[Packet | PublishPacket]:
    """All packets of ``data``, which comes in pieces of at most these sizes."""
    packets = []
    position = 0
    while position < len(data):
        room = reader.room()
        piece = data[position : position + min(len(room), next(sizes))]
        room[: len(piece)] = piece
        reader.filled(len(piece))
        position += len(piece)
        while (packet := reader.next()) is not None:
            packets.append(packet)
    return packets


def pieces_of(size: int) -> Iterator[int]:
    while True:
        yield size


MESSAGES = st.tuples(
    st.binary(min_size=1, max_size=40),
    st.one_of(st.binary(max_size=300), st.integers(0, 200_000).map(bytes)),
    st.integers(0, 1),
    st.binary(max_size=200),
)


@given(st.lists(st.one_of(st.none(), MESSAGES), min_size=1, max_size=6), st.data())
def test_packets_come_out_as_they_went_in_whatever_the_pieces(
    messages: list[tuple[bytes, bytes, int, bytes] | None], data: st.DataObject
) -> None:
    stream = b"".join(
        PUBACK if m is None else publish(m[0], m[1], qos=m[2], properties=m[3]) for m in messages
    )
    few = max(1, len(stream) // 50)
    sizes = iter(lambda: data.draw(st.integers(few, max(few, len(stream)))), None)
    reader = PacketReader()
    packets = feed(reader, stream, sizes)
    assert not reader.is_mid_packet
    assert len(packets) == len(messages)
    for packet, message in zip(packets, messages, strict=True):
        if message is None:
            assert packet == Packet(0x40, b"\x00\x07")
            continue
        topic, payload, qos, properties = message
        assert isinstance(packet, PublishPacket)
        assert (packet.topic, packet.payload, packet.qos) == (topic, payload, qos)
        assert packet.mid == (5 if qos else 0)
        assert packet.properties == length(len(properties)) + properties


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_packets_come_out_of_the_smallest_pieces(size: int) -> None:
    payload = os.urandom(3_000)
    stream = publish(b"a/b", payload, properties=b"x" * 130) + PUBACK + publish(b"c", b"", qos=0)
    first, second, third = feed(PacketReader(), stream, pieces_of(size))
    assert isinstance(first, PublishPacket)
    assert isinstance(third, PublishPacket)
    assert first.payload == payload
    assert second == Packet(0x40, b"\x00\x07")
    assert (third.topic, third.payload, third.qos) == (b"c", b"", 0)


def test_rest_of_a_large_payload_is_read_to_where_it_stays() -> None:
    stream = publish(b"a", os.urandom(1_000_000))
    reader = PacketReader()
    room = reader.room()
    room[:] = stream[: len(room)]
    reader.filled(len(room))
    assert reader.next() is None
    rest = reader.room()
    assert len(rest) == len(stream) - len(room)
    rest[:] = stream[len(room) :]
    reader.filled(len(rest))
    packet = reader.next()
    assert isinstance(packet, PublishPacket)
    assert rest.obj is packet.payload
    assert packet.payload == stream[-1_000_000:]


def test_what_is_before_a_payload_may_be_larger_than_the_buffer() -> None:
    stream = publish(b"t" * 65_000, b"payload", properties=b"p" * 100_000)
    (packet,) = feed(PacketReader(), stream, pieces_of(10_000))
    assert isinstance(packet, PublishPacket)
    assert (len(packet.topic), len(packet.properties)) == (65_000, 100_003)
    assert packet.payload == b"payload"


def test_flags_are_those_of_the_first_byte() -> None:
    data = bytearray(publish(b"a", b"x"))
    data[0] |= 0b1001
    (packet,) = feed(PacketReader(), bytes(data), pieces_of(100))
    assert isinstance(packet, PublishPacket)
    assert (packet.retain, packet.dup, packet.qos) == (True, True, 1)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x40\xff\xff\xff\xff\x01", "four bytes"),
        (b"\x30\x01\x00", "before its payload"),
        (b"\x30\x03\x00\x05a", "before its payload"),
        (b"\x32\x05\x00\x01a\x00\x01", "before its payload"),
        (b"\x30\x04\x00\x01a\x09", "before its payload"),
        (b"\x30\x09\x00\x01a\xff\xff\xff\xff\xff\x01", "four bytes"),
    ],
)
def test_nonsense_is_told_from_what_is_not_there_yet(data: bytes, what: str) -> None:
    with pytest.raises(MalformedPacketError, match=what):
        feed(PacketReader(), data, pieces_of(100))
