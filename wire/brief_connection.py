"""A connection that lasts as long as a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wire.inbox import Inbox
from wire.mqtt import MqttConnection, MqttSettings, wait_for_connection


@contextmanager
def brief_connection(
    settings: MqttSettings,
    *,
    client_id: str,
    fleet: str,
    subscriptions: Sequence[str] = (),
    timeout_s: float,
) -> Iterator[tuple[MqttConnection, Inbox]]:
    """Connect without a last will; raises TransportError with the reason after ``timeout_s``."""
    inbox = Inbox()
    connection = MqttConnection(
        settings,
        client_id=client_id,
        fleet=fleet,
        subscriptions=list(subscriptions),
        inbox=inbox,
        next_boot=lambda: 0,
        build_will=None,
    )
    connection.start()
    try:
        wait_for_connection(inbox, timeout_s)
        yield connection, inbox
    finally:
        connection.stop()
