"""Group, instance and layer norm, and batch norm whose statistics stay as they are.

Legend: B batch, C channels, G groups, M values that share a mean, L the axes behind the channels.

With n the normalised values and r one over the deviation, y = w n + b and, for a gradient d of y,
    dn = w d,  dx = r (dn - mean(dn) - n mean(dn n)),  dw = sum(d n),  db = sum(d).
Source: Ioffe and Szegedy, arXiv:1502.03167, section 3, with the means over each norm's own values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from models.backward.calls import Call, Pullback, Rule, Term
from models.backward.graph import GraphBuilder, Shape


def _normalise(g: GraphBuilder, x_GM: str, size: int, eps: float) -> tuple[str, str]:
    """Normalised values of (B, G, M) and one over their deviation, (B, G, 1)."""
    ones = g.op("Expand", g.scalar(1.0), g.ints([size]))
    n_GM, _, r_G1 = g.ops("LayerNormalization", 3, x_GM, ones, axis=2, epsilon=float(eps))
    return n_GM, r_G1


def _group_norm(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    return _by_groups(g, call, call.arguments["num_groups"])


def _instance_norm(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    if not call.arguments["use_input_stats"]:
        call.refuse("it keeps statistics", "InstanceNorm without track_running_stats")
    channels = call.term("input").shape[1]
    assert channels is not None, "channels do not follow the batch"
    return _by_groups(g, call, channels)


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """A group norm's forward pass; ``n_CL`` are the normalised values, (B, C, L)."""

    groups: int
    channels: int
    length: int
    weight: Term | None
    n_CL: str
    r_G1: str

    def by_group(self, g: GraphBuilder, value: str, batch: int | None = None) -> str:
        """One value for each channel as (B, G, C/G)."""
        return g.reshape(value, (batch, self.groups, self.channels // self.groups))


def _by_groups(g: GraphBuilder, call: Call, groups: int) -> tuple[str, Pullback]:
    x, weight, bias = call.term("input"), call.optional("weight"), call.optional("bias")
    channels, length = x.shape[1] or 0, math.prod(size or 0 for size in x.shape[2:])
    size = channels // groups * length
    flat_GM = g.reshape(x.value, (None, groups, size))
    n_GM, r_G1 = _normalise(g, flat_GM, size, call.arguments["eps"])
    n_CL = g.reshape(n_GM, (None, channels, length))
    y_CL = n_CL
    if weight is not None:
        y_CL = g.op("Mul", y_CL, g.reshape(weight.value, (1, channels, 1)))
    if bias is not None:
        y_CL = g.op("Add", y_CL, g.reshape(bias.value, (1, channels, 1)))
    norm = _Groups(
        groups=groups, channels=channels, length=length, weight=weight, n_CL=n_CL, r_G1=r_G1
    )

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        d_CL = g.reshape(grad, (None, channels, length))
        sum_C1 = g.sum(d_CL, [2], keep=True)
        sum_n_C1 = g.sum(g.op("Mul", d_CL, n_CL), [2], keep=True)
        if weight is not None and weight.trains:
            yield weight, g.sum(sum_n_C1, [0, 2])
        if bias is not None and bias.trains:
            yield bias, g.sum(sum_C1, [0, 2])
        if x.trains:
            dx_CL = _groups_input_gradient(g, norm, d_CL, sum_C1, sum_n_C1)
            yield x, g.reshape(dx_CL, x.shape)

    return g.reshape(y_CL, x.shape), pull


def _groups_input_gradient(
    g: GraphBuilder, norm: _Groups, d_CL: str, sum_C1: str, sum_n_C1: str
) -> str:
    """dx = (r w) d + slope n + shift, with one factor of each kind for each channel: the large
    values are read as seldom as possible."""
    each = norm.channels // norm.groups
    r_GE = g.op("Expand", norm.r_G1, g.ints([1, 1, each]))
    w_GE = None if norm.weight is None else norm.by_group(g, norm.weight.value, batch=1)
    parts = [r_GE if w_GE is None else g.op("Mul", norm.r_G1, w_GE)]
    for channel_sum in (sum_n_C1, sum_C1):
        sum_GE = norm.by_group(g, channel_sum)
        weighted = sum_GE if w_GE is None else g.op("Mul", sum_GE, w_GE)
        total_G1 = g.sum(weighted, [2], keep=True)
        mean_G1 = g.op("Mul", total_G1, g.scalar(-1.0 / (each * norm.length)))
        parts.append(g.op("Mul", mean_G1, r_GE))
    scale_C1, slope_C1, shift_C1 = (g.reshape(p, (None, norm.channels, 1)) for p in parts)
    line_CL = g.op("Add", g.op("Mul", norm.n_CL, slope_C1), shift_C1)
    return g.op("Add", g.op("Mul", d_CL, scale_C1), line_CL)


def _layer_norm(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    x, weight, bias = call.term("input"), call.optional("weight"), call.optional("bias")
    rank = len(x.shape)
    axes = list(range(rank - len(call.arguments["normalized_shape"]), rank))
    if None in x.shape[axes[0] :]:
        call.refuse("it normalises over the batch")
    size = math.prod(n or 0 for n in x.shape[axes[0] :])
    flat = g.reshape(x.value, (None, 1, size))
    n_1M, r_11 = _normalise(g, flat, size, call.arguments["eps"])
    n, r = g.reshape(n_1M, x.shape), g.reshape(r_11, (*x.shape[: axes[0]], *[1] * len(axes)))
    y = n if weight is None else g.op("Mul", n, weight.value)
    outer = list(range(axes[0]))

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        if weight is not None and weight.trains:
            yield weight, g.sum(g.op("Mul", grad, n), outer)
        if bias is not None and bias.trains:
            yield bias, g.sum(grad, outer)
        if x.trains:
            dn = grad if weight is None else g.op("Mul", grad, weight.value)
            mean = g.op("ReduceMean", dn, g.ints(axes), keepdims=1)
            slope = g.op("ReduceMean", g.op("Mul", dn, n), g.ints(axes), keepdims=1)
            rest = g.op("Sub", g.op("Sub", dn, mean), g.op("Mul", n, slope))
            yield x, g.op("Mul", rest, r)

    return y if bias is None else g.op("Add", y, bias.value), pull


def _frozen_batch_norm(g: GraphBuilder, call: Call) -> tuple[str, Pullback]:
    """A scale and a shift for each channel, from statistics that do not change."""
    if call.arguments.get("training") or call.index:
        call.refuse("it takes statistics of each batch", "GroupNorm or LayerNorm")
    x, weight, bias = call.term("input"), call.optional("weight"), call.optional("bias")
    mean, variance = call.term("running_mean"), call.term("running_var")
    shape: Shape = (1, x.shape[1], *[1] * (len(x.shape) - 2))
    shifted = g.op("Add", variance.value, g.scalar(float(call.arguments["eps"])))
    r_C = g.op("Div", g.scalar(1.0), g.op("Sqrt", shifted))
    scale_C = r_C if weight is None else g.op("Mul", r_C, weight.value)
    scale = g.reshape(scale_C, shape)
    centred = g.op("Sub", x.value, g.reshape(mean.value, shape))
    y = g.op("Mul", centred, scale)
    outer = [0, *range(2, len(x.shape))]

    def pull(grad: str) -> Iterator[tuple[Term, str]]:
        if weight is not None and weight.trains:
            yield weight, g.op("Mul", g.sum(g.op("Mul", grad, centred), outer), r_C)
        if bias is not None and bias.trains:
            yield bias, g.sum(grad, outer)
        if x.trains:
            yield x, g.op("Mul", grad, scale)

    return y if bias is None else g.op("Add", y, g.reshape(bias.value, shape)), pull


RULES: dict[str, Rule] = {
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "batch_norm": _frozen_batch_norm,
    "_native_batch_norm_legit_no_training": _frozen_batch_norm,
}
