"""The self-test itself: does this device compute what the bundle says?

Legend: B samples in the batch, X one sample's shape, A one activation's shape, P parameters.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.compute import ComputeBackend
from wire.bundle import GOLDEN, Bundle, GoldenValues
from wire.errors import ModelError
from wire.messages import SelfTestReport


def run_self_test(bundle: Bundle, backend: ComputeBackend) -> SelfTestReport:
    """Load the bundle and run it forward and, where it trains, backward.

    With golden values the results are compared with them; without, they must be of the right
    shape and finite. Raises ModelError naming what is off and by how much. The report's
    ``peak_bytes`` is left 0: the process that runs this knows.
    """
    began_s = time.perf_counter()
    golden = bundle.golden_values()
    backend.load(bundle)
    x_BX = golden.input_BX if golden else np.zeros((1, *bundle.manifest.input.shape), np.float32)
    activations_BA = backend.forward(x_BX)
    max_error = _check_forward(bundle, activations_BA, golden)
    gradient_error = None
    if backend.can_backward and not bundle.manifest.frozen:
        # The gradient at the cut is the golden output itself: it needs no bytes of its own.
        cut_BA = golden.activations_BA if golden else np.ones_like(activations_BA)
        gradients = backend.backward(x_BX, cut_BA)
        gradient_error = _check_backward(bundle, gradients, golden)
    return SelfTestReport(
        seconds=time.perf_counter() - began_s,
        peak_bytes=0,
        max_error=max_error,
        gradient_error=gradient_error,
    )


def _check_forward(
    bundle: Bundle, activations_BA: NDArray[Any], golden: GoldenValues | None
) -> float | None:
    expected = (len(activations_BA), *bundle.manifest.activation.shape)
    if activations_BA.shape != expected or not np.isfinite(activations_BA).all():
        raise ModelError(
            f"self-test: expected finite activations of shape {expected}, "
            f"computed {activations_BA.shape}"
        )
    if golden is None:
        return None
    error = float(np.abs(activations_BA - golden.activations_BA).max(initial=0.0))
    if error > golden.spec.tolerance:
        raise ModelError(
            f"self-test: activations differ from {GOLDEN} by {error:.3g}, expected at most "
            f"{golden.spec.tolerance:.3g}"
        )
    return error


def _check_backward(
    bundle: Bundle, gradients: dict[str, NDArray[Any]], golden: GoldenValues | None
) -> float | None:
    """Norms and not elements: a value near zero on the other side of a ReLU changes few of them."""
    names = [spec.name for spec in bundle.manifest.parameters]
    norms_P = np.array([np.linalg.norm(gradients[name].astype(np.float64)) for name in names])
    if not np.isfinite(norms_P).all():
        raise ModelError("self-test: expected finite gradients, computed infinite ones")
    if golden is None:
        return None
    # A gradient that is zero but for rounding has no relative error: hold it against the largest.
    scale_P = np.maximum(golden.gradient_norms_P, 1e-3 * golden.gradient_norms_P.max(initial=1e-6))
    errors_P = np.abs(norms_P - golden.gradient_norms_P) / scale_P
    worst = int(np.argmax(errors_P))
    if errors_P[worst] > golden.spec.gradient_tolerance:
        raise ModelError(
            f"self-test: the gradient of {names[worst]} differs from {GOLDEN} by "
            f"{errors_P[worst]:.3g} of its norm, expected at most "
            f"{golden.spec.gradient_tolerance:.3g}"
        )
    return float(errors_P[worst])
