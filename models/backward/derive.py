"""From a traced segment to the ONNX graph of its backward pass."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import fx

from models.backward import convolution, elementwise, normalisation, pooling, shaping
from models.backward.calls import Call, Pullback, Rule, Term, refusal
from models.backward.graph import ANY_SIZE, GraphBuilder, Shape
from models.backward.keeping import cut_in_two
from models.program import (
    GRAD_OUT,
    GRADIENT_PREFIX,
    INPUT,
    KEPT_PREFIX,
    OUTPUT,
    SegmentProgram,
    layer_kind,
    layer_name,
    output_node,
    used_nodes,
)
from models.value_infos import infer_values

_Output = tuple[str, Shape]  # a model's output: the value that it is, and its shape

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shaping.RULES,
    **convolution.RULES,
    **pooling.RULES,
    **normalisation.RULES,
}
_LAYERS = (
    "one of the layers that docs/networks.md lists (Linear, Conv1d, Conv2d, ConvTranspose2d, "
    "GroupNorm, LayerNorm, ReLU, GELU, pools, ...)"
)
_INSTEAD = {
    "prelu": "LeakyReLU",
    "rrelu": "LeakyReLU",
    "mish": "SiLU",
    "hardsigmoid": "Sigmoid",
    "elu": "LeakyReLU or GELU",
    "selu": "LeakyReLU or GELU",
    "celu": "LeakyReLU or GELU",
    "adaptive_max_pool1d": "MaxPool1d",
    "adaptive_max_pool2d": "MaxPool2d",
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "Conv1d"),
    "Bilinear": "Linear",
    "Embedding": "Linear",
    "conv3d": "Conv2d",
    "rms_norm": "LayerNorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardGraphs:
    """A segment's backward pass, with the names that the forward graph has for its inputs.

    ``whole``: (parameters..., buffers..., x, grad_out) -> ``grad.PARAMETER``...; it computes the
    forward pass again. The same in two halves, for devices that have memory in between:
    ``forward``: (parameters..., buffers..., x) -> activations, ``kept.0``, ``kept.1``, ...;
    ``backward``: (those of parameters..., buffers..., x, grad_out that it needs, ``kept.0``, ...)
    -> ``grad.PARAMETER``....
    """

    whole: onnx.ModelProto
    forward: onnx.ModelProto
    backward: onnx.ModelProto


def derive_backward(program: SegmentProgram, *, opset: int) -> BackwardGraphs:
    """The segment's gradients as graphs of plain ONNX operators.

    Raises ModelError naming the layer for which there is no rule.
    """
    return _Derivation(program, opset).run()


class _Derivation:
    """The forward pass written once, in order, then its rules' backward passes in reverse."""

    def __init__(self, program: SegmentProgram, opset: int) -> None:
        self._program = program
        self._graph = program.exported.graph_module.graph
        self._builder = GraphBuilder(reserved=[*program.names, INPUT, GRAD_OUT], opset=opset)
        self._terms: dict[fx.Node, Term] = {}
        self._tape: list[tuple[Term, Pullback]] = []
        self._gradients: dict[str, list[str]] = {}

    def run(self) -> BackwardGraphs:
        used = used_nodes(self._graph)
        self._bind_inputs(used)
        for node in self._graph.nodes:
            if node in used and node.op == "call_function":
                self._forward(node)
        result = self._terms[output_node(self._graph)]
        self._backward(result)
        gradients = self._collect_gradients()
        return BackwardGraphs(
            whole=self._build_whole(result, gradients),
            **self._build_halves(result, gradients),
        )

    def _bind_inputs(self, used: set[fx.Node]) -> None:
        """Placeholders as terms; literal tensors become constants of the graph."""
        program = self._program
        signature = program.exported.graph_signature
        names = dict(zip(signature.user_inputs, [*program.names, INPUT], strict=True))
        constants = signature.inputs_to_lifted_tensor_constants
        for node in self._graph.nodes:
            if node.op != "placeholder" or node not in used:
                continue
            if node.name in constants:
                tensor = program.exported.constants[constants[node.name]]
                assert isinstance(tensor, torch.Tensor), "a lifted tensor constant is a tensor"
                value = self._builder.array(tensor.detach().numpy())
            else:
                value = names[node.name]
            trains = node.name in names and value in program.parameters
            self._terms[node] = Term(key=node.name, value=value, shape=_shape(node), trains=trains)

    def _forward(self, node: fx.Node) -> None:
        source, index = node, 0
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source, index = node.args[0], int(str(node.args[1]))
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return  # sizes of the batch, or several results: each is taken by its own getitem
        layer, kind, op = layer_name(source), layer_kind(source), _operator(source)
        what = f"{kind} ({op})" if kind else op
        rule = RULES.get(op)
        if rule is None:
            instead = _INSTEAD.get(kind, _INSTEAD.get(op, _LAYERS))
            raise refusal(layer, what, "it is not among the layers that have", instead)
        arguments = self._arguments(source, layer, what)
        call = Call(what=what, layer=layer, arguments=arguments, shape=_shape(node), index=index)
        result, pullback = rule(self._builder, call)
        trains = any(term.trains for term in _terms_of(arguments.values()))
        term = Term(key=node.name, value=result, shape=call.shape, trains=trains)
        self._terms[node] = term
        if trains:
            self._tape.append((term, pullback))

    def _arguments(self, node: fx.Node, layer: str, what: str) -> dict[str, Any]:
        """All arguments by the operator's own names, defaults included."""
        assert isinstance(node.target, torch._ops.OpOverload), "operators of the program are ATen's"
        found: dict[str, Any] = {}
        for number, argument in enumerate(node.target._schema.arguments):
            if number < len(node.args):
                given: object = node.args[number]
            else:
                given = node.kwargs.get(argument.name, argument.default_value)
            found[argument.name] = self._convert(given, layer, what)
        return found

    def _convert(self, argument: object, layer: str, what: str) -> object:
        if isinstance(argument, (list, tuple)):
            return [self._convert(item, layer, what) for item in argument]
        if not isinstance(argument, fx.Node):
            return argument
        value = argument.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        if value.dtype != torch.float32:
            raise refusal(layer, what, f"it takes {value.dtype} values")
        return self._terms[argument]

    def _backward(self, result: Term) -> None:
        self._gradients[result.key] = [GRAD_OUT]
        for term, pullback in reversed(self._tape):
            grad = self._total(term)
            if grad is None:
                continue
            for source, part in pullback(grad):
                if source.trains:
                    self._gradients.setdefault(source.key, []).append(part)

    def _total(self, term: Term) -> str | None:
        parts = self._gradients.pop(term.key, [])
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self._builder.op("Add", total, part)
        return total

    def _collect_gradients(self) -> dict[str, _Output]:
        """The models' outputs for all parameters: zeros for one that the result does not need."""
        totals = {
            term.value: total
            for node, term in self._terms.items()
            if node.op == "placeholder" and (total := self._total(term)) is not None
        }
        shapes: dict[str, Shape] = {
            name: tuple(tensor.shape) for name, tensor in self._program.parameters.items()
        }
        return {
            f"{GRADIENT_PREFIX}{name}": (totals.get(name) or self._zeros(shape), shape)
            for name, shape in shapes.items()
        }

    def _inputs(self, result: Term) -> dict[str, Shape]:
        program = self._program
        (samples,) = (node for node in self._terms if self._terms[node].value == INPUT)
        weights = {**program.parameters, **program.buffers}
        shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return shapes | {INPUT: self._terms[samples].shape, GRAD_OUT: result.shape}

    def _build_whole(self, result: Term, gradients: dict[str, _Output]) -> onnx.ModelProto:
        nodes = self._builder.needed_for(*_values(gradients))
        inputs = self._inputs(result)
        return self._builder.model("client_backward", nodes, inputs, gradients)

    def _build_halves(
        self, result: Term, gradients: dict[str, _Output]
    ) -> dict[str, onnx.ModelProto]:
        g, inputs = self._builder, self._inputs(result)
        cut = cut_in_two(
            g.needed_for(result.value, *g.early_values),
            g.needed_for(*_values(gradients)),
            samples=INPUT,
        )
        first = {name: inputs[name] for name in inputs if name != GRAD_OUT}
        outputs: dict[str, _Output] = {OUTPUT: (result.value, result.shape)}
        name = "client_forward_kept"
        as_made = {value: (value, shape) for value, shape in outputs.values()}
        found = _infer_shapes(g.model(name, cut.forward, first, as_made))
        values = {f"{KEPT_PREFIX}{n}": value for n, value in enumerate(cut.kept)}
        kept = {name: (value, found[value][0]) for name, value in values.items()}
        kinds = {name: found[value][1] for name, value in values.items()}
        forward = g.model(name, cut.forward, first, outputs | kept, kinds)
        nodes = [*g.renamings({value: name for name, value in values.items()}), *cut.backward]
        used = {value for node in nodes for value in node.input}
        second = {name: inputs[name] for name in inputs if name in used}
        second |= {name: shape for name, (_, shape) in kept.items()}
        backward = g.model("client_backward_kept", nodes, second, gradients, kinds)
        return {"forward": forward, "backward": backward}

    def _zeros(self, shape: Shape) -> str:
        """The gradient of a parameter on which the result does not depend."""
        return self._builder.op(
            "Expand", self._builder.scalar(0.0), self._builder.ints([n or 0 for n in shape])
        )


def _shape(node: fx.Node) -> Shape:
    sizes = node.meta["val"].shape
    return tuple(size if isinstance(size, int) else None for size in sizes)


def _operator(node: fx.Node) -> str:
    """The operator's name without its overload."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" and len(parts) == 3 else str(node.target)


def _terms_of(arguments: Iterable[object]) -> Iterator[Term]:
    for argument in arguments:
        if isinstance(argument, Term):
            yield argument
        elif isinstance(argument, list):
            yield from _terms_of(argument)


def _infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[Shape, int]]:
    """Shape and type of all values that the model computes, from two batches."""
    at_one, at_two = (infer_values(model, batch) for batch in (1, 2))
    shapes = {
        name: tuple(_follow(*both) for both in zip(value.sizes, at_two[name].sizes, strict=True))
        for name, value in at_one.items()
    }
    return {name: (shapes[name], value.kind) for name, value in at_one.items()}


def _follow(at_one: int, at_two: int) -> int | None:
    if at_one == at_two:
        return at_one
    return None if (at_one, at_two) == (1, 2) else ANY_SIZE


def _values(outputs: dict[str, _Output]) -> list[str]:
    return [value for value, _ in outputs.values()]
