"""Payload precision: fp32, fp16 with a power-of-two scale, int8 per channel.

``fp16``: the sender multiplies by 2**exponent before the conversion and the reader by
2**-exponent after it. Cut gradients need it (81 % of trained ones are subnormal in plain fp16);
exponents travel as JSON in the metadata field ``scale_exponents``, 0 where a name is absent.
``int8``: per channel (axis 1) ``x = (q - zero_point) * scale``, ONNX's DequantizeLinear, with two
more tensors ``{name}.scale`` (F32) and ``{name}.zero_point`` (I8). Zero maps to zero exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from wire.codec import Block, Part, Tensors, exact, exact_block, split
from wire.errors import PeerProtocolError, Refusal
from wire.halves import from_half, to_half
from wire.messages import Precision

EXPONENTS = "scale_exponents"
FP16_TARGET = 2.0**14  # the largest value lands in [2**14, 2**15), below fp16's 65504
# A single activation or gradient beyond this would wreck the weights of everybody.
LARGEST_VALUE = 1e6
EXPONENT_LIMIT = 120  # keeps 2**exponent a normal fp32 number in both directions

_FLOAT_TYPES = (np.dtype("<f4"), np.dtype("<f2"))
_exponents_decoder = msgspec.json.Decoder(dict[str, int])

Floats = NDArray[np.float32]


def largest_magnitude(array: Floats) -> float:
    """Largest absolute value; inf or nan where the array holds one; 0 for an empty array."""
    if array.size == 0:
        return 0.0
    # Not array.max(): with small arrays that costs twice as much.
    high, low = np.maximum.reduce(array, axis=None), np.minimum.reduce(array, axis=None)
    return max(float(high), -float(low))


def fp16_exponent(magnitude: float) -> int:
    """Power of two that brings ``magnitude`` just under fp16's range; 0 for zero."""
    if not math.isfinite(magnitude) or magnitude == 0.0:
        return 0
    exponent = math.floor(math.log2(FP16_TARGET / magnitude)) + 1
    return max(-EXPONENT_LIMIT, min(EXPONENT_LIMIT, exponent))


def gradient_parts(
    tensors: Mapping[str, Floats], precision: Precision
) -> tuple[dict[str, Part | Block], dict[str, str]]:
    """Parts and metadata of gradients: fp32 as they are, otherwise scaled fp16 each."""
    if not tensors:
        return {}, {}
    if precision is Precision.FP32:
        return {"gradients": exact_block(tensors)}, {}
    exponents = {name: fp16_exponent(largest_magnitude(a)) for name, a in tensors.items()}
    metadata = {EXPONENTS: msgspec.json.encode(exponents).decode()}
    if len(tensors) == 1:
        ((name, array),) = tensors.items()
        return {name: _scaled_fp16(array, exponents[name])}, metadata
    shapes = {name: array.shape for name, array in tensors.items()}

    def write(out: NDArray[Any]) -> None:
        # Scaled one by one, converted all at once: a conversion costs more than a product.
        scaled = np.empty(out.shape, np.float32)
        for name, part in split(scaled, shapes).items():
            np.multiply(tensors[name], np.float32(math.ldexp(1.0, exponents[name])), out=part)
        to_half(scaled, 1.0, out)

    return {"gradients": Block(dtype=np.dtype("<f2"), shapes=shapes, write=write)}, metadata


def activation_parts(
    name: str, array: Floats, precision: Precision
) -> tuple[dict[str, Part | Block], dict[str, str]]:
    """Parts and metadata of activations (count, channels, …) in the given precision."""
    if precision is Precision.FP32:
        return {name: exact(array)}, {}
    if precision is Precision.INT8:
        return _int8_parts(name, array), {}
    # Activations fit fp16 as they are; scale down only what would overflow.
    exponent = min(0, fp16_exponent(largest_magnitude(array)))
    metadata = {EXPONENTS: msgspec.json.encode({name: exponent}).decode()} if exponent else {}
    return {name: _scaled_fp16(array, exponent)}, metadata


def read_floats(
    tensors: Tensors,
    name: str,
    shape: tuple[int, ...],
    out: Floats | None = None,
    *,
    limited: bool = True,
) -> Floats:
    """Decode ``name`` to float32 of exactly ``shape``, into ``out`` if given.

    Raises PeerProtocolError for another shape or type, for values that are not finite, or, if
    ``limited``, beyond ±LARGEST_VALUE.
    """
    array = tensors.require(name)
    _check_shape(array, name, shape)
    result = np.empty(shape, np.float32) if out is None else out
    if array.dtype == np.dtype("i1"):
        _dequantise(tensors, name, array, result)
    elif array.dtype in _FLOAT_TYPES:
        # The scale is a power of two: the product is exact.
        scale = _scale_of(_exponents(tensors), name)
        if array.dtype.itemsize == 2:
            from_half(array, 1.0 if scale is None else float(scale), result)
        elif scale is None:
            np.copyto(result, array)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(array, scale, out=result)
    else:
        raise PeerProtocolError(
            Refusal.DTYPE, f"expected {name!r} as F32, F16 or I8, received {array.dtype}"
        )
    _check_magnitude(result, name, limited=limited)
    return result


def read_all_floats(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], *, limited: bool = True
) -> dict[str, Floats]:
    """Decode the tensors of these names and shapes to float32, as ``read_floats`` does each.

    What travels as one block of one type is converted and checked as one. fp32 is copied, once: a
    matrix product can have other bits where its memory is aligned otherwise, and where a tensor
    lies in a message depends on the length of a name.
    """
    for name, shape in shapes.items():
        _check_shape(tensors.require(name), name, shape)
    types = {array.dtype for array in tensors.arrays.values()}
    if tensors.arrays.keys() != shapes.keys() or len(types) != 1 or types - set(_FLOAT_TYPES):
        return {n: read_floats(tensors, n, s, limited=limited) for n, s in shapes.items()}
    (dtype,) = types
    flat = tensors.data.view(dtype)
    exponents = _exponents(tensors)
    if dtype.itemsize == 2:
        halves, flat = flat, np.empty(flat.shape, np.float32)
        from_half(halves, 1.0, flat)
    found = {}
    for name, shape in shapes.items():
        begin = tensors.begins[name] // dtype.itemsize
        view = flat[begin : begin + math.prod(shape)].reshape(shape)
        found[name] = view if view.flags.writeable else view.copy()
        if scale := _scale_of(exponents, name):
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(found[name], scale, out=found[name])
    is_scaled_apart = dtype.itemsize == 4 and bool(exponents)  # then flat is as it came
    if is_scaled_apart or not largest_magnitude(flat) <= LARGEST_VALUE:
        for name, array in found.items():
            _check_magnitude(array, name, limited=limited)
    return found


def _check_shape(array: NDArray[Any], name: str, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise PeerProtocolError(
            Refusal.SHAPE, f"expected {name!r} of shape {shape}, received {array.shape}"
        )


def _check_magnitude(array: Floats, name: str, *, limited: bool) -> None:
    magnitude = largest_magnitude(array)
    if not math.isfinite(magnitude):
        raise PeerProtocolError(Refusal.NON_FINITE, f"{name!r} holds values that are not finite")
    if limited and magnitude > LARGEST_VALUE:
        raise PeerProtocolError(
            Refusal.RANGE,
            f"expected values within ±{LARGEST_VALUE:g} in {name!r}, received {magnitude:g}",
        )


def read_labels(tensors: Tensors, name: str, count: int, classes: int) -> NDArray[np.int64]:
    """Decode integer labels (count,) in 0 … classes-1; raise PeerProtocolError otherwise."""
    array = tensors.require(name)
    if array.dtype.kind not in "iu":
        raise PeerProtocolError(Refusal.DTYPE, f"expected integer {name!r}, received {array.dtype}")
    if array.shape != (count,):
        raise PeerProtocolError(
            Refusal.SHAPE, f"expected {name!r} of shape ({count},), received {array.shape}"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= classes):
        raise PeerProtocolError(
            Refusal.LABEL_RANGE,
            f"expected labels 0 to {classes - 1}, received {int(array.min())} to "
            f"{int(array.max())}",
        )
    return array.astype(np.int64)


def _scaled_fp16(array: Floats, exponent: int) -> Part:
    scale = math.ldexp(1.0, exponent)
    return Part(
        dtype=np.dtype("<f2"), shape=array.shape, write=lambda out: to_half(array, scale, out)
    )


def _channel_axes(ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis != 1)


def _per_channel(values: NDArray[Any], ndim: int) -> NDArray[Any]:
    return values.reshape((1, -1) + (1,) * (ndim - 2))


def _int8_parts(name: str, array: Floats) -> dict[str, Part | Block]:
    axes = _channel_axes(array.ndim)
    # Zero is inside every channel's range, so that what ReLU cut to zero stays zero.
    low_C = np.minimum(array.min(axis=axes), 0.0)
    high_C = np.maximum(array.max(axis=axes), 0.0)
    scale_C = ((high_C - low_C) / 255.0).astype(np.float32)
    scale_C[scale_C == 0.0] = 1.0
    zero_C = np.clip(np.rint(-128.0 - low_C / scale_C), -128, 127)

    def write(out: NDArray[Any]) -> None:
        quantised = array / _per_channel(scale_C, array.ndim)
        quantised += _per_channel(zero_C, array.ndim)
        np.rint(quantised, out=quantised)
        np.clip(quantised, -128, 127, out=quantised)
        np.copyto(out, quantised, casting="unsafe")

    return {
        name: Part(dtype=np.dtype("i1"), shape=array.shape, write=write),
        f"{name}.scale": exact(scale_C),
        f"{name}.zero_point": exact(zero_C.astype(np.int8)),
    }


def _dequantise(tensors: Tensors, name: str, array: NDArray[Any], out: Floats) -> None:
    scale_C = tensors.require(f"{name}.scale")
    zero_C = tensors.require(f"{name}.zero_point")
    channels = array.shape[1] if array.ndim > 1 else 0
    for side in (scale_C, zero_C):
        if side.shape != (channels,):
            raise PeerProtocolError(
                Refusal.SHAPE,
                f"expected a scale and zero point per channel ({channels}), received {side.shape}",
            )
    if scale_C.dtype != np.dtype("<f4") or zero_C.dtype != np.dtype("i1"):
        raise PeerProtocolError(Refusal.DTYPE, "expected scale as F32 and zero point as I8")
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(array, _per_channel(zero_C, array.ndim), out=out, dtype=np.float32)
        np.multiply(out, _per_channel(scale_C, array.ndim), out=out)


def _exponents(tensors: Tensors) -> dict[str, int]:
    raw = tensors.metadata.get(EXPONENTS)
    if raw is None:
        return {}
    try:
        return _exponents_decoder.decode(raw)
    except msgspec.DecodeError as exc:
        raise PeerProtocolError(Refusal.MALFORMED, f"{EXPONENTS}: {exc}") from exc


def _scale_of(exponents: Mapping[str, int], name: str) -> np.float32 | None:
    """What undoes the sender's scale; None where there was none."""
    if not (exponent := exponents.get(name, 0)):
        return None
    if abs(exponent) > EXPONENT_LIMIT:
        raise PeerProtocolError(
            Refusal.MALFORMED, f"expected an exponent within ±{EXPONENT_LIMIT}, received {exponent}"
        )
    return np.float32(math.ldexp(1.0, -exponent))
