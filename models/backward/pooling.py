"""Max and average pools.

Legend: B batch, C channels, L the axes behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.backward.calls import Call, Pullback, Rule, Term
from models.backward.graph import GraphBuilder
from models.backward.shaping import mean_over
from models.backward.windows import Windows, pool_windows, spatial


def _max_pool(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    """Of equal values in a window the first gets the gradient, as in torch."""
    x = call.term("self")
    windows = pool_windows(call, x.shape, dilated=True)
    padded = windows.padded(g, x.value, fill=float(np.finfo(np.float32).min))
    if windows.tiles:
        pool = _max_pool_of_stretches if len(windows.kernel) == 1 else _max_pool_of_tiles
        return pool(g, x, windows, padded)
    y, positions = g.ops("MaxPool", 2, padded, **windows.attributes())

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        yield x, windows.unpadded(g, _spread_maxima(g, windows, padded, positions, grad))

    return y, pull


def _max_pool_of_stretches(
    g: GraphBuilder, x: Term, windows: Windows, padded: str
) -> tuple[str, Pullback]:
    """Windows side by side on one axis, turned so that each of their cells is one long row."""
    cells, channels = windows.cells, x.shape[1]
    turned = g.transpose(g.reshape(padded, (None, cells)), [1, 0])
    rows = g.ops("Split", cells, turned, axis=0, num_outputs=cells) if cells > 1 else (turned,)
    y = g.reshape(g.op("Max", *rows), (None, channels, *windows.outputs))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        left = g.reshape(grad, (1, None))
        parts = []
        for number, row in enumerate(rows[:-1], start=1):
            first = g.mask("GreaterOrEqual", row, g.op("Max", *rows[number:]))
            parts.append(g.op("Mul", left, first))
            left = g.op("Sub", left, parts[-1])  # what later cells may get
        spread = g.transpose(g.concat([*parts, left], axis=0), [1, 0])
        sizes = [outputs * cells for outputs in windows.outputs]
        yield x, windows.unpadded(g, g.reshape(spread, (None, channels, *sizes)))

    return y, pull


def _max_pool_of_tiles(
    g: GraphBuilder, x: Term, windows: Windows, padded: str
) -> tuple[str, Pullback]:
    """ONNX Runtime takes 25 times as long to pool if it has to tell the positions: compare with the
    maximum instead, and again with the cells numbered backwards, for the first of equal values."""
    attributes = windows.attributes()
    y = g.op("MaxPool", padded, **attributes)
    numbers = np.arange(windows.cells, 0, -1, dtype=np.float32).reshape(windows.kernel)
    ranks = g.array(np.tile(numbers, windows.outputs)[None, None])

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        largest = g.mask("Equal", padded, g.repeat(y, windows.kernel))
        ranked = g.op("Mul", largest, ranks)
        highest = g.op("MaxPool", ranked, **attributes)
        first = g.mask("Equal", ranked, g.repeat(highest, windows.kernel))
        spread = g.op("Mul", first, g.repeat(grad, windows.kernel))
        yield x, windows.unpadded(g, spread)

    return y, pull


def _spread_maxima(
    g: GraphBuilder, windows: Windows, padded: str, positions: str, grad: str
) -> str:
    """The gradient at the place of each window's largest value; ``positions`` count all values."""
    shape = g.op("Shape", padded)
    if windows.disjoint:
        attributes = {"kernel_shape": list(windows.kernel), "strides": list(windows.stride)}
        return g.op("MaxUnpool", grad, positions, shape, **attributes)
    count = g.reshape(g.op("Size", padded), (1,))
    zeros = g.op("Expand", g.scalar(0.0), count)
    flat = (g.reshape(value, (None,)) for value in (positions, grad))
    added = g.op("ScatterElements", zeros, *flat, axis=0, reduction="add")
    return g.op("Reshape", added, shape)


def _avg_pool(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    """Mean over each window of the padded input, then corrected where torch divides otherwise."""
    x = call.term("self")
    windows = pool_windows(call, x.shape, dilated=False)
    correction = _correction(call, windows)
    attributes = {"kernel_shape": list(windows.kernel), "strides": list(windows.stride)}
    y = g.op("AveragePool", windows.padded(g, x.value), **attributes)

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        share = g.op("Mul", grad, g.array((correction / windows.cells).astype(np.float32)))
        yield x, _spread_evenly(g, windows, share, x)

    if (correction != 1).any():
        y = g.op("Mul", y, g.array(correction.astype(np.float32)))
    return y, pull


def _correction(call: Call, windows: Windows) -> NDArray[np.float64]:
    """Cells of a window over what torch divides by; one number, or one for each window."""
    sizes = np.ones(())
    padded = call.arguments["count_include_pad"]
    rows = (windows.outputs, windows.stride, windows.kernel, windows.begin, windows.inputs)
    for outputs, stride, kernel, begin, inputs in zip(*rows, strict=True):
        start = np.arange(outputs) * stride - begin
        end = np.minimum(start + kernel, inputs + begin)
        if not padded:
            start, end = np.maximum(start, 0), np.minimum(end, inputs)
        sizes = sizes[..., None] * (end - start)
    divisor = call.arguments.get("divisor_override")
    correction = np.asarray(windows.cells / (np.full_like(sizes, divisor) if divisor else sizes))
    same = bool((correction == correction.flat[0]).all())
    return correction.flat[:1].reshape(()) if same else correction


def _spread_evenly(g: GraphBuilder, windows: Windows, share: str, x: Term) -> str:
    """Each window's value at all its cells, added up where windows overlap."""
    if windows.tiles:
        return windows.unpadded(g, g.repeat(share, windows.kernel))
    alone = g.reshape(share, (None, 1, *windows.outputs))
    ones = g.array(np.ones((1, 1, *windows.kernel), np.float32))
    return g.reshape(windows.scatter(g, alone, ones), x.shape)


def _adaptive_avg_pool(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x = call.term("self")
    if math.prod(spatial(call, call.shape)) != 1:
        call.refuse("only an output of one value per channel has one", "AvgPool1d or AvgPool2d")
    return mean_over(g, call, x, list(range(2, len(x.shape))))


RULES: dict[str, Rule] = {
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool1d": _adaptive_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
}
