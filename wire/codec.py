"""Tensor payloads: the safetensors format, written and read with one copy at most.

A payload is ``u64 header length (little endian) | JSON header, padded with spaces | tensor data``,
as https://github.com/huggingface/safetensors describes it. The safetensors library copies the
data two times when it writes and once when it reads; activations pass here on every step, so we
convert straight into the outgoing buffer and read views of the incoming one. Tests hold both
directions against the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from wire.errors import PeerProtocolError, Refusal

MAX_HEADER_BYTES = 1 << 20  # ours are below 10 KB; a hostile header must not cost memory
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One outgoing tensor: its type on the wire and a function that writes it into the buffer."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    write: Callable[[NDArray[Any]], None]


@dataclass(frozen=True, slots=True)
class Block:
    """Outgoing tensors of one type that one function writes, one behind the other by name.

    ``write`` gets all of their values as one flat array; ``split`` cuts it into theirs.
    """

    dtype: np.dtype[Any]
    shapes: Mapping[str, tuple[int, ...]]
    write: Callable[[NDArray[Any]], None]


Parts = Mapping[str, Part | Block]
"""What a message carries: parts by the name of their tensor, blocks by a name of no meaning."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """A decoded payload: text metadata and read-only views into the message's bytes.

    ``data`` are all bytes of the tensors, ``begins`` where in them each one begins.
    """

    metadata: dict[str, str]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    begins: dict[str, int] = field(default_factory=dict)

    def require(self, name: str) -> NDArray[Any]:
        """Return the tensor ``name``; raise PeerProtocolError when it is not there."""
        try:
            return self.arrays[name]
        except KeyError:
            found = ", ".join(sorted(self.arrays)[:8]) or "none"
            raise PeerProtocolError(
                Refusal.MALFORMED, f"expected a tensor {name!r}, received {found}"
            ) from None


def exact(array: NDArray[Any]) -> Part:
    """A part that carries ``array`` in its own type."""
    dtype = array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype
    if dtype not in _NAMES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}, received {array.dtype}")

    def write(out: NDArray[Any]) -> None:
        np.copyto(out, array)

    return Part(dtype=dtype, shape=array.shape, write=write)


def exact_block(arrays: Mapping[str, NDArray[Any]]) -> Block:
    """A block that carries arrays of one type in that type; at least one."""
    (dtype,) = {exact(array).dtype for array in arrays.values()}
    shapes = {name: array.shape for name, array in arrays.items()}

    def write(out: NDArray[Any]) -> None:
        for name, part in split(out, shapes).items():
            np.copyto(part, arrays[name])

    return Block(dtype=dtype, shapes=shapes, write=write)


def split(flat: NDArray[Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Views of ``flat`` (values,) as tensors of these shapes, one behind the other by name."""
    views, end = {}, 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name])
        views[name] = flat[begin:end].reshape(shapes[name])
    return views


def encode_tensors(parts: Parts, metadata: Mapping[str, str]) -> bytearray:
    """Encode parts as one safetensors payload; each tensor is written once, in place."""
    # Widest types first keeps every tensor aligned, as the library lays files out.
    order = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    places = []  # (part, where it begins, how many values)
    for key in order:
        part = parts[key]
        kind, itemsize, start = _NAMES[part.dtype], part.dtype.itemsize, end
        shapes = part.shapes if isinstance(part, Block) else {key: part.shape}
        for name in sorted(shapes):
            begin, end = end, end + math.prod(shapes[name]) * itemsize
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": (begin, end)}
        places.append((part, start, (end - start) // itemsize))
    head = msgspec.json.encode(header)
    head += b" " * (-len(head) % 8)
    out = bytearray(8 + len(head) + end)
    out[:8] = len(head).to_bytes(8, "little")
    out[8 : 8 + len(head)] = head
    for part, start, count in places:
        if count:
            view = np.frombuffer(out, part.dtype, count=count, offset=8 + len(head) + start)
            part.write(view if isinstance(part, Block) else view.reshape(part.shape))
    return out


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_header_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry_decoder = msgspec.json.Decoder(_Entry)
_metadata_decoder = msgspec.json.Decoder(dict[str, str])


def decode_tensors(payload: bytes | bytearray) -> Tensors:
    """Decode a safetensors payload into views of it; raise PeerProtocolError on any flaw.

    Sizes are checked against the payload before anything is built, so a lying header costs no
    memory. The views stay valid as long as the payload lives, which numpy sees to.
    """
    header, start = _split_header(payload)
    metadata = {}
    if (raw := header.pop("__metadata__", None)) is not None:
        metadata = _decode_json(_metadata_decoder, raw, "metadata")
    if len(header) > MAX_TENSORS:
        raise _malformed(f"expected at most {MAX_TENSORS} tensors, received {len(header)}")
    entries = {name: _decode_json(_entry_decoder, raw, name) for name, raw in header.items()}
    _check_layout(entries.values(), len(payload) - start)
    return Tensors(
        metadata=metadata,
        arrays={name: _view(payload, start, name, entry) for name, entry in entries.items()},
        data=_read_only(np.frombuffer(payload, np.uint8, offset=start)),
        begins={name: entry.data_offsets[0] for name, entry in entries.items()},
    )


def decode_metadata(payload: bytes | bytearray) -> dict[str, str]:
    """Decode only the text metadata, to judge a message before its tensors are looked at."""
    header, _ = _split_header(payload)
    raw = header.get("__metadata__")
    return {} if raw is None else _decode_json(_metadata_decoder, raw, "metadata")


def _split_header(payload: bytes | bytearray) -> tuple[dict[str, msgspec.Raw], int]:
    if len(payload) < 8:
        raise _malformed(f"expected at least 8 bytes, received {len(payload)}")
    size = int.from_bytes(payload[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(payload) - 8):
        raise _malformed(f"header length {size} does not fit a payload of {len(payload)} bytes")
    header = _decode_json(_header_decoder, payload[8 : 8 + size], "header")
    return header, 8 + size


def _decode_json(decoder: msgspec.json.Decoder[Any], raw: Any, what: str) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _malformed(f"{what}: {exc}") from exc


def _check_layout(entries: Iterable[_Entry], data_bytes: int) -> None:
    """Tensors fill the data without holes or overlaps, as the format demands."""
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.data_offsets):
        begin, end = entry.data_offsets
        if begin != position or end < begin:
            raise _malformed(f"tensor data must start at {position}, not {begin}")
        position = end
    if position != data_bytes:
        raise _malformed(f"tensors take {position} bytes, the payload holds {data_bytes}")


def _view(payload: bytes | bytearray, start: int, name: str, entry: _Entry) -> NDArray[Any]:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise PeerProtocolError(Refusal.DTYPE, f"tensor {name!r} has unknown type {entry.dtype!r}")
    if len(entry.shape) > MAX_DIMENSIONS or any(size < 0 for size in entry.shape):
        raise _malformed(f"tensor {name!r} has an impossible shape {entry.shape}")
    count = 1
    for size in entry.shape:
        count *= size
    begin, end = entry.data_offsets
    if count * dtype.itemsize != end - begin:
        raise _malformed(f"tensor {name!r} {entry.shape} does not fill {end - begin} bytes")
    flat = np.frombuffer(payload, dtype, count=count, offset=start + begin)
    return _read_only(flat).reshape(entry.shape)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _malformed(detail: str) -> PeerProtocolError:
    return PeerProtocolError(Refusal.MALFORMED, detail)
