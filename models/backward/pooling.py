"""Max and average pools.

Legend: B batch, C channels, L the axes behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

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
        return _max_pool_of_tiles(g, x, windows, padded)
    y, positions = g.ops("MaxPool", 2, padded, **windows.attributes())

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        yield x, windows.unpadded(g, _spread_maxima(g, windows, padded, positions, grad))

    return y, pull


def _max_pool_of_tiles(
    g: GraphBuilder, x: Term, windows: Windows, padded: str
) -> tuple[str, Pullback]:
    """Windows side by side, their largest value found along one axis after the other, last first.

    ONNX Runtime takes 25 times as long to pool if it has to tell the positions. Here a mask for
    each axis says which of the cells in line has the value; the forward pass makes them, since they
    are a small part of what they are made from.
    """
    steps = []
    value, sizes = padded, list(windows.padded_sizes)
    for axis in reversed(range(len(sizes))):
        cells = windows.kernel[axis]
        if cells == 1:
            continue
        sizes[axis] //= cells
        step = _Line(cells, math.prod(sizes[axis + 1 :]))
        value, firsts = step.largest(g, value)
        steps.append((step, firsts))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        spread = grad
        for step, firsts in reversed(steps):
            spread = step.spread(g, spread, firsts)
        whole = g.reshape(spread, (None, x.shape[1], *windows.padded_sizes))
        yield x, windows.unpadded(g, whole)

    return g.reshape(value, (None, x.shape[1], *windows.outputs)), pull


@dataclass(frozen=True, slots=True)
class _Line:
    """``cells`` in line with each other, ``apart`` values from one to the next."""

    cells: int
    apart: int

    def largest(self, g: GraphBuilder, value: str) -> tuple[str, list[str]]:
        """The largest of each line, and for all cells but the last where it is the first of it."""
        rows = self._rows(g, value)
        firsts = []
        for number, row in enumerate(rows[:-1], start=1):
            rest = rows[number] if number + 1 == len(rows) else g.op("Max", *rows[number:])
            firsts.append(g.early(g.op("GreaterOrEqual", row, rest)))
        return g.op("Max", *rows), firsts

    def spread(self, g: GraphBuilder, grad: str, firsts: Sequence[str]) -> str:
        """Each line's gradient at the cell that had the value, 0 at the others."""
        left = g.reshape(grad, (1, None) if self.apart == 1 else (None, 1, self.apart))
        parts = []
        for first in firsts:
            parts.append(g.op("Mul", left, g.op("Cast", first, to=TensorProto.FLOAT)))
            left = g.op("Sub", left, parts[-1])  # what later cells may get
        if self.apart == 1:
            return g.transpose(g.concat([*parts, left], axis=0), [1, 0])
        return g.concat([*parts, left], axis=1)

    def _rows(self, g: GraphBuilder, value: str) -> tuple[str, ...]:
        """Each cell of all lines: single values are turned, so that each cell is one long row."""
        if self.apart == 1:
            turned = g.transpose(g.reshape(value, (None, self.cells)), [1, 0])
            return g.ops("Split", self.cells, turned, axis=0, num_outputs=self.cells)
        lines = g.reshape(value, (None, self.cells, self.apart))
        return g.ops("Split", self.cells, lines, axis=1, num_outputs=self.cells)


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
