"""The floor's client: answers where paho calls it, with bytes that were made beforehand.

As a program it is one device: ``python floor_device.py HOST PORT CLIENT FLEET DEVICE
ACTIVATION_BYTES GRADIENT_BYTES`` answers every weights message and every cut gradient until it is
ended. It imports nothing but ``wire``, so that starting one costs little.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from paho.mqtt.properties import Properties

from wire.inbox import Inbox
from wire.mqtt import MqttConnection, MqttSettings
from wire.topics import Channel, build_topic, device_subscriptions

Answer = Callable[[str, int], None]


class DirectConnection(MqttConnection):
    """The product's connection with its settings, without all that lies behind a callback.

    ``answer(topic, payload_bytes)`` is called in paho's thread for each message.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        client_id: str,
        fleet: str,
        subscriptions: list[str],
        answer: Answer,
    ) -> None:
        super().__init__(
            settings,
            client_id=client_id,
            fleet=fleet,
            subscriptions=subscriptions,
            inbox=Inbox(),
            next_boot=lambda: 1,
            build_will=None,
        )
        self._answer = answer
        self._tensors: Properties = self._publish_properties(Channel.ACTIVATIONS.payload, None)

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1 and the properties of a tensor message."""
        self._client.publish(topic, payload, qos=1, retain=retain, properties=self._tensors)

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        self._answer(message.topic, len(message.payload))


def build_device(
    settings: MqttSettings,
    *,
    fleet: str,
    device: str,
    activation_bytes: int,
    gradient_bytes: int,
) -> DirectConnection:
    """A device that answers weights with activations and a cut gradient with gradients."""
    weights_topic = build_topic(fleet, Channel.WEIGHTS)
    activations_topic = build_topic(fleet, Channel.ACTIVATIONS, device)
    gradients_topic = build_topic(fleet, Channel.GRADIENTS, device)
    activations, gradients = os.urandom(activation_bytes), os.urandom(gradient_bytes)

    def answer(topic: str, _payload_bytes: int) -> None:
        if topic == weights_topic:
            connection.send(activations_topic, activations)
        else:
            connection.send(gradients_topic, gradients)

    connection = DirectConnection(
        settings,
        client_id=f"{fleet}-{device}",
        fleet=fleet,
        subscriptions=device_subscriptions(fleet, device),
        answer=answer,
    )
    return connection


def main() -> None:
    """Serve as one device until a signal ends the process."""
    host, port, client, fleet, device, activation_bytes, gradient_bytes = sys.argv[1:]
    connection = build_device(
        msgspec.convert({"host": host, "port": int(port), "client": client}, MqttSettings),
        fleet=fleet,
        device=device,
        activation_bytes=int(activation_bytes),
        gradient_bytes=int(gradient_bytes),
    )
    connection.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    connection.stop()


if __name__ == "__main__":
    # Before any thread exists, so that only sigwait sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
