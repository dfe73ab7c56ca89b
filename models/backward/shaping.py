"""Linear layers, and what moves values without changing them."""

from __future__ import annotations

from collections.abc import Iterator

from models.backward.calls import Call, Pullback, Rule, Term
from models.backward.graph import GraphBuilder, Shape

_NO_END = 2**63 - 1  # what x[a:] becomes


def _linear(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x, weight, bias = call.term("input"), call.term("weight"), call.optional("bias")
    outputs, inputs = weight.shape
    flat: Shape = (None, inputs)
    flat_x = x.value if len(x.shape) == 2 else g.reshape(x.value, flat)
    y = g.op("Gemm", flat_x, weight.value, *([bias.value] if bias else []), transB=1)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        flat_grad = grad if len(x.shape) == 2 else g.reshape(grad, (None, outputs))
        if x.trains:
            dx = g.op("Gemm", flat_grad, weight.value)
            yield x, dx if len(x.shape) == 2 else g.reshape(dx, x.shape)
        if weight.trains:
            yield weight, g.op("Gemm", flat_grad, flat_x, transA=1)
        if bias is not None and bias.trains:
            yield bias, g.sum(flat_grad, [0])

    return y if len(x.shape) == 2 else g.reshape(y, call.shape), pull


def _reshape(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    if [*x.shape, *call.shape].count(None) != 2:
        call.refuse("more than one of its sizes follows the batch")
    return g.reshape(x.value, call.shape), lambda grad: [(x, g.reshape(grad, x.shape))]


def _permute(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    return _reorder(g, x, [n % len(x.shape) for n in call.arguments["dims"]])


def _transpose(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    order = list(range(len(x.shape)))
    one, two = (call.arguments[name] % len(order) for name in ("dim0", "dim1"))
    order[one], order[two] = two, one
    return _reorder(g, x, order)


def _reorder(g: GraphBuilder, x: Term, order: list[int]) -> tuple[str, Pullback]:
    back = [order.index(n) for n in range(len(order))]
    return g.transpose(x.value, order), lambda grad: [(x, g.transpose(grad, back))]


def _cat(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    terms: list[Term] = list(call.arguments["tensors"])
    axis = call.arguments["dim"] % len(call.shape)
    sizes = [term.shape[axis] for term in terms]

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        start = 0
        for term, size in zip(terms, sizes, strict=True):
            if size is None:
                call.refuse("it joins values along the batch")
            if term.trains:
                yield term, g.slice(grad, [axis], [start], [start + size])
            start += size

    return g.op("Concat", *(term.value for term in terms), axis=axis), pull


def _cut(g: GraphBuilder, call: Call, axis: int, start: int, size: int) -> tuple[str, Pullback]:
    """``size`` entries of an axis from ``start`` on."""
    x = call.term("self")
    whole = x.shape[axis]
    if whole is None:
        call.refuse("it takes the batch apart")
    end = whole - start - size

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        yield x, g.fit(grad, [axis], [(-start, -end)])

    return g.fit(x.value, [axis], [(start, end)]), pull


def _chunk(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    axis = call.arguments["dim"] % len(x.shape)
    whole = x.shape[axis]
    if whole is None:
        call.refuse("it takes the batch apart")
    parts = call.arguments["chunks"]
    return _cut(g, call, axis, call.index * -(-whole // parts), call.shape[axis] or 0)


def _split(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    axis = call.arguments["dim"] % len(call.shape)
    each = call.arguments.get("split_size", call.arguments.get("split_sizes"))
    start = each * call.index if isinstance(each, int) else sum(each[: call.index])
    return _cut(g, call, axis, start, call.shape[axis] or 0)


def _slice(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    axis = call.arguments["dim"] % len(x.shape)
    whole = x.shape[axis]
    start, end = call.arguments["start"] or 0, call.arguments["end"]
    if start == 0 and call.arguments["step"] == 1 and end in (None, _NO_END):
        return x.value, lambda grad: [(x, grad)]
    if call.arguments["step"] != 1 or whole is None or not isinstance(start, int):
        call.refuse("only a range of features, without steps, can be taken")
    start = min(max(0, start + whole if start < 0 else start), whole)
    return _cut(g, call, axis, start, call.shape[axis] or 0)


def _pad(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    if call.arguments.get("mode", "constant") != "constant":
        call.refuse("values are repeated at the border", "padding with zeros")
    numbers = call.sizes("pad", 1)
    amounts = list(zip(numbers[::2], numbers[1::2], strict=True))[::-1]
    axes = list(range(len(x.shape) - len(amounts), len(x.shape)))
    fill = call.arguments["value"] or 0.0
    if min(numbers) < 0:
        call.refuse("it cuts values off")

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        yield x, g.fit(grad, axes, amounts)

    return g.pad(x.value, axes, amounts, fill), pull


def _mean(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    rank = len(x.shape)
    axes = sorted({n % rank for n in call.arguments["dim"] or range(rank)})
    return mean_over(g, call, x, axes)


def mean_over(g: GraphBuilder, call: Call, x: Term, axes: list[int]) -> tuple[str, Pullback]:
    """The mean over some axes, in the shape of the call's result."""
    count = 1
    for axis in axes:
        count *= x.shape[axis] or call.refuse("it takes a mean over the batch")
    kept: Shape = tuple(1 if n in axes else size for n, size in enumerate(x.shape))
    y = g.op("ReduceMean", x.value, g.ints(axes), keepdims=1)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        shape = [size if n in axes else 1 for n, size in enumerate(x.shape)]
        shares = g.op("Expand", g.scalar(1 / count), g.ints([size or 1 for size in shape]))
        yield x, g.op("Mul", g.reshape(grad, kept), shares)

    return g.reshape(y, call.shape), pull


RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        _reshape,
    ),
    "permute": _permute,
    "transpose": _transpose,
    "cat": _cat,
    "chunk": _chunk,
    "split": _split,
    "split_with_sizes": _split,
    "slice": _slice,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "mean": _mean,
}
