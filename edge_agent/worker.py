"""The device's tensor work for one slot: samples of a range in, a payload out.

Holds the data, the compute backend and the newest weights; knows nothing of MQTT. Weights are
decoded only when a range needs them, so a step without a slot costs the device nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.compute import ComputeBackend
from edge_agent.datasets import LabelledData
from edge_agent.session import Ranges, SendActivations, SendGradients
from wire.bundle import Bundle, Manifest, TensorSpec
from wire.codec import decode_tensors, encode_tensors, exact
from wire.errors import ModelError
from wire.messages import (
    ActivationsHeader,
    Allocation,
    GradientsHeader,
    SampleOrder,
    build_metadata,
)
from wire.precision import activation_parts, gradient_parts, read_all_floats, read_floats

_BatchKey = tuple[int, SampleOrder, Ranges]


class Worker:
    """Runs the client segment of the installed bundle on this device's samples."""

    def __init__(self, data: LabelledData, backend: ComputeBackend) -> None:
        self._data = data
        self._backend = backend
        self._bundle: Bundle | None = None
        # The newest payload and the bundle that it is for, until a range needs it.
        self._weights: tuple[str, bytes] | None = None
        self._order: tuple[tuple[int, SampleOrder], NDArray[np.int64]] | None = None
        self._batch: tuple[_BatchKey, NDArray[np.float32], NDArray[np.int64]] | None = None

    @property
    def backend(self) -> ComputeBackend:
        """What runs the client segment."""
        return self._backend

    def check(self, manifest: Manifest) -> None:
        """Raise ModelError if this device cannot serve such a bundle; nothing is loaded."""
        shape = self._data.x.shape[1:]
        if shape != manifest.input.shape:
            raise ModelError(
                f"expected samples of shape {manifest.input.shape}, this device holds {shape}"
            )
        if self._data.classes > manifest.classes:
            raise ModelError(
                f"expected labels of {manifest.classes} classes, this device holds "
                f"{self._data.classes}"
            )
        if not manifest.frozen and not self._backend.can_backward:
            raise ModelError(
                "this device runs no backward pass: expected compute.backward other than none, or "
                "a frozen client segment"
            )

    def install(self, bundle: Bundle) -> None:
        """Take a bundle into use; raises ModelError if this device cannot serve it."""
        self.check(bundle.manifest)
        self._backend.load(bundle)
        self._bundle = bundle

    def keep_weights(self, bundle_digest: str, payload: bytes) -> None:
        """Keep the newest weights for when a range needs them."""
        self._weights = (bundle_digest, payload)

    def activations(self, work: SendActivations) -> bytearray:
        """The payload of ``up/activations`` for a range."""
        bundle = self._require_bundle()
        self._load_weights(bundle)
        allocation, slot = work.allocation, work.slot
        x, y = self._samples(allocation, work.ranges)
        activations = self._backend.forward(x, token=(slot, work.weights_version))
        parts, metadata = activation_parts("activations", activations, allocation.precision)
        parts["labels"] = exact(y)
        header = ActivationsHeader(
            run=allocation.run,
            epoch=allocation.epoch,
            step=slot.step,
            offset=slot.offset,
            count=slot.count,
            weights_version=work.weights_version,
            bundle=allocation.bundle,
        )
        return encode_tensors(parts, build_metadata(header) | metadata)

    def gradients(self, work: SendGradients, cut_gradient: bytes) -> bytearray:
        """The payload of ``up/gradients`` for a range; raises PeerProtocolError for a bad one."""
        bundle = self._require_bundle()
        self._load_weights(bundle)
        allocation, slot = work.allocation, work.slot
        shape = (slot.count, *bundle.manifest.activation.shape)
        gradient = read_floats(decode_tensors(cut_gradient), "gradient", shape, limited=False)
        x, _ = self._samples(allocation, work.ranges)
        gradients = self._backend.backward(x, gradient, token=(slot, work.weights_version))
        parts, metadata = gradient_parts(gradients, allocation.precision)
        header = GradientsHeader(
            run=allocation.run,
            epoch=allocation.epoch,
            step=slot.step,
            offset=slot.offset,
            count=slot.count,
            weights_version=work.weights_version,
        )
        return encode_tensors(parts, build_metadata(header) | metadata)

    def _require_bundle(self) -> Bundle:
        assert self._bundle is not None, "work is due only with an installed bundle"
        return self._bundle

    def _load_weights(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        if manifest.frozen or self._weights is None or self._weights[0] != bundle.digest:
            return
        tensors = decode_tensors(self._weights[1])
        specs: Sequence[TensorSpec] = (*manifest.parameters, *manifest.buffers)
        wanted = {spec.name: spec.shape for spec in specs if spec.dtype == "float32"}
        self._backend.set_weights(read_all_floats(tensors, wanted, limited=False))
        # Only now: nothing may be computed with older weights than those that a header will name.
        self._weights = None

    def _samples(
        self, allocation: Allocation, ranges: Ranges
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The samples of these ranges, kept from the forward pass for the backward pass."""
        key = (allocation.seed, allocation.order, ranges)
        if self._batch is None or self._batch[0] != key:
            order = self._ordered(allocation.seed, allocation.order)
            chosen = np.concatenate([order[offset : offset + count] for offset, count in ranges])
            self._batch = (key, self._data.x[chosen], self._data.y[chosen])
        return self._batch[1], self._batch[2]

    def _ordered(self, seed: int, order: SampleOrder) -> NDArray[np.int64]:
        """The device's order of samples, rebuilt from the seed of (run, epoch)."""
        if self._order is None or self._order[0] != (seed, order):
            self._order = ((seed, order), order_samples(seed, self._data.y, order))
        return self._order[1]


def order_samples(seed: int, labels: NDArray[np.int64], order: SampleOrder) -> NDArray[np.int64]:
    """Indices of a device's n samples in the order that offsets count in, (n,).

    By class: class 0's samples first, then class 1's, …, in random order within each.
    """
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    if order is SampleOrder.SHUFFLED:
        return shuffled
    return shuffled[np.argsort(labels[shuffled], kind="stable")]
