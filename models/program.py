"""A client segment as a program: ``torch.export``'s graph, and the JSON that devices interpret.

The program is a pure function f(parameters..., buffers..., x) -> activations with a dynamic batch.
It is traced once; the ONNX graph, the JSON and the memory estimates all come from it.
"""

from __future__ import annotations

import io
import logging
import math
import operator
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from models.reorder import pool_before_relu
from models.split import SplitNetwork
from wire.codec import DTYPES
from wire.errors import ModelError
from wire.segment_graph import (
    GRAPH_SCHEMA,
    GraphInput,
    GraphNode,
    SegmentGraph,
    is_allowed,
)

TRACED_BATCH = 3
INPUT = "x"
OUTPUT = "activations"
GRAD_OUT = "grad_out"
GRADIENT_PREFIX = "grad."
KEPT_PREFIX = "kept."  # of what the forward pass leaves for the backward pass; a number follows
_KEPT = re.compile(re.escape(KEPT_PREFIX) + r"\d+")
_SCALARS = {
    getattr(operator, name): name
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
_CHATTY_LOGGERS = (
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",  # has a level of its own
    "onnxscript",
    "onnx_ir",
)
_BUFFER_DTYPES = {dtype.name for dtype in DTYPES.values()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentProgram:
    """The traced segment. ``parameters`` are those that train; all else that it reads is a buffer.

    Both map names to tensors, in the order in which the program takes them. ``constants`` are
    tensors that the forward pass makes from literals; the ONNX graph has them built in.
    """

    exported: ExportedProgram
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """All tensors that a device must hold."""
        return {**self.parameters, **self.buffers, **self.constants}

    @property
    def names(self) -> list[str]:
        return [*self.parameters, *self.buffers]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.parameters.values(), *self.buffers.values()]


class _Stateless(nn.Module):
    """The segment as a function of its weights. Its modules are registered for their names only."""

    def __init__(self, client: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.client = client
        self.names = names

    def forward(self, tensors: tuple[Tensor, ...], x: Tensor) -> object:
        weights = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self.client, weights, (x,))


def trace_program(split: SplitNetwork) -> SegmentProgram:
    """Trace the client segment with a dynamic batch; raise ModelError naming what forbids it."""
    parameters, buffers = _collect_weights(split)
    names = [*parameters, *buffers]
    tensors = (*parameters.values(), *buffers.values())
    x = torch.randn(TRACED_BATCH, *split.input_shape)
    shapes: tuple[object, ...] = (tuple({} for _ in tensors), {0: Dim.DYNAMIC})
    try:
        with quiet():
            program = torch.export.export(
                _Stateless(split.client, names), (tensors, x), dynamic_shapes=shapes
            )
            program = program.run_decompositions({})  # values instead of writes, layers stay whole
            pool_before_relu(program)
    except Exception as exc:  # torch.export raises many types, for the user's code and its own
        reason = " ".join(str(exc).split())[:400]
        raise ModelError(
            f"network {split.network}: cut layer {split.cut_layer}: the client segment cannot be "
            f"exported with a dynamic batch ({reason})"
        ) from exc
    return SegmentProgram(
        exported=program,
        parameters=parameters,
        buffers=buffers,
        constants=_collect_constants(program),
    )


def _collect_constants(program: ExportedProgram) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in program.graph_signature.inputs_to_lifted_tensor_constants.values():
        tensor = program.constants[path]
        assert isinstance(tensor, Tensor), "a lifted tensor constant is a tensor"
        found[path.removeprefix("client.")] = tensor.detach()
    return found


def _collect_weights(split: SplitNetwork) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for name, parameter in split.client.named_parameters():
        (parameters if parameter.requires_grad else buffers)[name] = parameter.detach()
    for name, buffer in split.client.named_buffers():
        if not name.endswith("num_batches_tracked"):  # counts train steps of BatchNorm only
            buffers[name] = buffer.detach()
    for name, tensor in {**parameters, **buffers}.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind != "float32" and (name in parameters or kind not in _BUFFER_DTYPES):
            raise ModelError(f"network {split.network}: {name}: expected float32, found {kind}")
        if name in (INPUT, OUTPUT, GRAD_OUT) or _KEPT.fullmatch(name):
            raise ModelError(f"network {split.network}: {name}: expected another name")
    return parameters, buffers


def program_to_graph(program: SegmentProgram) -> SegmentGraph:
    """The program as the JSON graph; raise ModelError naming the layer whose operator is not
    among those that a device may call."""
    graph = program.exported.graph_module.graph
    used = used_nodes(graph)
    signature = program.exported.graph_signature
    tensors = {
        str(n): name for n, name in zip(signature.user_inputs, [*program.names, INPUT], strict=True)
    }
    for placeholder, path in signature.inputs_to_lifted_tensor_constants.items():
        tensors[placeholder] = path.removeprefix("client.")
    inputs: list[GraphInput] = []
    nodes: list[GraphNode] = []
    for node in graph.nodes:
        if node not in used:
            continue
        if node.op == "placeholder" and node.name in tensors:
            inputs.append(GraphInput(name=node.name, tensor=tensors[node.name]))
        elif node.op == "call_function":
            nodes.append(_convert_node(node))
        else:
            raise ModelError(f"{node.name}: devices cannot take a value of kind {node.op}")
    return SegmentGraph(
        schema=GRAPH_SCHEMA, inputs=inputs, nodes=nodes, output=output_node(graph).name
    )


def output_node(graph: fx.Graph) -> fx.Node:
    """The node whose value the program gives back."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    value: fx.Node
    (value,) = output.all_input_nodes
    return value


def used_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the result depends on: neither checks nor weights that inputs stand for."""
    used: set[fx.Node] = set()
    waiting = [output_node(graph)]
    while waiting:
        node = waiting.pop()
        if node not in used:
            used.add(node)
            waiting.extend(node.all_input_nodes)
    return used


def _convert_node(node: fx.Node) -> GraphNode:
    layer = layer_name(node)
    op = _SCALARS.get(node.target) or str(node.target)
    if not is_allowed(op):
        raise ModelError(f"layer {layer or node.name}: devices cannot run its operator {op}")
    return GraphNode(
        name=node.name,
        op=op,
        args=[_convert_argument(argument, layer) for argument in node.args],
        kwargs={key: _convert_argument(argument, layer) for key, argument in node.kwargs.items()},
        layer=layer,
    )


def layer_name(node: fx.Node) -> str:
    """The innermost module that a node of the program came from, by its name in the network."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if isinstance(path, str)]
    return names[-1].removeprefix("client").removeprefix(".") if names else ""


def layer_kind(node: fx.Node) -> str:
    """The class of the module that ``layer_name`` names; empty where it names none."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = [kind for path, kind in stack.values() if isinstance(path, str)]
    if not (layer_name(node) and kinds):
        return ""
    kind = kinds[-1]
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _convert_argument(argument: Any, layer: str) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_convert_argument(item, layer) for item in argument]
    if isinstance(argument, fx.Node):
        return {"ref": argument.name}
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    for kind in ("dtype", "memory_format", "layout"):
        if isinstance(argument, getattr(torch, kind)):
            return {kind: str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": "cpu"}
    raise ModelError(f"layer {layer}: devices cannot take an argument {argument!r}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings off the console: every result is checked, and errors raise."""
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stderr(io.StringIO()):  # torch.export prints graphs that it gives up on
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
