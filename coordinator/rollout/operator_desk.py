"""Answers what operators' commands ask, each request once."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from coordinator.outgoing import Publish
from coordinator.rollout.actions import Action
from coordinator.rollout.bundle_facts import describe_bundle
from coordinator.rollout.campaign import Campaign, CampaignError
from coordinator.rollout.choice import choose_campaign
from coordinator.rollout.desk import RolloutDesk
from coordinator.rollout.records import DevicePhase
from coordinator.rollout.requests import (
    CampaignView,
    DeviceView,
    ErrorReply,
    ListReply,
    ListRequest,
    Order,
    OrderRequest,
    PlanReply,
    PlanRequest,
    Reply,
    ReplyEnvelope,
    Request,
    RequestEnvelope,
    StartRequest,
    StatusReply,
    StatusRequest,
    UploadReply,
    UploadRequest,
    decode_envelope,
    encode_envelope,
)
from wire.bundle import DEFAULT_MAX_BYTES
from wire.codec import decode_tensors
from wire.errors import ConfigError, ModelError, PeerProtocolError, Refusal, SplitfleetError
from wire.messages import ChunkHeader, parse_header
from wire.topics import Channel

logger = logging.getLogger(__name__)

REMEMBERED_REPLIES = 64
MOST_UPLOADS = 4
UPLOAD_IDLE_S = 60.0


@dataclass(slots=True)
class _Upload:
    """A bundle on its way from an operator; ``touched_s`` is monotonic."""

    digest: str
    size_bytes: int
    touched_s: float
    data: bytearray = field(default_factory=bytearray)


class OperatorDesk:
    """Owned by the service's thread, like the desk that it commands."""

    def __init__(self, desk: RolloutDesk, publish: Publish) -> None:
        self._desk = desk
        self._publish = publish
        self._replies: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._uploads: dict[str, _Upload] = {}

    def request(self, name: str, payload: bytes) -> None:
        """Take a request; raises PeerProtocolError if it cannot be read."""
        envelope = decode_envelope(payload, RequestEnvelope)
        key = (name, envelope.number)
        reply = self._replies.get(key)
        if reply is None:
            answer = self._answer(name, envelope.request)
            reply = encode_envelope(ReplyEnvelope(number=envelope.number, reply=answer))
            if not isinstance(envelope.request, StatusRequest | ListRequest):
                self._remember(key, reply)
        self._publish(Channel.OPERATOR_REPLY, reply, device=name)

    def chunk(self, name: str, payload: bytes) -> None:
        """Take a chunk of a bundle; raises PeerProtocolError for one that was not asked for."""
        tensors = decode_tensors(payload)
        header = parse_header(tensors.metadata, ChunkHeader)
        upload = self._uploads.get(name)
        if upload is None or upload.digest != header.digest:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, "no such bundle was asked for")
        data = tensors.require("data").tobytes()
        if header.offset_bytes == len(upload.data):
            if len(upload.data) + len(data) > upload.size_bytes:
                del self._uploads[name]
                raise PeerProtocolError(
                    Refusal.OVERSIZED, f"expected {upload.size_bytes} bytes in all"
                )
            upload.data += data
            upload.touched_s = time.monotonic()

    # Requests

    def _answer(self, name: str, request: Request) -> Reply:
        try:
            return self._perform(name, request)
        except ConfigError as exc:
            return ErrorReply(text=exc.expected, field=exc.field or "")
        except CampaignError as exc:
            return ErrorReply(text=str(exc))
        except ModelError as exc:
            return ErrorReply(text=str(exc), is_data=True)
        except SplitfleetError as exc:
            return ErrorReply(text=str(exc))

    def _perform(self, name: str, request: Request) -> Reply:
        match request:
            case PlanRequest(bundle=bundle, settings=settings, campaign=campaign):
                return PlanReply(plan=self._desk.plan(bundle, settings, campaign))
            case UploadRequest():
                return self._upload(name, request)
            case StartRequest():
                return self._start(request)
            case ListRequest():
                return self._list()
            case StatusRequest(campaign=campaign, order=order):
                return StatusReply(campaign=self._view(self._find(campaign, order)))
            case OrderRequest():
                return self._order(request)

    def _start(self, request: StartRequest) -> Reply:
        data = self._desk.journal.bundle(request.bundle.digest)
        # What the campaign goes by is what the bundle says, not what the command said of it.
        plan = self._desk.plan(describe_bundle(data), request.settings, request.campaign)
        if not plan.devices:
            reasons = ", ".join(f"{count} {why}" for why, count in plan.reasons().items())
            raise ConfigError(f"expected at least one device ({reasons or 'none is known'})")
        return self._written(self._desk.begin(plan, request.settings))

    def _order(self, request: OrderRequest) -> Reply:
        campaign = self._find(request.campaign, request.order)
        reason = request.reason or "by an operator"
        orders: dict[Order, Callable[[float], list[Action]]] = {
            Order.PAUSE: partial(campaign.pause, reason=reason),
            Order.RESUME: campaign.resume,
            Order.ABORT: partial(campaign.abort, revert=request.revert, reason=reason),
            Order.ROLLBACK: partial(campaign.roll_back, reason=reason),
            Order.RETRY: partial(campaign.retry, devices=request.devices),
        }
        self._desk.order(campaign, orders[request.order])
        return self._written(campaign)

    def _written(self, campaign: Campaign) -> Reply:
        """The campaign after an order, once that is written down."""
        if not self._desk.flush():
            return ErrorReply(text="the state store cannot be written: the order waits for it")
        return StatusReply(campaign=self._view(campaign))

    def _find(self, name: str, order: Order | None = None) -> Campaign:
        """The campaign of a name; without one that which an order is for, or the newest."""
        names = self._desk.journal.names()
        if not name and order is not None:
            return choose_campaign(order, [self._find(known) for known in names])
        if not name and names:
            records = (self._desk.journal.record(known) for known in names)
            newest = max((r for r in records if r is not None), key=lambda r: r.created_s)
            name = newest.campaign
        campaign = self._desk.find(name) if name else None
        if campaign is None:
            found = ", ".join(names) or "none"
            raise ConfigError(f"expected a campaign of this fleet ({found}), received {name!r}")
        return campaign

    def _list(self) -> Reply:
        campaigns = [self._find(name) for name in self._desk.journal.names()]
        views = [self._view(campaign, devices=False) for campaign in campaigns]
        views.sort(key=lambda view: -view.record.created_s)
        return ListReply(campaigns=tuple(views))

    def _view(self, campaign: Campaign, *, devices: bool = True) -> CampaignView:
        ledger, record = campaign.ledger, campaign.record
        waves = range(record.waves)
        shown = sorted(ledger, key=lambda entry: (entry.wave, entry.rank)) if devices else []
        return CampaignView(
            record=record,
            counts=ledger.counts(),
            wave_sizes=tuple(ledger.size(wave) for wave in waves),
            wave_counts=tuple(
                {p.value: n for p in DevicePhase if (n := ledger.count([p], wave))}
                for wave in waves
            ),
            devices=tuple(
                DeviceView(
                    entry=entry,
                    online=campaign.is_online(entry.device),
                    offset_bytes=self._desk.delivery.offset_of(record, entry.device),
                )
                for entry in shown
            ),
            now_s=time.time(),
        )

    def _remember(self, key: tuple[str, str], reply: bytes) -> None:
        self._replies[key] = reply
        while len(self._replies) > REMEMBERED_REPLIES:
            self._replies.popitem(last=False)

    # Bundles

    def _upload(self, name: str, request: UploadRequest) -> Reply:
        """Say how much of the bundle is here; the command sends the rest in order."""
        digest, size = request.digest, request.size_bytes
        if self._desk.journal.has_bundle(digest):
            return UploadReply(digest=digest, offset_bytes=size, is_complete=True)
        if not 0 < size <= DEFAULT_MAX_BYTES:
            raise ConfigError(f"expected a bundle of at most {DEFAULT_MAX_BYTES} bytes, not {size}")
        self._drop_idle()
        upload = self._uploads.get(name)
        if upload is None or upload.digest != digest:
            if len(self._uploads) >= MOST_UPLOADS:
                raise ConfigError("expected fewer bundles on their way here: try again later")
            upload = self._uploads[name] = _Upload(digest, size, time.monotonic())
        if len(upload.data) < upload.size_bytes:
            return UploadReply(digest=digest, offset_bytes=len(upload.data))
        del self._uploads[name]
        return self._keep(upload)

    def _keep(self, upload: _Upload) -> Reply:
        data = bytes(upload.data)
        if hashlib.sha256(data).hexdigest() != upload.digest:
            raise ModelError("the bundle arrived damaged: send it again")
        describe_bundle(data)
        self._desk.journal.put_bundle(upload.digest, data)
        logger.info("bundle %s: %d bytes came", upload.digest[:12], len(data))
        return UploadReply(digest=upload.digest, offset_bytes=len(data), is_complete=True)

    def _drop_idle(self) -> None:
        now_s = time.monotonic()
        idle = [n for n, u in self._uploads.items() if now_s - u.touched_s > UPLOAD_IDLE_S]
        for name in idle:
            del self._uploads[name]
