"""How much memory one sample's intermediate values take, from the shapes in a traced segment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx

from models.program import KEPT_PREFIX, SegmentProgram, output_node, used_nodes
from models.value_infos import infer_values

_VIEWS = frozenset({"Reshape", "Identity"})


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per sample, weights not counted."""

    forward_bytes: int
    backward_bytes: int


@dataclass(slots=True)
class _Block:
    """One piece of memory, shared by the values that are views of each other."""

    size_bytes: int
    first: int
    last: int


class _Recorder(fx.Interpreter):
    """Runs a program and notes which memory each value lies in, and how long it is needed."""

    def __init__(self, program: SegmentProgram) -> None:
        # Values are kept, so that no address is used twice.
        super().__init__(program.exported.graph_module, garbage_collect_values=False)
        graph = program.exported.graph_module.graph
        self.used = used_nodes(graph)
        self.result = output_node(graph)
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.blocks: dict[int, _Block] = {}

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n in self.used and n.op == "call_function":
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, Tensor):
                    self._note(n, tensor)
        return value

    def _note(self, node: fx.Node, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number = self.order[node]
        block = self.blocks.setdefault(
            storage.data_ptr(), _Block(storage.nbytes(), first=number, last=number)
        )
        users = [self.order[user] for user in node.users if user in self.used]
        ends = len(self.order) if node is self.result else max(users, default=number)
        block.last = max(block.last, ends)


def estimate_memory(program: SegmentProgram, input_shape: tuple[int, ...]) -> MemoryEstimate:
    """Estimate from one run with two samples.

    Forward: the most that is alive at once, and the largest value twice as room to work in: ONNX
    Runtime splits norms into several steps (measured at batch 128: 199 MB estimated at 168 MB for
    a ResNet stage, 26 MB at 26 MB for the small CNN).
    Backward: everything that the forward pass makes, and the largest value twice for the gradient
    that goes in and the one that comes out. torch frees some of it earlier: the estimate is an
    upper one.
    """
    batch = 2
    recorder = _Recorder(program)
    inputs = _flat_inputs(program, torch.zeros(batch, *input_shape))
    with torch.no_grad():
        recorder.run(*inputs)
    blocks = list(recorder.blocks.values())
    largest = max((block.size_bytes for block in blocks), default=0)
    alive = [
        sum(block.size_bytes for block in blocks if block.first <= number <= block.last)
        for number in range(len(recorder.order))
    ]
    return MemoryEstimate(
        forward_bytes=math.ceil((max(alive) + 2 * largest) / batch),
        backward_bytes=math.ceil((sum(b.size_bytes for b in blocks) + 2 * largest) / batch),
    )


def _flat_inputs(program: SegmentProgram, x: Tensor) -> list[object]:
    """Arguments in the order of the graph's placeholders; weights that inputs stand for are not
    read."""
    signature = program.exported.graph_signature
    user_inputs = dict(zip(signature.user_inputs, [*program.tensors, x], strict=True))
    constants = signature.inputs_to_lifted_tensor_constants
    placeholders = [n for n in program.exported.graph_module.graph.nodes if n.op == "placeholder"]
    return [
        program.exported.constants[constants[node.name]]
        if node.name in constants
        else user_inputs.get(node.name)
        for node in placeholders
    ]


def estimate_graph_bytes(model: bytes) -> int:
    """Bytes per sample of an ONNX graph's intermediate values: the most that is alive at once, if
    its nodes run in their order. Weights and what does not follow the batch cancel out.

    ONNX Runtime writes some results over their inputs: the estimate is an upper one.
    """
    parsed = onnx.load_from_string(model)
    small, large = (_most_alive(parsed, batch) for batch in (1, 2))
    return max(1, large - small)


def _most_alive(parsed: onnx.ModelProto, batch: int) -> int:
    sizes = {name: value.size_bytes for name, value in infer_values(parsed, batch).items()}
    nodes = parsed.graph.node
    shown: dict[str, str] = {}  # what a view is a view of
    for node in nodes:
        if node.op_type in _VIEWS:
            shown[node.output[0]] = shown.get(node.input[0], node.input[0])
    last_use = {shown.get(name, name): n for n, node in enumerate(nodes) for name in node.input}
    kept = {shown.get(value.name, value.name) for value in parsed.graph.output}
    held = most = 0
    for number, node in enumerate(nodes):
        held += sum(sizes.get(name, 0) for name in node.output if name not in shown)
        most = max(most, held)
        touched = {shown.get(name, name) for name in (*node.input, *node.output)} - kept
        held -= sum(sizes.get(name, 0) for name in touched if last_use.get(name, 0) <= number)
    return most


def measure_kept_bytes(model: bytes) -> int:
    """Bytes per sample of what a forward graph keeps for the backward pass."""
    parsed = onnx.load_from_string(model)
    kept = [value.name for value in parsed.graph.output if value.name.startswith(KEPT_PREFIX)]
    small, large = (infer_values(parsed, batch) for batch in (1, 2))
    return sum(large[name].size_bytes - small[name].size_bytes for name in kept)
