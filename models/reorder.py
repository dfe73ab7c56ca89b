"""Order of a traced segment's calls: what gives the same values sooner comes first.

Max-pooling and ReLU commute, values and gradients alike and to the bit: ReLU never falls, so the
largest value of a window stays the largest, and where it makes different values equal they are 0
and have no gradient. Behind the pool ReLU has a quarter of the values to pass over, or less, and
none of those that the pool drops has to be kept.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

_RELU = torch.ops.aten.relu.default
_MAX_POOLS = (
    torch.ops.aten.max_pool1d.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.max_pool3d.default,
)


def pool_before_relu(program: ExportedProgram) -> None:
    """Put ReLUs whose value only a max-pool takes behind that pool, in place."""
    graph = program.graph_module.graph
    for pool in list(graph.nodes):
        if pool.target in _MAX_POOLS and _feeds_it_alone(pool.args[0], pool):
            behind = _exchange(graph, pool.args[0], pool)
            program.graph_signature.replace_all_uses(pool.name, behind.name)
    program.graph_module.recompile()


def _feeds_it_alone(node: object, pool: fx.Node) -> bool:
    return isinstance(node, fx.Node) and node.target is _RELU and list(node.users) == [pool]


def _exchange(graph: fx.Graph, relu: fx.Node, pool: fx.Node) -> fx.Node:
    """The ReLU that now stands behind the pool, with the values that the pool gives."""
    with graph.inserting_after(pool):
        behind = graph.call_function(_RELU, (pool,))
    behind.meta = {**relu.meta, "val": pool.meta["val"]}
    pool.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    (before,) = relu.all_input_nodes
    pool.replace_input_with(relu, before)
    graph.erase_node(relu)
    return behind
