"""The agent's backend: a forward engine, a backward engine and micro-batches.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.compute.onnx_backend import OnnxForward, OnnxTrainer
from edge_agent.compute.onnx_session import import_onnxruntime
from edge_agent.compute.torch_backend import TorchSegment, import_torch, warm_up_autograd
from wire.bundle import Bundle, Manifest
from wire.errors import LocalProtocolError, ModelError

# Smaller passes cost time: with 32 and 64 MiB a pass, steps of 8 and 32 samples of a ResNet stage
# took the same time on ONNX Runtime, with 16 MiB a twentieth more.
_ONNX_PASS_BYTES = 32 * 1024 * 1024
# As much is kept on ONNX Runtime for the backward pass: 38 samples of a ResNet stage. Computing the
# forward pass of the others again takes a fifth to a third more time and no memory.
_ONNX_KEPT_BYTES = 96 * 1024 * 1024


class SegmentBackend:
    """Runs one bundle. Build it with ``build_backend``."""

    def __init__(
        self, *, forward: str, backward: str, threads: int, max_batch_bytes: int | None
    ) -> None:
        self._forward = forward
        self.forward_name = forward
        self.backward_name = backward
        if forward == "auto":
            self.forward_name = "torch" if backward == "torch" else "onnxruntime"
        self._threads = threads
        self._max_batch_bytes = max_batch_bytes
        self._bundle: Bundle | None = None
        self._onnx: OnnxForward | None = None
        self._onnx_trainer: OnnxTrainer | None = None
        self._torch: TorchSegment | None = None
        self._kept_token: Hashable | None = None
        self._kept: dict[int, Any] = {}  # by the first row of a micro-batch

    @property
    def can_backward(self) -> bool:
        return self.backward_name != "none"

    def prepare(self, manifest: Manifest) -> None:
        forward, backward = self._engines(manifest)
        if "onnxruntime" in (forward, backward):
            import_onnxruntime()
        # A segment that ONNX Runtime runs alone must not cost the memory and the start of torch.
        if "torch" in (forward, backward):
            import_torch()
        if backward == "torch":
            warm_up_autograd()

    def load(self, bundle: Bundle) -> None:
        weights = bundle.initial_weights()
        forward, backward = self._engines(bundle.manifest)
        onnx = OnnxForward(bundle, threads=self._threads) if forward == "onnxruntime" else None
        trains_on_onnx = backward == "onnxruntime"
        onnx_trainer = OnnxTrainer(bundle, threads=self._threads) if trains_on_onnx else None
        needs_torch = "torch" in (forward, backward)
        torch = TorchSegment(bundle, threads=self._threads) if needs_torch else None
        self._bundle, self.forward_name = bundle, forward
        self._onnx, self._onnx_trainer, self._torch = onnx, onnx_trainer, torch
        self.set_weights(weights)

    def _engines(self, manifest: Manifest) -> tuple[str, str]:
        """What runs such a bundle forward and backward (``none`` where it is not trained)."""
        backward = "none" if manifest.frozen else self.backward_name
        if self._forward != "auto":
            return self._forward, backward
        # Where torch runs the backward pass, its forward pass keeps the graph for it: with
        # another engine in front the segment would be run forward twice in every step.
        return ("torch" if backward == "torch" else "onnxruntime"), backward

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        checked = _check_weights(self._loaded(), weights)
        self._forget_kept()
        for engine in (self._onnx, self._onnx_trainer, self._torch):
            if engine is not None:
                engine.set_weights(checked)

    def forward(self, x_BX: NDArray[Any], *, token: Hashable | None = None) -> NDArray[Any]:
        manifest = self._loaded().manifest
        x_BX = _check_batch("samples", x_BX, manifest.input.shape)
        self._forget_kept()
        keeping = token is not None and self._can_keep
        parts = list(
            _micro_batches(
                len(x_BX), self.backward_pass_samples if keeping else self.forward_pass_samples
            )
        )
        kept_samples = self._kept_samples(parts) if keeping else 0
        self._kept_token = token if kept_samples else None
        if len(parts) == 1:
            return self._forward_part(x_BX, parts[0], kept_samples)
        activations_BA = np.empty((len(x_BX), *manifest.activation.shape), np.float32)
        for rows in parts:
            activations_BA[rows] = self._forward_part(x_BX[rows], rows, kept_samples)
        return activations_BA

    def _forward_part(self, x_BX: NDArray[Any], rows: slice, kept_samples: int) -> NDArray[Any]:
        if rows.stop <= kept_samples:
            activations_BA, self._kept[rows.start] = self._trainer().forward_kept(x_BX)
            return activations_BA
        engine = self._onnx or self._torch
        assert engine is not None, "a loaded backend has a forward engine"
        return engine.forward(x_BX)

    def backward(
        self, x_BX: NDArray[Any], grad_BA: NDArray[Any], *, token: Hashable | None = None
    ) -> dict[str, NDArray[Any]]:
        manifest = self._loaded().manifest
        trainer = self._trainer()
        x_BX = _check_batch("samples", x_BX, manifest.input.shape)
        grad_BA = _check_batch("cut gradients", grad_BA, manifest.activation.shape)
        if len(x_BX) != len(grad_BA):
            raise ModelError(f"expected {len(x_BX)} cut gradients, received {len(grad_BA)}")
        if token is None or token != self._kept_token:
            self._forget_kept()  # first, so that two passes' values never stand side by side
        parts = list(_micro_batches(len(x_BX), self.backward_pass_samples))
        total: dict[str, NDArray[Any]] = {}
        for rows in parts:
            part = trainer.backward(x_BX[rows], grad_BA[rows], self._kept.pop(rows.start, None))
            if len(parts) == 1:
                total = part
            else:
                _add_into(total, part)
        self._kept_token = None
        return total or {p.name: np.zeros(p.shape, np.float32) for p in manifest.parameters}

    @property
    def forward_pass_samples(self) -> int | None:
        """Samples in one forward pass of the loaded bundle; None: any number."""
        manifest = self._loaded().manifest
        on_onnx = self._onnx is not None
        return self._pass_samples(manifest.forward_bytes_per_sample, on_onnx=on_onnx)

    @property
    def backward_pass_samples(self) -> int | None:
        """Samples in one backward pass of the loaded bundle; None: any number."""
        manifest = self._loaded().manifest
        if self._onnx_trainer is None:
            return self._pass_samples(manifest.backward_bytes_per_sample, on_onnx=False)
        per_sample = manifest.onnx_backward_bytes_per_sample or manifest.backward_bytes_per_sample
        return self._pass_samples(per_sample, on_onnx=True)

    def _loaded(self) -> Bundle:
        if self._bundle is None:
            raise LocalProtocolError("a backend was used before a bundle was loaded")
        return self._bundle

    def _trainer(self) -> OnnxTrainer | TorchSegment:
        trainer = self._onnx_trainer or self._torch
        if trainer is None or self._loaded().manifest.frozen or not self.can_backward:
            raise LocalProtocolError("a backward pass was asked of a backend that has none")
        return trainer

    @property
    def _can_keep(self) -> bool:
        """Whether one engine runs both passes, and can keep what the first has made."""
        if self._loaded().manifest.frozen or self.forward_name != self.backward_name:
            return False
        return self._trainer().can_keep

    def _pass_samples(self, bytes_per_sample: int, *, on_onnx: bool) -> int | None:
        """Samples whose intermediate values fit, at least one; None: any number."""
        limit_bytes = self._max_batch_bytes
        if on_onnx:
            pass_bytes = self._onnx_pass_bytes
            limit_bytes = min(pass_bytes, limit_bytes or pass_bytes)
        if limit_bytes is None:
            return None
        return max(1, limit_bytes // max(1, bytes_per_sample))

    @property
    def _onnx_pass_bytes(self) -> int:
        # Each pass also writes all gradients: it should have more to do than that.
        parameters = self._loaded().manifest.parameters
        return max(_ONNX_PASS_BYTES, 4 * sum(4 * math.prod(spec.shape) for spec in parameters))

    def _kept_samples(self, parts: Sequence[slice]) -> int:
        """How many samples' values are kept for the backward pass: those of whole passes, and no
        more than leave room for another pass."""
        if self._onnx_trainer is None:  # a pass of torch takes all the room there is
            return parts[0].stop if len(parts) == 1 else 0
        limit_bytes = _ONNX_KEPT_BYTES
        if self._max_batch_bytes is not None:
            another_pass = self._onnx_pass_bytes if len(parts) > 1 else 0
            limit_bytes = min(limit_bytes, self._max_batch_bytes - another_pass)
        per_sample = self._loaded().manifest.onnx_kept_bytes_per_sample
        fitting = (rows.stop for rows in parts if rows.stop * per_sample <= limit_bytes)
        return max(fitting, default=0)

    def _forget_kept(self) -> None:
        self._kept_token = None
        self._kept.clear()


def _micro_batches(samples: int, size: int | None) -> Iterator[slice]:
    """Row ranges of at most ``size``, as equal as possible."""
    if samples == 0:
        return
    count = 1 if size is None else -(-samples // size)
    for number in range(count):
        yield slice(samples * number // count, samples * (number + 1) // count)


def _add_into(total: dict[str, NDArray[Any]], part: Mapping[str, NDArray[Any]]) -> None:
    for name, gradient in part.items():
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient.copy()  # autograd may hand out one memory twice


def _check_batch(what: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise ModelError(f"expected {what} of shape (B, {shape}), received {array.shape}")
    return np.ascontiguousarray(array, np.float32)


def _check_weights(bundle: Bundle, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    parameters = {spec.name: spec for spec in bundle.manifest.parameters}
    known = {**parameters, **{spec.name: spec for spec in bundle.manifest.buffers}}
    if missing := parameters.keys() - weights.keys():
        raise ModelError(f"weights: expected a tensor {min(missing)!r}")
    for name, array in weights.items():
        if name not in known:
            raise ModelError(f"weights: the segment has no tensor {name!r}")
        if array.shape != known[name].shape:
            raise ModelError(
                f"weights: {name}: expected shape {known[name].shape}, received {array.shape}"
            )
    return {name: np.asarray(array, known[name].dtype) for name, array in weights.items()}
