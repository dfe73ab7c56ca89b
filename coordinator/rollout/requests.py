"""What an operator's command asks of the coordinator, and what it answers. Schema in one place.

Both are JSON on ``op/{name}/request`` and ``op/{name}/reply``, where ``name`` is made up by each
command. A request is repeated under the same number until it is answered; it is performed once.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import msgspec

from coordinator.rollout.records import BundleFacts, CampaignRecord, CampaignSettings, DeviceEntry
from coordinator.rollout.selection import CampaignPlan
from wire.errors import PeerProtocolError, Refusal
from wire.messages import Digest, NonNegative, Text


class OperatorMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of requests and answers; unknown fields are skipped."""


class PlanRequest(OperatorMessage, frozen=True, kw_only=True, tag="plan"):
    """Who would get this bundle, and when; changes nothing."""

    bundle: BundleFacts
    settings: CampaignSettings
    campaign: Text = ""


class StartRequest(OperatorMessage, frozen=True, kw_only=True, tag="start"):
    """Begin a campaign; its bundle must have been sent before."""

    bundle: BundleFacts
    settings: CampaignSettings
    campaign: Text = ""


class UploadRequest(OperatorMessage, frozen=True, kw_only=True, tag="upload"):
    """Whether the coordinator has a bundle; if not, it asks for the chunk at an offset."""

    digest: Digest
    size_bytes: NonNegative


class ListRequest(OperatorMessage, frozen=True, kw_only=True, tag="list"):
    """All campaigns of the fleet."""


class Order(StrEnum):
    """What an operator can do with a campaign."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"
    RETRY = "retry"


class StatusRequest(OperatorMessage, frozen=True, kw_only=True, tag="status"):
    """One campaign with its devices. Where none is named the newest, or that of an ``order``."""

    campaign: Text = ""
    order: Order | None = None


class OrderRequest(OperatorMessage, frozen=True, kw_only=True, tag="order"):
    """Do something with a campaign, or with the only one that comes into question.

    ``reason`` is kept with it. ``devices``: those to try again, instead of all that failed.
    """

    order: Order
    campaign: Text = ""
    revert: bool = False
    reason: Text = ""
    devices: tuple[Text, ...] = ()


Request = PlanRequest | StartRequest | UploadRequest | ListRequest | StatusRequest | OrderRequest


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a campaign as it is now."""

    entry: DeviceEntry
    online: bool
    offset_bytes: int = 0


class CampaignView(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign with its counts by phase and by wave."""

    record: CampaignRecord
    counts: dict[str, int]
    wave_sizes: tuple[int, ...]
    wave_counts: tuple[dict[str, int], ...]
    devices: tuple[DeviceView, ...] = ()
    now_s: float = 0.0


class PlanReply(OperatorMessage, frozen=True, kw_only=True, tag="plan"):
    """The plan."""

    plan: CampaignPlan


class UploadReply(OperatorMessage, frozen=True, kw_only=True, tag="upload"):
    """How many bytes of the bundle are there; ``is_complete`` once it was verified."""

    digest: str
    offset_bytes: int
    is_complete: bool = False


class ListReply(OperatorMessage, frozen=True, kw_only=True, tag="list"):
    """Campaigns without their devices, the newest first."""

    campaigns: tuple[CampaignView, ...]


class StatusReply(OperatorMessage, frozen=True, kw_only=True, tag="status"):
    """One campaign."""

    campaign: CampaignView


class ErrorReply(OperatorMessage, frozen=True, kw_only=True, tag="error"):
    """Why a request was not performed; ``field`` names the option where one is at fault."""

    text: str
    field: str = ""
    is_data: bool = False


Reply = PlanReply | UploadReply | ListReply | StatusReply | ErrorReply

MAX_NUMBER_LENGTH = 64


class RequestEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """A request with its number."""

    number: Text
    request: Request


class ReplyEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """A reply with the number of its request."""

    number: str
    reply: Reply


E_ = TypeVar("E_", RequestEnvelope, ReplyEnvelope)


def encode_envelope(envelope: RequestEnvelope | ReplyEnvelope) -> bytes:
    """As JSON."""
    return msgspec.json.encode(envelope)


def decode_envelope(payload: bytes, envelope_type: type[E_]) -> E_:
    """From JSON; raises PeerProtocolError naming the field that is wrong."""
    try:
        return msgspec.json.decode(payload, type=envelope_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerProtocolError(Refusal.MALFORMED, str(exc)) from exc
