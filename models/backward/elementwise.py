"""Activation functions and arithmetic, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from models.backward.calls import Call, Pullback, Rule, Term
from models.backward.graph import GraphBuilder, Shape

_GELU_CUBE = 0.044715  # Source: Hendrycks and Gimpel, arXiv:1606.08415


def _relu(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    y = g.op("Relu", x.value)
    return y, lambda grad: [(x, g.op("Mul", grad, g.mask("Greater", y, g.scalar(0.0))))]


def _leaky_relu(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x, slope = call.term("self"), float(call.arguments["negative_slope"])

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        positive = g.mask("Greater", x.value, g.scalar(0.0))
        steep = g.op("Add", g.op("Mul", positive, g.scalar(1 - slope)), g.scalar(slope))
        yield x, g.op("Mul", grad, steep)

    return g.op("LeakyRelu", x.value, alpha=slope), pull


def _sigmoid(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    y = g.op("Sigmoid", x.value)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        slope = g.op("Mul", y, g.op("Sub", g.scalar(1.0), y))
        yield x, g.op("Mul", grad, slope)

    return y, pull


def _tanh(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    y = g.op("Tanh", x.value)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        yield x, g.op("Mul", grad, g.op("Sub", g.scalar(1.0), g.op("Mul", y, y)))

    return y, pull


def _silu(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    s = g.op("Sigmoid", x.value)
    y = g.op("Mul", x.value, s)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        rest = g.op("Mul", y, g.op("Sub", g.scalar(1.0), s))
        yield x, g.op("Mul", grad, g.op("Add", s, rest))

    return y, pull


def _hardswish(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        # x / 3 + 1/2 between -3 and 3, but 0 at and below the one and 1 at and above the other.
        inside = g.op("Clip", x.value, g.scalar(-3.0), g.scalar(3.0))
        line = g.op("Add", g.op("Mul", inside, g.scalar(1 / 3)), g.scalar(0.5))
        above = g.mask("GreaterOrEqual", x.value, g.scalar(3.0))
        line = g.op("Sub", line, g.op("Mul", above, g.scalar(0.5)))
        slope = g.op("Mul", line, g.mask("Greater", x.value, g.scalar(-3.0)))
        yield x, g.op("Mul", grad, slope)

    return g.op("HardSwish", x.value), pull


def _gelu(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    if call.arguments["approximate"] == "tanh":
        return _gelu_tanh(g, call.term("self"))
    x = call.term("self")
    error = g.op("Erf", g.op("Mul", x.value, g.scalar(math.sqrt(0.5))))
    share = g.op("Mul", g.op("Add", error, g.scalar(1.0)), g.scalar(0.5))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        square = g.op("Mul", x.value, x.value)
        bell = g.op("Exp", g.op("Mul", square, g.scalar(-0.5)))
        density = g.op("Mul", bell, g.scalar(1 / math.sqrt(2 * math.pi)))
        slope = g.op("Add", share, g.op("Mul", x.value, density))
        yield x, g.op("Mul", grad, slope)

    return g.op("Mul", x.value, share), pull


def _gelu_tanh(g: GraphBuilder, x: Term) -> tuple[str, Pullback]:
    root = math.sqrt(2 / math.pi)
    square = g.op("Mul", x.value, x.value)
    cubic = g.op("Add", g.op("Mul", square, g.scalar(root * _GELU_CUBE)), g.scalar(root))
    t = g.op("Tanh", g.op("Mul", x.value, cubic))
    share = g.op("Mul", g.op("Add", t, g.scalar(1.0)), g.scalar(0.5))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        steep = g.op("Sub", g.scalar(0.5), g.op("Mul", g.scalar(0.5), g.op("Mul", t, t)))
        inner = g.op("Mul", square, g.scalar(3 * root * _GELU_CUBE))
        inner = g.op("Mul", x.value, g.op("Add", inner, g.scalar(root)))
        slope = g.op("Add", share, g.op("Mul", steep, inner))
        yield x, g.op("Mul", grad, slope)

    return g.op("Mul", x.value, share), pull


def _hardtanh(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    low, high = (call.arguments.get(name) for name in ("min_val", "max_val"))
    bounds = [g.scalar(0.0 if low is None else low), g.scalar(6.0 if high is None else high)]

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        above, below = (
            g.mask(k, x.value, b) for k, b in zip(("Greater", "Less"), bounds, strict=True)
        )
        yield x, g.op("Mul", grad, g.op("Mul", above, below))

    return g.op("Clip", x.value, *bounds), pull


def _same(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    del g
    x = call.term("self")
    return x.value, lambda grad: [(x, grad)]


def _detach(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    del g
    return call.term("self").value, lambda _: []


def _operand(g: GraphBuilder, call: Call, name: str) -> Term:
    """A tensor, or a number as a constant."""
    value = call.arguments[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Term(key="", value=g.scalar(value), shape=(), trains=False)
    return call.term(name)


def _unbroadcast(g: GraphBuilder, grad: str, result: Shape, shape: Shape) -> str:
    """Sum a gradient over the axes along which an operand was repeated."""
    missing = len(result) - len(shape)
    axes = [n for n in range(len(result)) if n < missing or shape[n - missing] != result[n]]
    return g.reshape(g.sum(grad, axes, keep=True), shape) if axes else grad


def _binary(kind: str, slopes: Callable[[GraphBuilder, str, Term, Term], tuple[str, str]]) -> Rule:
    """A rule for an operator of two operands; ``slopes`` gives both gradients, not yet summed."""

    def rule(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
        a, b = _operand(g, call, "self"), _operand(g, call, "other")
        if call.arguments.get("alpha", 1) != 1 or call.arguments.get("rounding_mode"):
            call.refuse("only plain arithmetic has one")

        def pull(grad: str) -> Iterator[tuple[Term, str]]:
            for term, part in zip((a, b), slopes(g, grad, a, b), strict=True):
                if term.trains:
                    yield term, _unbroadcast(g, part, call.shape, term.shape)

        return g.op(kind, a.value, b.value), pull

    return rule


def _div_slopes(g: GraphBuilder, grad: str, a: Term, b: Term) -> tuple[str, str]:
    first = g.op("Div", grad, b.value)
    return first, g.op("Neg", g.op("Mul", first, g.op("Div", a.value, b.value)))


_add = _binary("Add", lambda _g, grad, _a, _b: (grad, grad))
_sub = _binary("Sub", lambda g, grad, _a, _b: (grad, g.op("Neg", grad)))
_mul = _binary(
    "Mul", lambda g, grad, a, b: (g.op("Mul", grad, b.value), g.op("Mul", grad, a.value))
)
_div = _binary("Div", _div_slopes)

RULES: dict[str, Rule] = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "silu": _silu,
    "hardswish": _hardswish,
    "gelu": _gelu,
    "hardtanh": _hardtanh,
    "relu6": _hardtanh,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "clone": _same,
    "alias": _same,
    "contiguous": _same,
    "detach": _detach,
}
