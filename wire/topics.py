"""Every topic of the protocol, its direction, quality of service and retention.

A device writes only below ``dev/{its id}/up/`` and reads only ``dev/{its id}/down/`` and
``fleet/``, so that three broker rules are enough to keep devices apart. Operators' commands talk to
the coordinator below ``op/{name}/``, and coordinators to each other below ``coordinator/``, where
no device can write or read. No other module builds or takes apart a topic string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from wire.errors import PeerProtocolError, Refusal

ROOT = "splitfleet/v1"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_BUNDLE_KEY = re.compile(r"[0-9a-f]{16}")

NAME_RULE = "1 to 64 letters, digits, '_', '.' or '-', beginning with a letter or digit"


class Direction(Enum):
    """Who writes: a device (``up``), the coordinator to one device (``down``) or to all.

    ``op``: an operator's command and the coordinator, to each other. ``coordinator``: a coordinator
    to others that would take its place.
    """

    UP = "up"
    DOWN = "down"
    FLEET = "fleet"
    OPERATOR = "op"
    COORDINATOR = "coordinator"


class Payload(Enum):
    """Content type of a message, sent as the MQTT 5 property of that name."""

    JSON = "application/json"
    TENSORS = "application/vnd.safetensors"


class Channel(Enum):
    """One kind of message: direction, last topic level, payload, QoS, retain."""

    BIRTH = (Direction.UP, "birth", Payload.JSON, 1, True)
    STATE = (Direction.UP, "state", Payload.JSON, 1, True)
    ACTIVATIONS = (Direction.UP, "activations", Payload.TENSORS, 1, False)
    GRADIENTS = (Direction.UP, "gradients", Payload.TENSORS, 1, False)
    ROLLOUT_STATUS = (Direction.UP, "rollout", Payload.JSON, 1, False)
    TELEMETRY = (Direction.UP, "telemetry", Payload.JSON, 0, False)
    ALLOCATION = (Direction.DOWN, "allocation", Payload.JSON, 1, False)
    CUT_GRADIENT = (Direction.DOWN, "cut-gradient", Payload.TENSORS, 1, False)
    ROLLOUT = (Direction.DOWN, "rollout", Payload.JSON, 1, False)
    BUNDLE = (Direction.DOWN, "bundle", Payload.TENSORS, 1, False)
    WEIGHTS = (Direction.FLEET, "weights", Payload.TENSORS, 1, True)
    FLEET_STATE = (Direction.FLEET, "state", Payload.JSON, 1, True)
    SHARED_BUNDLE = (Direction.FLEET, "bundle", Payload.TENSORS, 1, False)
    OPERATOR_REQUEST = (Direction.OPERATOR, "request", Payload.JSON, 1, False)
    OPERATOR_BUNDLE = (Direction.OPERATOR, "bundle", Payload.TENSORS, 1, False)
    CLAIM = (Direction.COORDINATOR, "claim", Payload.JSON, 1, True)
    OPERATOR_REPLY = (Direction.OPERATOR, "reply", Payload.JSON, 1, False)

    def __init__(
        self, direction: Direction, level: str, payload: Payload, qos: int, retain: bool
    ) -> None:
        self.direction = direction
        self.level = level
        self.payload = payload
        self.qos = qos
        self.retain = retain


_BY_LEVEL = {(channel.direction, channel.level): channel for channel in Channel}


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed topic; ``device`` is None on channels of the fleet or the coordinator, and an
    operator's name on his.

    ``bundle`` is the beginning of a digest, on the channel of shared chunks alone.
    """

    fleet: str
    channel: Channel
    device: str | None = None
    bundle: str | None = None


def is_valid_name(name: str) -> bool:
    """Tell whether ``name`` can be a device id or fleet name (see NAME_RULE)."""
    return _NAME.fullmatch(name) is not None


def build_topic(
    fleet: str, channel: Channel, device: str | None = None, *, bundle: str | None = None
) -> str:
    """Build the topic of ``channel``; device channels need ``device``.

    Shared chunks need ``bundle``, a digest of which the first 16 digits count. They lie one level
    deeper than the rest of ``fleet/``, so that only who asks for them gets them.
    """
    if channel is Channel.SHARED_BUNDLE:
        assert bundle is not None, "shared chunks are those of one bundle"
        return f"{ROOT}/{fleet}/fleet/{channel.level}/{bundle[:16]}"
    if channel.direction in {Direction.FLEET, Direction.COORDINATOR}:
        return f"{ROOT}/{fleet}/{channel.direction.value}/{channel.level}"
    assert device is not None, f"{channel.name} is a channel of one device"
    if channel.direction is Direction.OPERATOR:
        return f"{ROOT}/{fleet}/op/{device}/{channel.level}"
    return f"{ROOT}/{fleet}/dev/{device}/{channel.direction.value}/{channel.level}"


def parse_topic(topic: str) -> Address:
    """Take a topic apart; raise PeerProtocolError for one that is not ours."""
    match topic.split("/"):
        case ["splitfleet", "v1", fleet, ("fleet" | "coordinator") as way, level]:
            channel = _BY_LEVEL.get((Direction(way), level))
            if channel is not None and channel is not Channel.SHARED_BUNDLE:
                return Address(fleet=fleet, channel=channel)
        case ["splitfleet", "v1", fleet, "fleet", "bundle", bundle]:
            if _BUNDLE_KEY.fullmatch(bundle):
                return Address(fleet=fleet, channel=Channel.SHARED_BUNDLE, bundle=bundle)
        case ["splitfleet", "v1", fleet, "dev", device, ("up" | "down") as way, level]:
            channel = _BY_LEVEL.get((Direction(way), level))
            if channel is not None and is_valid_name(device):
                return Address(fleet=fleet, channel=channel, device=device)
        case ["splitfleet", "v1", fleet, "op", name, level]:
            channel = _BY_LEVEL.get((Direction.OPERATOR, level))
            if channel is not None and is_valid_name(name):
                return Address(fleet=fleet, channel=channel, device=name)
    raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, f"no channel has the topic {topic!r}")


def build_client_id(fleet: str, device: str | None = None, *, purpose: str = "") -> str:
    """MQTT client id of a device, or of the coordinator; ':' keeps them apart, names have none.

    Not '/': some brokers (rumqttd, and so iotcore) end such a connection without a word.
    """
    place = "coordinator" if device is None else f"dev:{device}"
    return f"splitfleet:{fleet}:{place}" + (f":{purpose}" if purpose else "")


def coordinator_subscriptions(fleet: str) -> list[str]:
    """Topic filters of the coordinator: everything that devices, operators and its like write."""
    return [
        build_topic(fleet, Channel.CLAIM),
        f"{ROOT}/{fleet}/dev/+/up/+",
        f"{ROOT}/{fleet}/op/+/{Channel.OPERATOR_REQUEST.level}",
        f"{ROOT}/{fleet}/op/+/{Channel.OPERATOR_BUNDLE.level}",
    ]


def operator_subscriptions(fleet: str, name: str) -> list[str]:
    """Topic filters of an operator's command: the answers to it."""
    return [build_topic(fleet, Channel.OPERATOR_REPLY, name)]


def device_subscriptions(fleet: str, device: str) -> list[str]:
    """Topic filters of one device: what is for it, then what is for all.

    Its own channels come first, so that an allocation is there before the retained weights.
    """
    return [f"{ROOT}/{fleet}/dev/{device}/down/+", f"{ROOT}/{fleet}/fleet/+"]
