"""Segments put together at random from the layers of the set have autograd's gradients."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.segments import Concatenation, Residual, assert_same_gradients, split_body

Draw = st.DrawFn

_ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    lambda: nn.GELU(approximate="tanh"),
)
# Each example is traced, which takes longer than all comparisons.
_EXAMPLES = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def _number(draw: Draw, low: int, high: int) -> int:
    return draw(st.integers(low, high))


def _activation(draw: Draw) -> nn.Module:
    return draw(st.sampled_from(_ACTIVATIONS))()


def _groups(draw: Draw, *channels: int) -> int:
    return draw(st.sampled_from([n for n in range(1, 9) if all(c % n == 0 for c in channels)]))


def _conv(draw: Draw, channels: int, rank: int) -> nn.Module:
    outputs = draw(st.sampled_from([2, 4, 6]))
    kernel, dilation = _number(draw, 1, 3), _number(draw, 1, 2)
    options = {
        "stride": _number(draw, 1, 2),
        "padding": _number(draw, 0, 2),
        "groups": _groups(draw, channels, outputs),
        "bias": draw(st.booleans()),
        "dilation": dilation,
    }
    if rank == 2 and draw(st.booleans()):
        extra = _number(draw, 0, options["stride"] - 1)
        return nn.ConvTranspose2d(channels, outputs, kernel, output_padding=extra, **options)
    layer = nn.Conv1d if rank == 1 else nn.Conv2d
    return layer(channels, outputs, kernel, **options)


def _norm(draw: Draw, channels: int, rank: int) -> nn.Module:
    affine = draw(st.booleans())
    if draw(st.booleans()):
        return nn.GroupNorm(_groups(draw, channels), channels, affine=affine)
    norm = (nn.BatchNorm1d if rank == 1 else nn.BatchNorm2d)(channels, affine=affine)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm.eval()


def _pool(draw: Draw, rank: int) -> nn.Module:
    kernel = _number(draw, 2, 3)
    options = {
        "stride": _number(draw, 1, 3),
        "padding": _number(draw, 0, kernel // 2),
        "ceil_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        average = nn.AvgPool1d if rank == 1 else nn.AvgPool2d
        return average(kernel, count_include_pad=draw(st.booleans()), **options)
    return (nn.MaxPool1d if rank == 1 else nn.MaxPool2d)(
        kernel, dilation=_number(draw, 1, 2), **options
    )


def _block(draw: Draw, channels: int, rank: int) -> nn.Module:
    same = nn.Conv1d if rank == 1 else nn.Conv2d
    body = nn.Sequential(same(channels, channels, 3, padding="same"), _activation(draw))
    if draw(st.booleans()):
        return Residual(body)
    return Concatenation(body, nn.Sequential(same(channels, 2, 1), nn.Dropout(0.3)))


def _layer(draw: Draw, channels: int, rank: int) -> nn.Module:
    kind = draw(st.sampled_from(["conv", "norm", "activation", "pool", "block"]))
    if kind == "conv":
        return _conv(draw, channels, rank)
    if kind == "norm":
        return _norm(draw, channels, rank)
    if kind == "pool":
        return _pool(draw, rank)
    return _activation(draw) if kind == "activation" else _block(draw, channels, rank)


def _end(draw: Draw, channels: int, sizes: torch.Size) -> list[nn.Module]:
    """Nothing, or a pool and a dense layer."""
    if draw(st.booleans()):
        return []
    adaptive = nn.AdaptiveAvgPool1d if len(sizes) == 1 else nn.AdaptiveAvgPool2d
    dense = nn.Linear(channels, 5)
    return [adaptive(1), nn.Flatten(), dense, nn.LayerNorm(5), _activation(draw)]


@st.composite
def segments(draw: Draw, rank: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Up to seven layers that fit each other, and the shape of a sample."""
    torch.manual_seed(_number(draw, 0, 1000))
    shape = (_number(draw, 1, 3), *(_number(draw, 7, 12) for _ in range(rank)))
    first = nn.Conv1d(shape[0], 4, 3) if rank == 1 else nn.Conv2d(shape[0], 4, 3)
    layers: list[nn.Module] = [first]
    for _ in range(_number(draw, 2, 5)):
        sizes = _run(layers, shape)
        layer = _layer(draw, sizes[1], rank)
        if _fits(layer, sizes):
            layers.append(layer)
    sizes = _run(layers, shape)
    return nn.Sequential(*layers, *_end(draw, sizes[1], sizes[2:])), shape


def _run(layers: list[nn.Module], shape: tuple[int, ...]) -> torch.Size:
    with torch.no_grad():
        return torch.Size(nn.Sequential(*layers)(torch.zeros(2, *shape)).shape)


def _fits(layer: nn.Module, sizes: torch.Size) -> bool:
    try:
        with torch.no_grad():
            return min(layer(torch.zeros(sizes)).shape) > 0
    except (RuntimeError, ValueError):  # torch's words for windows larger than what is left
        return False


@_EXAMPLES
@given(segments(rank=2))
def test_random_segments_of_images(segment: tuple[nn.Module, tuple[int, ...]]) -> None:
    assert_same_gradients(split_body(*segment))


@_EXAMPLES
@given(segments(rank=1))
def test_random_segments_of_signals(segment: tuple[nn.Module, tuple[int, ...]]) -> None:
    assert_same_gradients(split_body(*segment))


@st.composite
def dense_segments(draw: Draw) -> tuple[nn.Module, tuple[int, ...]]:
    """Linear layers over the last axis, with norms and activations between."""
    torch.manual_seed(_number(draw, 0, 1000))
    shape = tuple(_number(draw, 1, 4) for _ in range(_number(draw, 0, 2)))
    features = inputs = _number(draw, 2, 8)
    layers: list[nn.Module] = []
    for _ in range(_number(draw, 1, 3)):
        width = _number(draw, 2, 8)
        layers.append(nn.Linear(features, width, bias=draw(st.booleans())))
        layers.append(nn.LayerNorm(width, elementwise_affine=draw(st.booleans())))
        layers.append(_activation(draw))
        if draw(st.booleans()):
            layers.append(Residual(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2))))
        features = width
    return nn.Sequential(*layers, *([nn.Flatten()] if shape else [])), (*shape, inputs)


@_EXAMPLES
@given(dense_segments())
def test_random_dense_segments(segment: tuple[nn.Module, tuple[int, ...]]) -> None:
    assert_same_gradients(split_body(*segment))
