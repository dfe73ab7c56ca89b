"""Where to cut a training step's graph in two: what one pass keeps for the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

_VIEWS = frozenset({"Identity", "Reshape"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The nodes of both halves, in order, and the values that go from the first to the second."""

    forward: tuple[onnx.NodeProto, ...]
    kept: tuple[str, ...]
    backward: tuple[onnx.NodeProto, ...]


def cut_in_two(
    forward: Sequence[onnx.NodeProto], whole: Sequence[onnx.NodeProto], samples: str
) -> Cut:
    """Cut ``whole``, which computes gradients, behind the nodes of the ``forward`` pass.

    What the second half needs is kept, but for views of what is kept and for what does not depend
    on the ``samples``: to make these again costs next to nothing.
    """
    made = {name for node in forward for name in node.output}
    backward = [node for node in whole if not made & set(node.output)]
    wanted = {name for node in backward for name in node.input}
    following = _following(forward, samples)
    kept: list[str] = []
    again: list[onnx.NodeProto] = []
    for node in reversed(forward):
        needed = wanted & set(node.output)
        if needed and (node.op_type in _VIEWS or not following & needed):
            again.append(node)
            wanted |= set(node.input)
        else:
            kept += sorted(needed)
    return Cut(forward=tuple(forward), kept=tuple(kept[::-1]), backward=(*again[::-1], *backward))


def _following(nodes: Iterable[onnx.NodeProto], samples: str) -> set[str]:
    """The values that depend on the samples."""
    following = {samples}
    for node in nodes:
        if following & set(node.input):
            following |= set(node.output)
    return following
