"""A paho client that copies payloads less and writes where it is asked to.

Stock paho receives byte by byte and copies a payload five times on its way in, slices what is left
of it at every write on its way out, and leaves each write to its network thread, which costs a
switch of threads a message. This one reads with ``PacketReader``, hands payloads to the socket as
they are, and writes messages and their acknowledgements at once, in the caller's thread.

It leans on paho's internals: ``wire.client_choice`` takes it for the versions that it was tested
with, and paho's own client for all others.
"""

from __future__ import annotations

import logging
import ssl
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode, _ConnectionState
from paho.mqtt.exception import MalformedPacket, MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wire.packets import PUBLISH, MalformedPacketError, Packet, PacketReader, PublishPacket

logger = logging.getLogger(__name__)

_Piece = tuple[bytes | bytearray, int, paho.MQTTMessageInfo | None]  # bytes, QoS, whom to tell

_PUBACK = 0x40
_WRITTEN_AT_ONCE = (PUBLISH, _PUBACK)
_KNOWN_PROPERTIES = 64  # of messages: a handful, and expiries that count down
_SUCCESS = ReasonCode(PacketTypes.PUBACK)
_NO_PROPERTIES = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]


class QuickClient(paho.Client):
    """Paho's client with another way in and out for packets; for MQTT 5 and one network thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Held while anything is queued or written: two threads must not cut into each other's
        # packets. Taken after paho's _out_message_mutex where both are.
        self._write_lock = threading.RLock()
        self._reader = PacketReader()
        self._known_properties: dict[bytes, Properties] = {}
        super().__init__(*args, **kwargs)

    def reconnect(self) -> MQTTErrorCode:
        """As paho's; what came of the connection before is forgotten."""
        self._reader = PacketReader()
        return super().reconnect()

    # Out

    def _send_publish(  # noqa: PLR0917 - paho's signature
        self,
        mid: int,
        topic: bytes,
        payload: bytes | bytearray = b"",
        qos: int = 0,
        retain: bool = False,
        dup: bool = False,
        info: paho.MQTTMessageInfo | None = None,
        properties: Properties | None = None,
    ) -> MQTTErrorCode:
        """As paho's, in two pieces: the payload is not copied behind its header."""
        if self._sock is None:
            return paho.MQTT_ERR_NO_CONN
        packed = b"\0" if properties is None else properties.pack()  # type: ignore[no-untyped-call]
        before = struct.pack("!H", len(topic)) + topic
        if qos:
            before += struct.pack("!H", mid)
        before += packed
        head = bytearray((PUBLISH | dup << 3 | qos << 1 | retain,))
        self._pack_remaining_length(head, len(before) + len(payload))
        head += before
        # Only the last piece of a QoS 0 message says that it was published.
        pieces = [(head, 1, None), (payload, qos, info)] if payload else [(head, qos, info)]
        return self._queue(PUBLISH, mid, pieces)

    def _packet_queue(
        self,
        command: int,
        packet: bytes | bytearray,
        mid: int,
        qos: int,
        info: paho.MQTTMessageInfo | None = None,
    ) -> MQTTErrorCode:
        return self._queue(command, mid, [(packet, qos, info)])

    def _packet_write(self) -> MQTTErrorCode:
        with self._write_lock:
            return super()._packet_write()

    def _queue(self, command: int, mid: int, pieces: Sequence[_Piece]) -> MQTTErrorCode:
        """Queue the pieces of one packet, and write them at once where nothing is before them.

        Only messages and acknowledgements: before the broker's acceptance CONNECT has to go first,
        and a connection is ended by the thread that reads from it. With TLS that thread writes too:
        OpenSSL must not read and write one connection in two threads at once.
        """
        is_reader = threading.current_thread() is self._thread
        with self._write_lock:
            is_first = not self._out_packet
            for packet, qos, info in pieces:
                self._out_packet.append(
                    {
                        "command": command,
                        "mid": mid,
                        "qos": qos,
                        "pos": 0,
                        "to_process": len(packet),
                        "packet": memoryview(packet),  # type: ignore[typeddict-item]  # no copies
                        "info": info,
                    }
                )
            is_open = self._state == _ConnectionState.MQTT_CS_CONNECTED
            may_write = is_reader or not isinstance(self._sock, ssl.SSLSocket)
            if is_first and is_open and may_write and command & 0xF0 in _WRITTEN_AT_ONCE:
                self._packet_write()  # an error is left to the network thread: it meets it too
        if self._out_packet and not is_reader:
            self._wake()
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _wake(self) -> None:
        """Have the network thread look at what is queued."""
        if self._sockpairW is None:
            return
        with suppress(BlockingIOError):  # then it has been woken often enough
            self._sockpairW.send(b"0")

    # In

    def _packet_read(self) -> MQTTErrorCode:
        """Read what there is and handle the packets in it: select tells nothing of our buffer."""
        reader = self._reader
        try:
            while True:
                count = self._receive(reader.room())
                if count == 0:
                    return MQTTErrorCode.MQTT_ERR_CONN_LOST
                reader.filled(count)
                with self._msgtime_mutex:
                    self._last_bytes_received = paho.time_func()
                while (packet := reader.next()) is not None:
                    code = self._handle(packet)
                    if code != MQTTErrorCode.MQTT_ERR_SUCCESS or self._sock is None:
                        return code
                if not reader.is_mid_packet:
                    return MQTTErrorCode.MQTT_ERR_AGAIN
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except MalformedPacketError as exc:
            logger.warning("what the broker sent is not MQTT: %s", exc)
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        except OSError as exc:
            logger.debug("the connection cannot be read from: %s", exc)
            return MQTTErrorCode.MQTT_ERR_CONN_LOST

    def _receive(self, room: memoryview) -> int:
        """Bytes read into ``room``; 0 at the end. BlockingIOError while there are none."""
        sock: Any = self._sock
        if sock is None:
            raise ConnectionError("the connection was closed")
        try:
            return int(sock.recv_into(room))
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
            raise BlockingIOError from exc

    def _handle(self, packet: Packet | PublishPacket) -> MQTTErrorCode:
        match packet:
            case PublishPacket() if packet.qos < 2:
                return self._deliver(packet)
            case PublishPacket():  # never asked for
                return MQTTErrorCode.MQTT_ERR_PROTOCOL
            case Packet(first, body) if first == _PUBACK and len(body) == 2:
                return self._acknowledged(int.from_bytes(body, "big"))
        self._in_packet["command"] = packet.first
        self._in_packet["remaining_length"] = len(packet.body)
        self._in_packet["packet"] = bytearray(packet.body)
        self._in_packet["pos"] = 0
        try:
            return self._packet_handle()
        except MalformedPacket as exc:
            raise MalformedPacketError(str(exc)) from exc

    def _acknowledged(self, mid: int) -> MQTTErrorCode:
        """A message was accepted, as most are."""
        with self._out_message_mutex:
            if mid in self._out_messages:
                return self._do_on_publish(mid, _SUCCESS, _NO_PROPERTIES)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _deliver(self, packet: PublishPacket) -> MQTTErrorCode:
        message = paho.MQTTMessage(packet.mid, packet.topic)
        message.qos = packet.qos
        message.retain = packet.retain
        message.dup = packet.dup
        message.properties = self._properties_of(packet.properties)
        message.payload = packet.payload
        message.timestamp = paho.time_func()
        self._handle_on_message(message)
        return self._send_puback(packet.mid) if packet.qos else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _properties_of(self, packed: bytes) -> Properties:
        """A message's properties; few kinds come again and again, and reading one takes long."""
        known = self._known_properties.get(packed)
        if known is None:
            known = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            try:
                known.unpack(packed)  # type: ignore[no-untyped-call]
            except (IndexError, KeyError, ValueError, struct.error, MQTTException) as exc:
                raise MalformedPacketError(f"properties: {exc}") from exc
            if len(self._known_properties) >= _KNOWN_PROPERTIES:
                self._known_properties.clear()
            self._known_properties[packed] = known
        return known
