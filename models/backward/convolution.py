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
    """Windows with stride 1: a convolution with the turned kernel; else a transposed one."""
    reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
    begin = [r - b for r, b in zip(reach, windows.begin, strict=True)]
    end = [r - e for r, e in zip(reach, windows.end, strict=True)]
    if any(s != 1 for s in windows.stride) or min(begin + end) < 0:
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
    value, groups = weight.value, windows.groups
    count = len(kernel)
    if groups > 1:
        value = g.reshape(value, (groups, outputs // groups, inputs, *kernel))
        value = g.transpose(value, [0, 2, 1, *range(3, 3 + count)])
        value = g.reshape(value, (groups * inputs, outputs // groups, *kernel))
    else:
        value = g.transpose(value, [1, 0, *windows.axes])
    if windows.cells == 1:
        return value
    before_first = np.iinfo(np.int64).min
    return g.slice(value, windows.axes, [-1] * count, [before_first] * count, [-1] * count)


def _weight_gradient(g: GraphBuilder, image: str, grad: str, weight: Term, windows: Windows) -> str:
    """(D, C/G, ...) from the windows' input (B, C, ...) and the gradient (B, D, ...)."""
    if windows.groups > 1:
        return _grouped_weight_gradient(g, image, grad, weight, windows)
    outputs, inputs, *kernel = _known(weight)
    swapped = [1, 0, *windows.axes]
    turned = g.transpose(windows.padded(g, image), swapped)
    views = list(windows.views(g, turned))
    stacked = g.op("Concat", *views, axis=0) if len(views) > 1 else views[0]
    columns = g.reshape(stacked, (windows.cells * inputs, None))
    rows = g.reshape(g.transpose(grad, swapped), (outputs, None))
    product = g.op("Gemm", rows, columns, transB=1)
    cells_first = g.reshape(product, (outputs, windows.cells, inputs))
    return g.reshape(g.transpose(cells_first, [0, 2, 1]), (outputs, inputs, *kernel))


def _grouped_weight_gradient(
    g: GraphBuilder, image: str, grad: str, weight: Term, windows: Windows
) -> str:
    """One product of matrices for each group, over all windows of the batch."""
    outputs, inputs, *kernel = _known(weight)
    groups = windows.groups
    swapped = [1, 0, *windows.axes]
    turned = g.transpose(windows.padded(g, image), swapped)
    views = [g.reshape(view, (groups, inputs, 1, None)) for view in windows.views(g, turned)]
    stacked = g.op("Concat", *views, axis=2) if len(views) > 1 else views[0]
    columns = g.reshape(stacked, (groups, inputs * windows.cells, None))
    rows = g.reshape(g.transpose(grad, swapped), (groups, outputs // groups, None))
    product = g.op("MatMul", rows, g.transpose(columns, [0, 2, 1]))
    return g.reshape(product, (outputs, inputs, *kernel))


def _known(weight: Term) -> Ints:
    assert all(size is not None for size in weight.shape), "weights have no batch"
    return tuple(size for size in weight.shape if size is not None)


RULES: dict[str, Rule] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
}
