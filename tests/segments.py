"""Segments of any layers, cut off a network, and their backward graph against autograd."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.onnx_graph import program_to_onnx_backward
from models.program import SegmentProgram, trace_program
from models.split import SplitNetwork, reproducible, split_network
from tests.user_networks import TwoLayers
from wire.bundle import CLIENT_BACKWARD, CLIENT_BACKWARD_KEPT, CLIENT_FORWARD_KEPT

# Of the largest gradient. Both engines compute in float32 and add up in another order.
TOLERANCE = 1e-4
_DRAWS = 3

Gradients = dict[str, NDArray[np.float32]]


class Residual(nn.Module):
    """A block and a way round it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.body(x)
        return x + h


class Concatenation(nn.Module):
    """Blocks side by side, their channels joined."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


@dataclass(frozen=True, eq=False)
class Derived:
    """A segment, its trace and the session of its backward graph."""

    split: SplitNetwork
    program: SegmentProgram
    graph: bytes
    session: onnxruntime.InferenceSession
    halves: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]

    def gradients(self, x: Tensor, grad: Tensor) -> Gradients:
        """By parameter, from the graph."""
        return _run(self.session, self._feeds(x, grad))

    def gradients_in_halves(self, x: Tensor, grad: Tensor) -> Gradients:
        """The same, and ``activations``, from the two graphs that keep values between them."""
        forward, backward = self.halves
        feeds = self._feeds(x, grad)
        kept = _run(forward, feeds)
        return {"activations": kept.pop("activations"), **_run(backward, feeds | kept)}

    def _feeds(self, x: Tensor, grad: Tensor) -> Gradients:
        weights = zip(self.program.names, self.program.tensors, strict=True)
        feeds = {name: tensor.numpy() for name, tensor in weights}
        return {**feeds, "x": x.numpy(), "grad_out": grad.numpy()}

    def expected(self, x: Tensor, grad: Tensor) -> Gradients:
        """By parameter, from autograd."""
        names = list(self.program.parameters)
        parameters = [self.split.client.get_parameter(name) for name in names]
        gradients = torch.autograd.grad(
            self.split.client(x), parameters, grad, materialize_grads=True
        )
        return {f"grad.{n}": g.numpy() for n, g in zip(names, gradients, strict=True)}


def split_body(body: nn.Module, shape: tuple[int, ...]) -> SplitNetwork:
    """A network whose client segment is ``body``."""
    modes = {layer: layer.training for layer in body.modules()}
    with torch.no_grad():
        features = body.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    for layer, training in modes.items():
        layer.training = training
    return split_network(TwoLayers(body, features), "body", shape)


def derive(split: SplitNetwork) -> Derived:
    with reproducible():
        program = trace_program(split)
    graphs = program_to_onnx_backward(program, "segment")
    return Derived(
        split,
        program,
        graphs[CLIENT_BACKWARD],
        _open(graphs[CLIENT_BACKWARD]),
        (_open(graphs[CLIENT_FORWARD_KEPT]), _open(graphs[CLIENT_BACKWARD_KEPT])),
    )


def _open(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, feeds: Gradients) -> Gradients:
    inputs = {entry.name for entry in session.get_inputs()}
    results = session.run(None, {name: feeds[name] for name in inputs})
    return dict(zip((entry.name for entry in session.get_outputs()), results, strict=True))


def assert_same_gradients(split: SplitNetwork, batches: tuple[int, ...] = (1, 4)) -> Derived:
    """Compare at batch sizes other than the traced one (3), value by value.

    A value within rounding of a ReLU's edge can fall on either side of it, in torch too: other
    samples are then tried, on which a wrong formula would fail as well.
    """
    derived = derive(split)
    for batch in batches:
        for draw in range(_DRAWS):
            torch.manual_seed(_DRAWS * batch + draw)
            x = torch.randn(batch, *split.input_shape)
            grad = torch.randn(batch, *split.activation_shape)
            expected = derived.expected(x, grad)
            wrong = _differing(derived.gradients(x, grad), expected)
            in_halves = derived.gradients_in_halves(x, grad)
            with torch.no_grad():
                activations = split.client(x).numpy()
            assert np.allclose(in_halves.pop("activations"), activations, rtol=0, atol=TOLERANCE)
            wrong += [f"{name}, in halves" for name in _differing(in_halves, expected)]
            if not wrong:
                break
        assert not wrong, f"batch {batch}: {wrong}"
    return derived


def _differing(received: Gradients, expected: Gradients) -> list[str]:
    """Names of the gradients that differ by more than the tolerance, or in shape."""
    assert received.keys() == expected.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in expected.values())
    return [
        name
        for name, gradient in expected.items()
        if received[name].shape != gradient.shape
        or not np.allclose(received[name], gradient, rtol=0, atol=TOLERANCE * max(largest, 1e-2))
    ]
