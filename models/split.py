"""Cutting a network in two at a named layer, with proof that the halves make the whole.

Only the output of the cut layer may cross. Whatever would break that (a skip connection round the
cut, weights used on both sides, a cut layer used twice) is refused by name, and the two segments
are run against the whole network on the spot: they must agree to the bit.

Legend: B batch, A activation at the cut (any shape), K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.partition import CutError, partition
from models.tracing import Trace, trace_network
from wire.errors import ModelError

_BATCH = 3
_OTHER_BATCH = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitNetwork:
    """A network in two segments that share nothing; shapes are one sample's, without the batch.

    Both segments are in eval mode, with parameters and buffers under the network's own names.
    ``client`` has no dropout left (``removed_dropout`` names it): a device recomputes its forward
    pass, and must get the same activations. ``eval_layers`` names the modules that were in eval
    mode when the network was handed over, and are meant to stay there in training.
    """

    client: fx.GraphModule
    server: fx.GraphModule
    network: str
    cut_layer: str
    input_shape: tuple[int, ...]
    activation_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    removed_dropout: tuple[str, ...] = ()
    eval_layers: frozenset[str] = frozenset()


def split_network(
    module: nn.Module, cut_layer: str, input_shape: Sequence[int], *, network: str = ""
) -> SplitNetwork:
    """Split a copy of ``module`` behind ``cut_layer``.

    Raises ModelError naming the layer, the cause and the possible cut layers.
    """
    shape = tuple(input_shape)
    name = network or type(module).__name__
    trace = trace_network(module, cut_layer)
    with reproducible():
        shapes = _node_shapes(trace, shape, name)
        try:
            split = _build_split(trace, cut_layer, shape, shapes, name)
            split = replace(split, eval_layers=_eval_layers(module))
            _check_agreement(trace.module, split)
        except CutError as exc:
            raise ModelError(
                f"network {name}: cut layer {cut_layer}: {exc}; "
                f"possible cut layers: {_list_cuts(trace, shapes)}"
            ) from exc
    return split


def available_cuts(module: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Layers at which ``module`` can be cut, in the order of its forward pass, each with its
    activation's shape; raise ModelError if the network cannot be traced or run."""
    trace = trace_network(module)
    with reproducible():
        shapes = _node_shapes(trace, tuple(input_shape), type(module).__name__)
    return _find_cuts(trace, shapes)


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread, a fixed random state and no gradients: results then repeat to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


Shapes = dict[fx.Node, tuple[tuple[int, ...], ...]]


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes each tensor's shape; float32 tensors only."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            self.shapes[n] = tuple(value.shape)
        return value


def _node_shapes(trace: Trace, input_shape: tuple[int, ...], network: str) -> Shapes:
    """Each node's shape at two batch sizes."""
    recorders = [_ShapeRecorder(trace.module, trace.graph) for _ in range(2)]
    for recorder, batch in zip(recorders, (_OTHER_BATCH, _BATCH), strict=True):
        try:
            recorder.run(torch.randn(batch, *input_shape))
        except Exception as exc:  # the network's own code; torch raises many types for bad shapes
            raise ModelError(
                f"network {network}: its forward fails for {batch} float32 samples of shape "
                f"{input_shape} ({' '.join(str(exc).split())[:300]})"
            ) from exc
    small, large = (recorder.shapes for recorder in recorders)
    return {node: (small[node], large[node]) for node in large if node in small}


def _build_split(
    trace: Trace, cut_layer: str, input_shape: tuple[int, ...], shapes: Shapes, network: str
) -> SplitNetwork:
    cut = _find_cut_node(trace, cut_layer)
    activation_shape = _sample_shape(shapes, cut, "its output")
    parts = partition(trace, cut, _batch_carriers(shapes))
    client = fx.GraphModule(trace.module, parts.client, "ClientSegment")
    server = fx.GraphModule(trace.module, parts.server, "ServerSegment")
    _check_weights(client, server)
    (result,) = (node for node in trace.graph.nodes if node.op == "output")
    return SplitNetwork(
        client=client.eval(),
        server=server.eval(),
        network=network,
        cut_layer=cut_layer,
        input_shape=input_shape,
        activation_shape=activation_shape,
        output_shape=_sample_shape(shapes, result, "the network's output"),
        removed_dropout=parts.removed_dropout,
    )


def _eval_layers(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, layer in module.named_modules() if not layer.training)


def _find_cut_node(trace: Trace, cut_layer: str) -> fx.Node:
    """The node whose value crosses; raise CutError if there is not exactly one."""
    modules = {name for name, _ in trace.module.named_modules()} - {""}
    if cut_layer not in modules:
        raise CutError("the network has no such layer")
    calls = trace.calls.get(cut_layer, [])
    if not calls:
        raise CutError("the forward pass does not call it")
    if len(calls) > 1:
        raise CutError(f"the forward pass calls it {len(calls)} times")
    (node,) = calls
    if node is None:
        raise CutError("its output is not one tensor")
    if node not in set(trace.graph.nodes):
        raise CutError("its output is not used")
    return node


def _sample_shape(shapes: Shapes, node: fx.Node, what: str) -> tuple[int, ...]:
    """One sample's shape at ``node``; raise CutError unless dimension 0 is the batch."""
    if node not in shapes:
        raise CutError(f"{what} is not one float32 tensor")
    small, large = shapes[node]
    fits = len(large) > 1 and (small[0], large[0]) == (_OTHER_BATCH, _BATCH)
    if not fits or small[1:] != large[1:]:
        raise CutError(
            f"{what} has shapes {small} and {large} for batches of {_OTHER_BATCH} and {_BATCH}: "
            "expected the batch as dimension 0 and nothing else that depends on it"
        )
    return large[1:]


def _batch_carriers(shapes: Shapes) -> set[fx.Node]:
    """Nodes whose dimension 0 is the batch."""
    batches = ((_OTHER_BATCH,), (_BATCH,))
    return {node for node, (small, large) in shapes.items() if (small[:1], large[:1]) == batches}


def _check_weights(client: nn.Module, server: nn.Module) -> None:
    """Raise CutError unless each segment has parameters and they share no memory."""
    if not any(True for _ in client.parameters()):
        raise CutError("no parameters before it: the samples would be sent almost as they are")
    if not any(True for _ in server.parameters()):
        raise CutError("no parameters are left for the server segment")
    owners = {_memory(tensor): name for name, tensor in _tensors(client)}
    for name, tensor in _tensors(server):
        if tensor.numel() and (owner := owners.get(_memory(tensor))) is not None:
            both = owner if owner == name else f"{owner} and {name}"
            raise CutError(f"{both} shared by both sides of the cut: segments train apart")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_agreement(whole: nn.Module, split: SplitNetwork) -> None:
    """Raise CutError unless the segments compute what the whole network does, to the bit."""
    x = torch.randn(_BATCH, *split.input_shape)
    state = torch.random.get_rng_state()
    expected = whole.eval()(x.clone())
    torch.random.set_rng_state(state)
    activations_BA = split.client(x.clone())
    one_sample_BA = split.client(x[1:2].clone())
    torch.random.set_rng_state(state)
    logits_BK = split.server(activations_BA)
    if not torch.equal(torch.nan_to_num(logits_BK), torch.nan_to_num(expected)):
        difference = float((logits_BK - expected).abs().max())
        raise CutError(
            f"client and server segment differ from the whole network by up to {difference:.3g}: "
            "its forward depends on more than its input"
        )
    scale = max(1.0, float(activations_BA.abs().max()))
    if not torch.allclose(one_sample_BA, activations_BA[1:2], rtol=1e-4, atol=1e-5 * scale):
        raise CutError("the client segment mixes the samples of a batch")
    _check_gradient(split.server, activations_BA)


def _check_gradient(server: nn.Module, activations_BA: Tensor) -> None:
    """Raise CutError unless the server segment passes a gradient back to the cut."""
    leaf_BA = activations_BA.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            loss = server(leaf_BA).sum()
        torch.autograd.grad(loss, leaf_BA)
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:200]
        raise CutError(f"the server segment gives no gradient at the cut ({reason})") from exc


def _find_cuts(trace: Trace, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    order = {node: number for number, node in enumerate(trace.graph.nodes)}
    found: list[tuple[int, str, tuple[int, ...]]] = []
    for name in trace.calls:
        try:
            cut = _find_cut_node(trace, name)
            shape = _sample_shape(shapes, cut, "its output")
            parts = partition(trace, cut, _batch_carriers(shapes))
            _check_weights(
                fx.GraphModule(trace.module, parts.client),
                fx.GraphModule(trace.module, parts.server),
            )
        except CutError:
            continue
        found.append((order[cut], name, shape))
    return {name: shape for _, name, shape in sorted(found)}


def _list_cuts(trace: Trace, shapes: Shapes) -> str:
    return ", ".join(_find_cuts(trace, shapes)) or "none"
