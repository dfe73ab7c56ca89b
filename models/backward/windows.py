"""Sliding windows: the geometry that convolutions and pools share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.backward.calls import Call
from models.backward.graph import GraphBuilder, Shape

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows over the axes 2 and up of values shaped (B, C, ...); one entry for each axis.
    Channels see each other within one of ``groups`` only.

    ``inputs`` and ``outputs`` are the sizes before and after. ``begin`` is the padding in front.
    """

    inputs: Ints
    outputs: Ints
    kernel: Ints
    stride: Ints
    begin: Ints
    dilation: Ints
    groups: int = 1

    @property
    def axes(self) -> list[int]:
        return list(range(2, 2 + len(self.kernel)))

    @property
    def end(self) -> Ints:
        """Padding behind that makes the last window fit exactly; negative: values left over."""
        spans = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        rows = zip(self.outputs, self.stride, spans, self.begin, self.inputs, strict=True)
        return tuple((o - 1) * s + span - begin - i for o, s, span, begin, i in rows)

    @property
    def padded_sizes(self) -> Ints:
        """The sizes of ``padded``, which the windows cover exactly."""
        return tuple(map(sum, zip(self.inputs, self.begin, self.end, strict=True)))

    @property
    def cells(self) -> int:
        """Values in a window."""
        return math.prod(self.kernel)

    @property
    def disjoint(self) -> bool:
        """Whether no two windows share a value."""
        plain = all(d == 1 for d, k in zip(self.dilation, self.kernel, strict=True) if k > 1)
        return plain and all(s >= k for s, k in zip(self.stride, self.kernel, strict=True))

    @property
    def tiles(self) -> bool:
        """Whether windows lie side by side without a gap."""
        return self.disjoint and self.stride == self.kernel

    def attributes(self) -> dict[str, list[int]]:
        """What ONNX operators call it, without the padding."""
        names = ("kernel_shape", "strides", "dilations")
        values = (self.kernel, self.stride, self.dilation)
        return {name: list(value) for name, value in zip(names, values, strict=True)}

    def padded(self, g: GraphBuilder, x: str, *, fill: float = 0.0) -> str:
        """``x`` cut or padded so that the windows cover it exactly."""
        cut = g.fit(x, self.axes, [(0, max(0, -end)) for end in self.end])
        amounts = [(b, max(0, e)) for b, e in zip(self.begin, self.end, strict=True)]
        return g.pad(cut, self.axes, amounts, fill)

    def unpadded(self, g: GraphBuilder, padded: str) -> str:
        """The way back from ``padded``: without the padding, zeros where values were cut."""
        return g.fit(padded, self.axes, list(zip(self.begin, self.end, strict=True)))

    def views(self, g: GraphBuilder, padded: str, axes: Sequence[int]) -> list[str]:
        """For each cell of a window, along some axes, its values in all windows.

        The last axis is cut first: what is left of it is then one piece of memory.
        """
        if not axes:
            return [padded]
        *others, axis = axes
        n = axis - 2
        columns = []
        for cell in range(self.kernel[n]):
            start = cell * self.dilation[n]
            end = start + (self.outputs[n] - 1) * self.stride[n] + 1
            part = g.slice(padded, [axis], [start], [end], [self.stride[n]])
            columns.append(self.views(g, part, others))
        return [view for row in zip(*columns, strict=True) for view in row]

    def scatter(self, g: GraphBuilder, grad: str, weight: str) -> str:
        """Spread each window's values over its cells with ``weight`` and add up what meets:
        a transposed convolution, of the windows' input size."""
        return g.op(
            "ConvTranspose",
            grad,
            weight,
            pads=[*self.begin, *(max(0, end) for end in self.end)],
            output_padding=[max(0, -end) for end in self.end],
            group=self.groups,
            **self.attributes(),
        )


def spatial(call: Call, shape: Shape) -> Ints:
    """The sizes behind batch and channels, all known."""
    sizes = tuple(size for size in shape[2:] if size is not None)
    if shape[0] is not None or shape[1] is None or len(sizes) != len(shape) - 2:
        call.refuse("expected the batch as dimension 0, then channels")
    return sizes


def pool_windows(call: Call, x: Shape, *, dilated: bool) -> Windows:
    """The windows of a pooling call."""
    inputs, outputs = spatial(call, x), spatial(call, call.shape)
    count = len(inputs)
    kernel = call.sizes("kernel_size", count)
    stride: Sequence[int] = call.arguments["stride"]
    return Windows(
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        stride=call.sizes("stride", count) if stride else kernel,
        begin=call.sizes("padding", count),
        dilation=call.sizes("dilation", count) if dilated else (1,) * count,
    )
