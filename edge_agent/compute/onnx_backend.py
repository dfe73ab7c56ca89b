"""Forward and backward pass on ONNX Runtime, with the weights as inputs of the graphs.

The backward graph holds the forward pass too: it takes samples, weights and the gradient at the cut
and gives the parameters' gradients, so nothing stands in memory between the two passes. The same in
two halves keeps what the forward pass has made, which spares the second one.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from edge_agent.compute.onnx_session import OnnxGraph
from wire.bundle import (
    CLIENT_BACKWARD,
    CLIENT_BACKWARD_KEPT,
    CLIENT_FORWARD,
    CLIENT_FORWARD_KEPT,
    Bundle,
)
from wire.errors import ModelError

SAMPLES: Final = "x"
ACTIVATIONS: Final = "activations"
CUT_GRADIENT: Final = "grad_out"
GRADIENT_PREFIX: Final = "grad."  # of an output of a backward graph; a parameter's name follows

Kept = dict[str, NDArray[Any]]
"""What a forward pass left for its backward pass, by name."""


class OnnxForward:
    """The bundle's forward graph."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._graph = OnnxGraph(bundle, CLIENT_FORWARD, threads)
        self.set_weights = self._graph.set_weights

    def forward(self, x_BX: NDArray[Any]) -> NDArray[Any]:
        """Activations of one micro-batch."""
        (activations_BA,) = self._graph.run([ACTIVATIONS], {SAMPLES: x_BX})
        return activations_BA


class OnnxTrainer:
    """The bundle's backward graph, and the same in two halves where the bundle has them.

    Raises ModelError for a bundle that has none or a wrong one.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        if CLIENT_BACKWARD not in bundle.files:
            raise ModelError(
                f"{CLIENT_BACKWARD}: expected this file in the bundle, for training on ONNX "
                "Runtime: export it again without 'backward: torch', or install 'agent-torch' here"
            )
        self._whole = _Gradients(OnnxGraph(bundle, CLIENT_BACKWARD, threads), bundle)
        in_halves = {CLIENT_FORWARD_KEPT, CLIENT_BACKWARD_KEPT} <= bundle.files.keys()
        self._halves = _Halves(bundle, threads) if in_halves else None

    @property
    def can_keep(self) -> bool:
        """Whether ``forward_kept`` can be called; bundles of earlier versions lack its graphs."""
        return self._halves is not None

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by name, in their own types; those absent keep their values."""
        self._whole.graph.set_weights(weights)
        if self._halves is not None:
            self._halves.forward.set_weights(weights)
            self._halves.backward.graph.set_weights(weights)

    def forward_kept(self, x_BX: NDArray[Any]) -> tuple[NDArray[Any], Kept]:
        """Activations of one micro-batch, and what ``backward`` can take in place of its own
        forward pass, once."""
        assert self._halves is not None, "forward_kept needs can_keep"
        graph = self._halves.forward
        arrays = graph.run(list(graph.outputs), {SAMPLES: x_BX})
        kept: Kept = dict(zip(graph.outputs, arrays, strict=True))
        return kept.pop(ACTIVATIONS), kept

    def backward(
        self, x_BX: NDArray[Any], grad_BA: NDArray[Any], kept: Kept | None = None
    ) -> dict[str, NDArray[Any]]:
        """Parameter gradients for one micro-batch, summed over its rows."""
        feeds = {SAMPLES: x_BX, CUT_GRADIENT: grad_BA}
        if kept is None or self._halves is None:
            return self._whole.run(feeds)
        return self._halves.backward.run(feeds | kept)


class _Halves:
    """A training step in two graphs: the second takes what the first has kept."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.forward = OnnxGraph(bundle, CLIENT_FORWARD_KEPT, threads)
        if ACTIVATIONS not in self.forward.outputs:
            raise ModelError(f"{CLIENT_FORWARD_KEPT}: expected an output {ACTIVATIONS!r}")
        _check_inputs(self.forward, bundle, {SAMPLES})
        backward = OnnxGraph(bundle, CLIENT_BACKWARD_KEPT, threads)
        self.backward = _Gradients(backward, bundle, kept=self.forward.outputs.keys())


class _Gradients:
    """A graph whose outputs are the gradients of all parameters; ModelError if it is not."""

    def __init__(self, graph: OnnxGraph, bundle: Bundle, kept: Collection[str] = ()) -> None:
        self.graph = graph
        self._names = {GRADIENT_PREFIX + p.name: p.name for p in bundle.manifest.parameters}
        _check_inputs(graph, bundle, {SAMPLES, CUT_GRADIENT, *kept})
        for spec in bundle.manifest.parameters:
            shape = graph.outputs.get(GRADIENT_PREFIX + spec.name)
            if shape is None or tuple(shape) != spec.shape:
                raise ModelError(
                    f"{graph.file}: expected an output {GRADIENT_PREFIX + spec.name!r} of "
                    f"shape {spec.shape}, found {'none' if shape is None else tuple(shape)}"
                )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Gradients by parameter."""
        gradients = self.graph.run(list(self._names), feeds)
        return dict(zip(self._names.values(), gradients, strict=True))


def _check_inputs(graph: OnnxGraph, bundle: Bundle, others: set[str]) -> None:
    known = {spec.name for spec in (*bundle.manifest.parameters, *bundle.manifest.buffers)}
    if foreign := graph.inputs - known - others:
        expected = ", ".join(sorted(others & {SAMPLES, CUT_GRADIENT}, reverse=True))
        raise ModelError(
            f"{graph.file}: input {min(foreign)!r}: expected {expected}, parameters and buffers"
        )
