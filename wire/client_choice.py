"""Which MQTT client a connection is made with: ours upon paho, or paho's own."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

logger = logging.getLogger(__name__)

ClientName = Literal["quick", "stock"]

# Of paho, whose internals ours leans on.
TESTED_VERSIONS = ("2.2.",)


def build_client(name: ClientName, client_id: str) -> paho.Client:
    """An MQTT 5 client: the quick one where it is asked for and this paho is known, else paho's."""
    kind = paho.Client
    if name == "quick":
        found = version("paho-mqtt")
        if found.startswith(TESTED_VERSIONS):
            from wire.quick_client import QuickClient  # noqa: PLC0415 - others lack what it imports

            kind = QuickClient
        else:
            logger.info("paho-mqtt %s was not tested with ours: its own client is used", found)
    return kind(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
