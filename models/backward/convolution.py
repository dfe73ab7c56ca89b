"""Convolutions in one and two dimensions, and transposed ones.

Legend: B batch, C channels in, D channels out, G groups, K cells of a window, L windows.
The gradient of the weights is one product of matrices over all windows of the batch
(im2col; source: Chellapilla, Puri, Simard, "High performance convolutional neural networks for
document processing", 2006).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from models.backward.calls import Call, Pullback, Rule, Term
from models.backward.graph import GraphBuilder
from models.backward.windows import Ints, Windows, spatial

_MOST_PADDING = 1 / 8  # of the rows that a product of matrices may have for nothing
_LEAST_ROWS = 16  # of a matrix; products of smaller ones cost more in calls than in arithmetic


def _convolution(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x, weight, bias = call.term("input"), call.term("weight"), call.optional("bias")
    windows = _conv_windows(call, x, weight)
    inputs = [x.value, weight.value, *([bias.value] if bias else [])]
    pads = [*windows.begin, *(max(0, end) for end in windows.end)]
    y = g.op("Conv", *inputs, pads=pads, group=windows.groups, **windows.attributes())

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        if x.trains:
            yield x, _input_gradient(g, grad, weight, windows)
        if weight.trains:
            yield weight, _weight_gradient(g, x.value, grad, weight, windows)
        if bias is not None and bias.trains:
            yield bias, g.sum(grad, [0, *windows.axes])

    return y, pull


def _conv_transpose(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    """Its backward pass is a convolution over the larger side, and the other way round."""
    x, weight, bias = call.term("input"), call.term("weight"), call.optional("bias")
    windows = _transposed_windows(call, x, weight)
    y = windows.scatter(g, x.value, weight.value)
    if bias is not None:
        y = g.op("Add", y, g.reshape(bias.value, (1, bias.shape[0], *[1] * len(windows.axes))))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        if x.trains:
            pads = [*windows.begin, *(max(0, end) for end in windows.end)]
            attributes = windows.attributes()
            yield x, g.op("Conv", grad, weight.value, pads=pads, group=windows.groups, **attributes)
        if weight.trains:
            yield weight, _weight_gradient(g, grad, x.value, weight, windows)
        if bias is not None and bias.trains:
            yield bias, g.sum(grad, [0, *windows.axes])

    return y, pull


def _conv_windows(call: Call, x: Term, weight: Term) -> Windows:
    inputs, outputs = spatial(call, x.shape), spatial(call, call.shape)
    kernel = _known(weight)[2:]
    count = len(kernel)
    dilation = call.sizes("dilation", count)
    padding = call.arguments["padding"]
    if padding == "same":  # an odd entry goes behind, as torch has it
        begin = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        begin = (0,) * count if padding == "valid" else call.sizes("padding", count)
    return Windows(
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        stride=call.sizes("stride", count),
        begin=begin,
        dilation=dilation,
        groups=call.arguments["groups"],
    )


def _transposed_windows(call: Call, x: Term, weight: Term) -> Windows:
    """The windows of the convolution that this one turns round."""
    inputs, outputs = spatial(call, call.shape), spatial(call, x.shape)
    count = len(inputs)
    windows = Windows(
        inputs=inputs,
        outputs=outputs,
        kernel=_known(weight)[2:],
        stride=call.sizes("stride", count),
        begin=call.sizes("padding", count),
        dilation=call.sizes("dilation", count),
        groups=call.arguments["groups"],
    )
    if any(-end >= stride for end, stride in zip(windows.end, windows.stride, strict=True)):
        call.refuse("its output_padding is not below its stride", "a smaller output_padding")
    return windows


def _input_gradient(g: GraphBuilder, grad: str, weight: Term, windows: Windows) -> str:
    """A transposed convolution; where each group is small and the stride 1, a convolution with
    the turned kernel is faster (measured with ONNX Runtime 1.32)."""
    reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
    begin = [r - b for r, b in zip(reach, windows.begin, strict=True)]
    end = [r - e for r, e in zip(reach, windows.end, strict=True)]
    if windows.groups == 1 or any(s != 1 for s in windows.stride) or min(begin + end) < 0:
        return windows.scatter(g, grad, weight.value)
    return g.op(
        "Conv",
        grad,
        _turned(g, weight, windows),
        pads=begin + end,
        group=windows.groups,
        **windows.attributes(),
    )


def _turned(g: GraphBuilder, weight: Term, windows: Windows) -> str:
    """Weights (D, C/G, ...) as (C, D/G, ...), each kernel back to front."""
    outputs, inputs, *kernel = _known(weight)
    groups, count = windows.groups, len(kernel)
    value = g.reshape(weight.value, (groups, outputs // groups, inputs, *kernel))
    value = g.transpose(value, [0, 2, 1, *range(3, 3 + count)])
    value = g.reshape(value, (groups * inputs, outputs // groups, *kernel))
    if windows.cells == 1:
        return value
    before_first = np.iinfo(np.int64).min
    return g.slice(value, windows.axes, [-1] * count, [before_first] * count, [-1] * count)


def _weight_gradient(g: GraphBuilder, image: str, grad: str, weight: Term, windows: Windows) -> str:
    """(D, C/G, ...) from the windows' input (B, C, ...) and the gradient (B, D, ...)."""
    outputs, inputs, *kernel = _known(weight)
    swapped = [1, 0, *windows.axes]
    turned = g.transpose(windows.padded(g, image), swapped)
    if windows.groups > 1:
        product = _grouped_product(g, turned, g.transpose(grad, swapped), weight, windows)
    elif _gradient_is_cheaper_to_move(windows, inputs, outputs):
        product = _product_by_gradient_rows(g, turned, grad, weight, windows)
    else:
        rows_DL = g.reshape(g.transpose(grad, swapped), (outputs, None))
        product = _product(g, turned, rows_DL, inputs, windows)
    # Two steps over two axes each take an eighth of the time of one over all.
    flat = g.reshape(product, (windows.cells * inputs, outputs))
    outputs_first = g.reshape(g.transpose(flat, [1, 0]), (outputs, windows.cells, inputs))
    return g.reshape(g.transpose(outputs_first, [0, 2, 1]), (outputs, inputs, *kernel))


def _gradient_is_cheaper_to_move(windows: Windows, inputs: int, outputs: int) -> bool:
    """Whether windows lie on every row, the gradient has fewer channels than the image's stacked
    cells, and the rows that are only padding cost little."""
    if len(windows.kernel) != 2 or windows.kernel[0] == 1 or windows.stride[0] != 1:
        return False
    if outputs > inputs * windows.kernel[1]:
        return False
    return windows.padded_sizes[0] <= windows.outputs[0] * (1 + _MOST_PADDING)


def _product_by_gradient_rows(
    g: GraphBuilder, turned: str, grad: str, weight: Term, windows: Windows
) -> str:
    """(K C, D): the gradient is moved from row to row against an image that stays.

    Whole rows of it are one piece of memory, and the image is copied once for each column of a
    window, not for each cell: a tenth less time for the backward pass of a ResNet stage.
    """
    outputs, inputs = _known(weight)[:2]
    rows, columns = windows.axes
    stacked = g.concat(windows.views(g, turned, [columns]), axis=0)
    image = g.reshape(stacked, (inputs * windows.kernel[1], None))
    last = g.transpose(grad, [0, rows, columns, 1])
    added = windows.padded_sizes[0] - windows.outputs[0]
    products = []
    for cell in range(windows.kernel[0]):
        above = cell * windows.dilation[0]
        moved = g.pad(last, [1], [(above, added - above)])
        products.append(g.op("Gemm", image, g.reshape(moved, (None, outputs))))
    return g.concat(products, axis=0)


def _product(g: GraphBuilder, turned: str, rows_DL: str, inputs: int, windows: Windows) -> str:
    """(K C, D): with the few columns on the right ONNX Runtime multiplies half as fast again.

    In two dimensions cells are stacked along the last axis first. A row of cells is then one long
    piece of memory, and only one row at a time is held.
    """
    across, along = windows.axes[:-1], windows.axes[-1:]
    stacked = g.concat(windows.views(g, turned, along), axis=0)
    height = inputs * windows.kernel[-1]
    rows = windows.views(g, stacked, across)
    if height < _LEAST_ROWS:
        rows, height = [g.concat(rows, axis=0)], height * len(rows)
    products = [g.op("Gemm", g.reshape(row, (height, None)), rows_DL, transB=1) for row in rows]
    return g.concat(products, axis=0)


def _grouped_product(
    g: GraphBuilder, turned: str, rows: str, weight: Term, windows: Windows
) -> str:
    """(K, C/G, D): one product of matrices for each group."""
    outputs, inputs = _known(weight)[:2]
    groups = windows.groups
    views = windows.views(g, turned, windows.axes)
    cells = [g.reshape(view, (groups, 1, inputs, None)) for view in views]
    columns = g.reshape(g.concat(cells, axis=1), (groups, windows.cells * inputs, None))
    turned_rows = g.transpose(g.reshape(rows, (groups, outputs // groups, None)), [0, 2, 1])
    product = g.op("MatMul", columns, turned_rows)
    return g.transpose(product, [1, 0, 2])


def _known(weight: Term) -> Ints:
    assert all(size is not None for size in weight.shape), "weights have no batch"
    return tuple(size for size in weight.shape if size is not None)


RULES: dict[str, Rule] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
}
