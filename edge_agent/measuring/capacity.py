"""How many samples a device can take in one step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wire.bundle import Manifest

_FLOAT32_BYTES = 4
_LABEL_BYTES = 8
_HEADER_BYTES = 4096  # of a tensor message: metadata, names and shapes

# Activations and the gradient at the cut, each as floats and as the message that they travel in.
_CUT_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The largest batch of a step and what sets that limit."""

    largest_batch: int
    limit: str


def find_capacity(
    manifest: Manifest,
    *,
    samples: int,
    available_bytes: int | None,
    pass_bytes: int,
    max_payload_bytes: int,
    max_batch: int | None,
) -> Capacity:
    """The largest batch of a device with so many ``samples``, with fp32 payloads; at least 0.

    ``pass_bytes`` is what the intermediate values of one pass may take; a batch goes through in as
    many passes as it needs, and is held as a whole besides. ``available_bytes`` is None where the
    system does not say.
    """
    sample_bytes = _FLOAT32_BYTES * math.prod(manifest.input.shape)
    cut_bytes = _FLOAT32_BYTES * math.prod(manifest.activation.shape)
    messages = (max_payload_bytes - _HEADER_BYTES) // (cut_bytes + _LABEL_BYTES)
    limits = [
        Capacity(largest_batch=samples, limit="all samples"),
        Capacity(largest_batch=messages, limit="mqtt.max_payload_bytes"),
    ]
    if available_bytes is not None:
        held = (available_bytes - pass_bytes) // (sample_bytes + _CUT_COPIES * cut_bytes)
        limits.append(Capacity(largest_batch=held, limit="memory"))
    if max_batch is not None:
        limits.append(Capacity(largest_batch=max_batch, limit="compute.max_batch"))
    tightest = min(limits, key=lambda capacity: capacity.largest_batch)
    return Capacity(largest_batch=max(0, tightest.largest_batch), limit=tightest.limit)
