"""Messages of the protocol, as typed structures.

Control messages are JSON objects. Tensor messages are safetensors files whose string metadata
(``__metadata__``) carries the fields of the ``*Header`` structures. Evolution: new fields have
defaults, unknown fields are skipped, types never change. ``docs/protocol.md`` is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec

from wire.errors import PeerProtocolError, Refusal

SCHEMA = "1"

# Whole numbers on the wire stay below 2**53, so that JSON readers that know only doubles agree.
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every message."""


class Precision(StrEnum):
    """How tensors travel: see ``wire.precision``."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Mode(StrEnum):
    """``lockstep``: weights are the go of each step. ``frozen``: devices run ahead."""

    LOCKSTEP = "lockstep"
    FROZEN = "frozen"


class SampleOrder(StrEnum):
    """The order of a device's samples that offsets count in, made from the allocation's seed.

    ``shuffled``: a random permutation. ``by-class``: that permutation sorted by label, stably.
    """

    SHUFFLED = "shuffled"
    BY_CLASS = "by-class"


class Capabilities(Message, frozen=True, kw_only=True):
    """What a device can compute: backends by name; an empty ``backward`` means it cannot train.

    ``orders`` names the sample orders that it knows; those that we do not know are no matter.
    """

    forward: tuple[Text, ...] = ("onnxruntime",)
    backward: tuple[Text, ...] = ()
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8)
    reason: Text = ""
    orders: tuple[Text, ...] = (SampleOrder.SHUFFLED.value,)


class Birth(Message, frozen=True, kw_only=True):
    """What a device is and holds; retained, published after each connection.

    ``boot`` grows with every connection of the device, across restarts.
    ``label_counts`` (M classes) sums to ``samples``; ``sample_shape`` is without the batch.
    ``bundle`` is the digest of the one in use, ``committed`` that of the one in use for good:
    they differ while a bundle is on trial.
    """

    boot: NonNegative
    samples: Positive
    label_counts: tuple[NonNegative, ...]
    sample_shape: tuple[Positive, ...]
    capabilities: Capabilities = Capabilities()
    max_batch: Positive | None = None
    bundle: Text | None = None
    committed: Text | None = None
    agent: Text = ""
    labels: dict[str, str] = {}


class DeviceState(Message, frozen=True, kw_only=True):
    """Online or not; the offline one is also the last will. Counts only for its own ``boot``."""

    boot: NonNegative
    online: bool
    detail: Text = ""


class Slot(Message, frozen=True, kw_only=False, array_like=True, order=True):
    """A range of the device's permutation for one step, as ``[step, offset, count]``."""

    step: NonNegative
    offset: NonNegative
    count: Positive


Range = tuple[NonNegative, Positive]  # offset, count


class Allocation(Message, frozen=True, kw_only=True):
    """All that a device is to contribute from now on; replaces what it held before.

    Offsets index the device's samples in ``order`` for (run, epoch), rebuilt from ``seed``. In the
    order by class a slot is made of several ranges: ``ranges`` holds them, an entry per slot, and
    the slot has the offset of the first and the count of all. Else ``ranges`` is empty.
    ``plan`` grows with every replanning; an older one is ignored. ``rank`` is the coordinator
    rank to answer to (always 0 today). ``ahead`` is how many steps a device may be in front of
    ``fleet/state`` in frozen mode.
    """

    run: Text
    epoch: NonNegative
    seed: NonNegative
    plan: NonNegative
    bundle: Text
    slots: tuple[Slot, ...]
    precision: Precision = Precision.FP16
    mode: Mode = Mode.LOCKSTEP
    ahead: NonNegative = 0
    rank: NonNegative = 0
    order: SampleOrder = SampleOrder.SHUFFLED
    ranges: tuple[tuple[Range, ...], ...] = ()


class FleetState(Message, frozen=True, kw_only=True):
    """Where the run is; retained, and the coordinator's last will with ``online: false``."""

    online: bool
    run: Text = ""
    epoch: NonNegative = 0
    step: NonNegative = 0
    boot: NonNegative = 0


class Claim(Message, frozen=True, kw_only=True):
    """Which process coordinates the fleet; retained. The highest ``number`` counts.

    ``where`` is for people.
    """

    instance: Text
    number: NonNegative
    where: Text = ""


class RolloutMessage(Message, frozen=True, kw_only=True, tag_field="kind"):
    """Base of what the coordinator says on ``down/rollout``; ``kind`` tells them apart."""


class RolloutOffer(RolloutMessage, frozen=True, kw_only=True, tag="offer"):
    """A bundle for the device to fetch, verify, test and use.

    ``campaign`` is empty when a training run hands out its own bundle. A repeated offer with the
    same ``attempt`` changes nothing; a higher one asks a device that has given up to try again.
    ``shared``: chunks also come on the bundle's own topic below ``fleet/``. In use, the bundle is
    committed after ``good_steps`` answered ranges or ``soak_s`` seconds, whichever is first; with
    both 0, at once. The limits are seconds from the phase's beginning on the device.
    """

    digest: Digest
    size_bytes: Positive
    chunk_bytes: Positive
    name: Text = ""
    version: Text = ""
    campaign: Text = ""
    attempt: NonNegative = 0
    shared: bool = False
    good_steps: NonNegative = 0
    soak_s: Seconds = 0.0
    download_limit_s: PositiveSeconds = 3600.0
    self_test_limit_s: PositiveSeconds = 120.0
    commit_limit_s: PositiveSeconds = 86_400.0


class RolloutCancel(RolloutMessage, frozen=True, kw_only=True, tag="cancel"):
    """Stop what is not in use yet; with ``revert``, go back from it where it is.

    ``attempt`` is that of the offer: one that comes late must not stop a later one. None: any.
    """

    digest: Digest
    campaign: Text
    revert: bool = False
    attempt: NonNegative | None = None


class RolloutAcknowledge(RolloutMessage, frozen=True, kw_only=True, tag="acknowledge"):
    """The status of this ``sequence`` is written down: it need not be repeated."""

    digest: Digest
    campaign: Text
    sequence: NonNegative


class RolloutPhase(StrEnum):
    """How far a device is with an offered bundle.

    ``wanted``: downloading. ``verified``: whole, of the right digest and signature; self-test.
    ``installed``: in use, on trial. ``committed``: in use for good. ``refused``: never used, since
    it is not for this device. ``failed``: never used, since download or self-test went wrong.
    ``reverted``: was in use; the one before is again. ``cancelled``: stopped before it was used.
    """

    WANTED = "wanted"
    VERIFIED = "verified"
    INSTALLED = "installed"
    COMMITTED = "committed"
    REFUSED = "refused"
    FAILED = "failed"
    REVERTED = "reverted"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing follows by itself (a committed bundle may still be called back)."""
        return self not in {RolloutPhase.WANTED, RolloutPhase.VERIFIED, RolloutPhase.INSTALLED}


class SelfTestReport(Message, frozen=True, kw_only=True):
    """What the self-test measured on the device.

    ``max_error`` is the largest absolute difference from the golden output, ``gradient_error``
    the largest relative one of a gradient's norm; None where the bundle or device has none.
    ``peak_bytes`` is the memory that the test took beyond the idle process.
    """

    seconds: Seconds
    peak_bytes: NonNegative
    max_error: float | None = None
    gradient_error: float | None = None


class RolloutStatus(Message, frozen=True, kw_only=True):
    """A device's answer to an offer; ``wanted`` asks for the chunk at ``offset_bytes``.

    ``sequence`` grows with every new status of a campaign and is the same in its repetitions;
    within a campaign all but ``wanted`` are repeated until acknowledged.
    """

    digest: Text
    phase: RolloutPhase
    offset_bytes: NonNegative = 0
    detail: Text = ""
    campaign: Text = ""
    attempt: NonNegative = 0
    sequence: NonNegative = 0
    self_test: SelfTestReport | None = None


class Telemetry(Message, frozen=True, kw_only=True):
    """What a device counts about itself; informative only."""

    boot: NonNegative
    refused: dict[str, NonNegative] = {}
    steps: NonNegative = 0
    bytes_up: NonNegative = 0
    bytes_down: NonNegative = 0
    rss_bytes: NonNegative = 0


class RangeHeader(Message, frozen=True, kw_only=True):
    """What a tensor message of one slot belongs to: the range and the weights it was made with."""

    run: Text
    epoch: NonNegative
    step: NonNegative
    offset: NonNegative
    count: Positive


class ActivationsHeader(RangeHeader, frozen=True, kw_only=True):
    """Header of ``up/activations``; tensors ``activations`` (count, …) and ``labels`` (count,)."""

    weights_version: NonNegative
    bundle: Text


class GradientsHeader(RangeHeader, frozen=True, kw_only=True):
    """Header of ``up/gradients``; one tensor per trainable parameter, summed over the range."""

    weights_version: NonNegative


class CutGradientHeader(RangeHeader, frozen=True, kw_only=True):
    """Header of ``down/cut-gradient``; tensor ``gradient`` shaped like the activations sent."""


class WeightsHeader(Message, frozen=True, kw_only=True):
    """Header of ``fleet/weights``; one fp32 tensor per parameter. Its arrival is the go."""

    run: Text
    epoch: NonNegative
    step: NonNegative
    version: NonNegative
    bundle: Text


class ChunkHeader(Message, frozen=True, kw_only=True):
    """Header of ``down/bundle`` and ``fleet/bundle/…``; tensor ``data`` (U8) from
    ``offset_bytes`` on."""

    digest: Text
    offset_bytes: NonNegative
    size_bytes: Positive


M = TypeVar("M", bound=Message)

_encoder = msgspec.json.Encoder()
_decoders: dict[type[Message], msgspec.json.Decoder[Message]] = {}
_rollout_decoder: msgspec.json.Decoder[RolloutOffer | RolloutCancel | RolloutAcknowledge] = (
    msgspec.json.Decoder(RolloutOffer | RolloutCancel | RolloutAcknowledge)
)


def encode_message(message: Message) -> bytes:
    """Encode a control message as compact JSON."""
    return _encoder.encode(message)


def decode_message(payload: bytes, message_type: type[M]) -> M:
    """Decode a control message; raise PeerProtocolError naming the field that is wrong."""
    decoder = _decoders.get(message_type)
    if decoder is None:
        decoder = _decoders.setdefault(message_type, msgspec.json.Decoder(message_type))
    try:
        message = decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerProtocolError(Refusal.MALFORMED, str(exc)) from exc
    assert isinstance(message, message_type)
    return message


def decode_rollout(payload: bytes) -> RolloutOffer | RolloutCancel | RolloutAcknowledge:
    """Decode what came on ``down/rollout``; raise PeerProtocolError naming the field."""
    try:
        return _rollout_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PeerProtocolError(Refusal.MALFORMED, str(exc)) from exc


def build_metadata(header: Message) -> dict[str, str]:
    """Turn a header into safetensors metadata: every value as text."""
    return {name: str(getattr(header, name)) for name in header.__struct_fields__}


def parse_header(metadata: Mapping[str, str], header_type: type[M]) -> M:
    """Turn safetensors metadata into a header; raise PeerProtocolError naming the field."""
    try:
        return msgspec.convert(dict(metadata), header_type, strict=False)
    except msgspec.ValidationError as exc:
        raise PeerProtocolError(Refusal.MALFORMED, str(exc)) from exc
