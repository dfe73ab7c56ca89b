"""Golden values: what a device's self-test must come to.

Legend: B samples in the batch, X one sample's shape, A one activation's shape, P parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from models.program import SegmentProgram
from models.split import SplitNetwork
from wire.bundle import Golden, encode_weights

GOLDEN_BATCH = 4
GOLDEN_MAX_BYTES = 256 * 1024  # of samples and activations together: a bundle must stay small
# Ten times what export allows between engines on one machine: another processor's kernels add up
# in another order.
TOLERANCE = 1e-3
# Of a gradient's norm: deep ReLU segments differ by mask flips near zero.
GRADIENT_TOLERANCE = 2e-2
_SEED = 7


def build_golden(split: SplitNetwork, program: SegmentProgram) -> tuple[Golden, bytes]:
    """Golden values of ``split``'s client segment, and the file that holds them.

    The same segment gives the same bytes. The gradients are those for a cut gradient that equals
    the activations. Call it within ``reproducible()``.
    """
    generator = torch.Generator().manual_seed(_SEED)
    x_BX = torch.randn(_batch(split), *split.input_shape, generator=generator)
    with torch.enable_grad():
        activations_BA = split.client(x_BX)
    norms_P = _gradient_norms(split, program, activations_BA)
    output_BA: NDArray[np.float32] = activations_BA.detach().contiguous().numpy()
    scale = max(1.0, float(np.abs(output_BA).max(initial=0.0)))
    parts = {"input": x_BX.numpy(), "activations": output_BA, "gradient_norms": norms_P}
    spec = Golden(
        batch=len(x_BX), tolerance=TOLERANCE * scale, gradient_tolerance=GRADIENT_TOLERANCE
    )
    return spec, encode_weights(parts)


def _batch(split: SplitNetwork) -> int:
    values = math.prod(split.input_shape) + math.prod(split.activation_shape)
    return max(1, min(GOLDEN_BATCH, GOLDEN_MAX_BYTES // (4 * values)))


def _gradient_norms(
    split: SplitNetwork, program: SegmentProgram, activations_BA: torch.Tensor
) -> NDArray[np.float32]:
    """Zeros where nothing can be trained: a frozen segment has no backward pass to test."""
    if not activations_BA.requires_grad:
        return np.zeros(len(program.parameters), np.float32)
    parameters = [split.client.get_parameter(name) for name in program.parameters]
    gradients = torch.autograd.grad(
        activations_BA,
        parameters,
        activations_BA.detach(),
        allow_unused=True,
        materialize_grads=True,
    )
    return np.array([float(gradient.double().norm()) for gradient in gradients], np.float32)
