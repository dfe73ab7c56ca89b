"""Proof that a bundle computes what the network does.

The bundle's bytes are read back and run by the agent's own engines, so what is checked is what
devices get: ONNX Runtime to a tolerance, the torch form to the bit.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_agent.compute.onnx_backend import OnnxForward, OnnxTrainer
from edge_agent.compute.torch_backend import TorchSegment
from models.program import TRACED_BATCH
from models.split import SplitNetwork
from wire.bundle import CLIENT_BACKWARD, Bundle, Check, Manifest
from wire.errors import ModelError

ONNX_TOLERANCE = 1e-4  # of the largest value
TORCH_TOLERANCE = 1e-5  # of the gradient's norm; kernels may sum in another order
# Where a value lies within rounding of a ReLU's or a pool's edge, two engines may take different
# sides; both gradients are right. A wrong formula is off by far more than this part of the norm.
EDGE_TOLERANCE = 1e-2
CHECK_BYTES = 64 * 1024 * 1024  # the start of a run must not wait for it

_BATCHES = (1, TRACED_BATCH, 5)
_ONNX_GRADIENTS = ("onnx-backward", "onnx-backward-kept")
_DRAWS = 3  # of random samples, until none lies near an edge
_EDGES = frozenset({"Cast", "MaxPool"})  # of masks and pools: what such layers are in the graph
_SMALLEST = 1e-2  # gradients below this are sums that cancel out: only noise is left of them

Float32 = NDArray[np.float32]
Gradients = Mapping[str, Float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """A batch, with what the network makes of it."""

    samples: torch.Tensor
    data: str
    activations: torch.Tensor
    gradient: torch.Tensor


class _Forms:
    """The segment in all forms that the bundle has."""

    def __init__(self, split: SplitNetwork, bundle: Bundle) -> None:
        self.split = split
        self.trains = not bundle.manifest.frozen
        self.names = [spec.name for spec in bundle.manifest.parameters]
        self.onnx = OnnxForward(bundle, threads=1)
        self.torch = TorchSegment(bundle, threads=1)
        graph = bundle.files.get(CLIENT_BACKWARD) if self.trains else None
        self.onnx_trainer = None if graph is None else OnnxTrainer(bundle, threads=1)
        self.has_edges = graph is not None and _has_edges(graph)
        weights = bundle.initial_weights()
        for form in (self.onnx, self.torch, self.onnx_trainer):
            if form is not None:
                form.set_weights(weights)

    def case(self, x_BX: torch.Tensor, data: str) -> _Case:
        with torch.enable_grad():  # some layers take another path, with other bits, without
            activations_BA = self.split.client(x_BX.clone())
        grad_BA = torch.randn_like(activations_BA)
        return _Case(samples=x_BX, data=data, activations=activations_BA, gradient=grad_BA)

    def expected_gradients(self, case: _Case) -> Gradients:
        parameters = [self.split.client.get_parameter(name) for name in self.names]
        gradients = torch.autograd.grad(
            case.activations, parameters, case.gradient, materialize_grads=True
        )
        return {n: gradient.numpy() for n, gradient in zip(self.names, gradients, strict=True)}


def verify_bundle(
    split: SplitNetwork,
    bundle: Bundle,
    *,
    global_batch: int | None = None,
    samples: Float32 | None = None,
    check_bytes: int = CHECK_BYTES,
) -> tuple[Check, ...]:
    """Compare all forms with the client segment: at several batch sizes, the last of them
    ``global_batch`` or as much of it as fits ``check_bytes``, on random and on real samples.

    Call it within ``reproducible()``. Raises ModelError naming the first comparison that fails.
    """
    forms = _Forms(split, bundle)
    checks: list[Check] = []
    for batch in _batches(bundle.manifest, global_batch, check_bytes):
        checks += _check_random(forms, batch)
        if samples is not None and len(samples):
            real = torch.from_numpy(np.resize(samples[:batch], (batch, *split.input_shape)))
            checks += _check_case(forms, forms.case(real, "real"))
    _require(split, checks)
    return tuple(checks)


def _batches(manifest: Manifest, global_batch: int | None, check_bytes: int) -> list[int]:
    largest = max(manifest.backward_bytes_per_sample, manifest.onnx_backward_bytes_per_sample, 1)
    fitting = min(global_batch or 1, check_bytes // largest)
    return sorted({*_BATCHES, max(1, fitting)})


def _check_random(forms: _Forms, batch: int) -> list[Check]:
    """The first draw whose gradients can be compared value by value, or the last one."""
    checks: list[Check] = []
    for _ in range(_DRAWS):
        x = torch.randn(batch, *forms.split.input_shape)
        checks = _check_case(forms, forms.case(x, "random"))
        if not any(check.what in _ONNX_GRADIENTS and check.measure == "norm" for check in checks):
            break
    return checks


def _check_case(forms: _Forms, case: _Case) -> list[Check]:
    x_BX, grad_BA = case.samples.numpy(), case.gradient.numpy()
    expected_BA = case.activations.detach().numpy()
    scale = max(1.0, _largest(expected_BA))
    from_onnx = forms.onnx.forward(x_BX)
    from_torch, kept = forms.torch.forward_kept(x_BX)
    checks = [
        _check(case, "onnx-forward", _off(from_onnx, expected_BA), ONNX_TOLERANCE * scale),
        _check(case, "torch-forward", _off(from_torch, expected_BA), 0.0),
    ]
    if forms.trains:
        expected = forms.expected_gradients(case)
        received = forms.torch.backward(x_BX, grad_BA, kept)
        checks.append(_check_torch_gradients(case, received, expected))
        if forms.onnx_trainer is not None:
            checks += _check_onnx_trainer(forms, forms.onnx_trainer, case, expected)
    return checks


def _check_onnx_trainer(
    forms: _Forms, trainer: OnnxTrainer, case: _Case, expected: Gradients
) -> Iterator[Check]:
    """The whole backward graph, and both halves."""
    x_BX, grad_BA = case.samples.numpy(), case.gradient.numpy()
    edges = forms.has_edges
    received = trainer.backward(x_BX, grad_BA)
    yield _check_onnx_gradients(case, "onnx-backward", received, expected, edges=edges)
    if trainer.can_keep:
        activations_BA, kept = trainer.forward_kept(x_BX)
        expected_BA = case.activations.detach().numpy()
        tolerance = ONNX_TOLERANCE * max(1.0, _largest(expected_BA))
        yield _check(case, "onnx-forward-kept", _off(activations_BA, expected_BA), tolerance)
        received = trainer.backward(x_BX, grad_BA, kept)
        yield _check_onnx_gradients(case, "onnx-backward-kept", received, expected, edges=edges)


def _check_torch_gradients(case: _Case, received: Gradients, expected: Gradients) -> Check:
    difference, norm = _distance(received, expected)
    tolerance = TORCH_TOLERANCE * max(norm, 1e-6)
    return _check(case, "torch-backward", difference, tolerance, measure="norm")


def _check_onnx_gradients(
    case: _Case, what: str, received: Gradients, expected: Gradients, *, edges: bool
) -> Check:
    """Value by value; by norm only if that fails and the segment has edges."""
    difference = max(_off(received[name], gradient) for name, gradient in expected.items())
    scale = max(_SMALLEST, *(_largest(gradient) for gradient in expected.values()))
    check = _check(case, what, difference, ONNX_TOLERANCE * scale)
    if _passes(check) or not edges:
        return check
    distance, norm = _distance(received, expected)
    tolerance = EDGE_TOLERANCE * max(norm, _SMALLEST)
    return _check(case, what, distance, tolerance, measure="norm")


def _check(
    case: _Case, what: str, difference: float, tolerance: float, measure: str = "largest"
) -> Check:
    return Check(
        what=what,
        batch=len(case.samples),
        difference=difference,
        tolerance=tolerance,
        measure=measure,
        data=case.data,
    )


def _has_edges(graph: bytes) -> bool:
    return any(node.op_type in _EDGES for node in onnx.load_from_string(graph).graph.node)


def _largest(array: Float32) -> float:
    return float(np.abs(array).max(initial=0.0))


def _off(received: Float32, expected: Float32) -> float:
    """The largest absolute difference of two values."""
    if received.shape != expected.shape:
        return float("inf")
    return _largest(received - expected)


def _distance(received: Gradients, expected: Gradients) -> tuple[float, float]:
    """The norm of all differences, and of all that was expected."""
    squares = [float(np.square(received[n] - e).sum()) for n, e in expected.items()]
    norms = [float(np.square(e).sum()) for e in expected.values()]
    return float(sum(squares) ** 0.5), float(sum(norms) ** 0.5)


def _passes(check: Check) -> bool:
    return check.difference <= check.tolerance  # a NaN does not


def _require(split: SplitNetwork, checks: list[Check]) -> None:
    for check in checks:
        if not _passes(check):
            raise ModelError(
                f"network {split.network}: cut layer {split.cut_layer}: {check.what} at batch "
                f"{check.batch} differs from the network by {check.difference:.3g}, expected at "
                f"most {check.tolerance:.3g}"
            )
