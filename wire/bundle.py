"""A bundle: one client segment with everything that a device needs to run it, in one zip file.

The archive is stored (not compressed, so that nothing can swell), with fixed timestamps and sorted
names: the same parts give the same bytes. ``manifest.json`` lists every other file with its size
and SHA-256, and ``manifest.sig`` signs the manifest (``wire.signing``).
``client_backward.onnx`` is there if devices without torch can train the segment, and beside it the
same in two halves, for those that have the memory to keep values between the two passes.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from wire.codec import decode_tensors, encode_tensors, exact
from wire.errors import ModelError, PeerProtocolError

BUNDLE_SCHEMA: Final = 1
DEFAULT_MAX_BYTES: Final = 256 * 1024 * 1024

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
CLIENT_FORWARD: Final = "client_forward.onnx"
CLIENT_BACKWARD: Final = "client_backward.onnx"
CLIENT_FORWARD_KEPT: Final = "client_forward_kept.onnx"
CLIENT_BACKWARD_KEPT: Final = "client_backward_kept.onnx"
CLIENT_TORCH: Final = "client_torch.json"
WEIGHTS: Final = "weights.safetensors"
GOLDEN: Final = "golden.safetensors"
REQUIRED_FILES: Final = (CLIENT_FORWARD, CLIENT_TORCH, WEIGHTS)

_MAX_FILES = 64
_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,  # a compression or zip version that we lack
    RuntimeError,  # encrypted
    OSError,
    EOFError,
    ValueError,
    struct.error,
)


class BundleError(ModelError):
    """A bundle that is damaged, incomplete or of another schema; nothing of it was used."""


class ArraySpec(msgspec.Struct, frozen=True, kw_only=True):
    """One sample's shape, without the batch dimension, and its type."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter or buffer under its own name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of the archive must be."""

    size_bytes: int
    sha256: str


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison made at export: how large a difference, and what was allowed.

    ``measure`` is ``largest`` for the largest absolute difference of a value, ``norm`` for the norm
    of all differences; ``data`` is ``random`` or ``real`` samples.
    """

    what: str
    batch: int
    difference: float
    tolerance: float
    measure: str = "largest"
    data: str = "random"


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """How near a device must come to ``golden.safetensors`` (see ``docs/bundles.md``).

    ``tolerance`` is the largest absolute difference of an activation, ``gradient_tolerance`` the
    largest relative one of a parameter gradient's norm.
    """

    batch: int
    tolerance: float
    gradient_tolerance: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the bundle holds. Unknown fields are skipped, so that later versions can add some.

    ``forward_bytes_per_sample`` and ``backward_bytes_per_sample`` estimate the memory of the
    intermediate values; micro-batches are cut by them. ``onnx_backward_bytes_per_sample`` is the
    same for ``client_backward.onnx``, ``onnx_kept_bytes_per_sample`` what is kept between its two
    halves; both are 0 without these files. ``opset`` is that of all graphs.
    ``sequence`` grows with every release under one ``name``: a device that has had one refuses
    those before it. ``created`` and ``expires`` are times as in RFC 3339, ``expires`` empty for
    never. ``minimum_agent`` is the oldest agent that can run the bundle, empty for any.
    """

    schema: int = BUNDLE_SCHEMA
    name: str
    version: str
    created: str
    network: str
    cut_layer: str
    classes: int
    frozen: bool
    input: ArraySpec
    activation: ArraySpec
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...] = ()
    opset: int
    files: dict[str, FileEntry] = {}
    forward_bytes_per_sample: int
    backward_bytes_per_sample: int
    onnx_backward_bytes_per_sample: int = 0
    onnx_kept_bytes_per_sample: int = 0
    sequence: int = 0
    expires: str = ""
    minimum_agent: str = ""
    golden: Golden | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


class _Schema(msgspec.Struct, frozen=True):
    schema: int


class Trust(Protocol):
    """Who may have made a bundle: ``wire.signing.TrustedKeys``."""

    def check(self, manifest: bytes, signature_file: bytes | None) -> str:
        """The id of the key that signed these bytes; raises ModelError if none has."""


@dataclass(frozen=True, slots=True)
class GoldenValues:
    """B golden samples, the activations A that they give, and the norms of the P parameters'
    gradients when the gradient at the cut is ``activations_BA``."""

    spec: Golden
    input_BX: NDArray[Any]
    activations_BA: NDArray[Any]
    gradient_norms_P: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle; ``digest`` is the SHA-256 of its bytes in hexadecimal.

    ``signed_by`` is the id of the trusted key, None where signatures were not checked;
    ``signature_file`` is ``manifest.sig`` as it came.
    """

    manifest: Manifest
    digest: str
    files: Mapping[str, bytes]
    signed_by: str | None = None
    signature_file: bytes | None = None

    @classmethod
    def from_bytes(
        cls, data: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES, trust: Trust | None = None
    ) -> Bundle:
        """Read a bundle of at most ``max_bytes``; raise BundleError before any part is used.

        With ``trust``, SignatureError unless it is signed: the manifest is not even read before.
        """
        files = _read_archive(data, max_bytes)
        raw_manifest = files.pop(MANIFEST)
        signature_file = files.pop(SIGNATURE, None)
        signed_by = None if trust is None else trust.check(raw_manifest, signature_file)
        manifest = _parse_manifest(raw_manifest)
        _verify_files(manifest, files)
        return cls(
            manifest=manifest,
            digest=bundle_digest(data),
            files=files,
            signed_by=signed_by,
            signature_file=signature_file,
        )

    def initial_weights(self) -> dict[str, NDArray[Any]]:
        """Parameters and buffers by name, as read-only views; raise BundleError if they differ
        from the manifest."""
        try:
            arrays = decode_tensors(self.files[WEIGHTS]).arrays
        except PeerProtocolError as exc:
            raise BundleError(f"{WEIGHTS}: {exc.detail}") from exc
        specs = (*self.manifest.parameters, *self.manifest.buffers)
        for spec in specs:
            array = arrays.get(spec.name)
            if array is None or (array.shape, array.dtype.name) != (spec.shape, spec.dtype):
                found = "nothing" if array is None else f"{array.dtype.name} {array.shape}"
                raise BundleError(
                    f"{WEIGHTS}: {spec.name}: expected {spec.dtype} {spec.shape}, found {found}"
                )
        return {spec.name: arrays[spec.name] for spec in specs}

    def golden_values(self) -> GoldenValues | None:
        """The self-test's samples and results, None without any; BundleError if they are off."""
        spec, data = self.manifest.golden, self.files.get(GOLDEN)
        if spec is None or data is None:
            return None
        shapes = {
            "input": (spec.batch, *self.manifest.input.shape),
            "activations": (spec.batch, *self.manifest.activation.shape),
            "gradient_norms": (len(self.manifest.parameters),),
        }
        try:
            tensors = decode_tensors(data).arrays
        except PeerProtocolError as exc:
            raise BundleError(f"{GOLDEN}: {exc.detail}") from exc
        for name, shape in shapes.items():
            array = tensors.get(name)
            if array is None or (array.shape, array.dtype.name) != (shape, "float32"):
                raise BundleError(f"{GOLDEN}: {name}: expected float32 {shape}")
        return GoldenValues(
            spec, tensors["input"], tensors["activations"], tensors["gradient_norms"]
        )


def bundle_digest(data: bytes) -> str:
    """A bundle's identity: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode_weights(weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Parameters and buffers as the bundle's ``weights.safetensors``."""
    parts = {name: exact(np.ascontiguousarray(array)) for name, array in weights.items()}
    return bytes(encode_tensors(parts, {}))


def build_bundle(
    manifest: Manifest,
    files: Mapping[str, bytes],
    *,
    sign: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """Pack a bundle; the manifest's ``files`` are filled in from ``files``.

    ``sign`` makes ``manifest.sig`` from the manifest's bytes.
    """
    entries = {
        name: FileEntry(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    }
    manifest = msgspec.structs.replace(manifest, files=entries)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    signature = {} if sign is None else {SIGNATURE: sign(text)}
    return _write_archive({**files, **signature, MANIFEST: text})


def sign_bundle(data: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """The bundle with ``manifest.sig`` (again) made by ``sign``; the rest stays as it is."""
    Bundle.from_bytes(data, max_bytes=len(data))
    files = _read_archive(data, len(data))
    return _write_archive({**files, SIGNATURE: sign(files[MANIFEST])})


def _write_archive(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression=zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=_TIMESTAMP)
            entry.create_system = 3  # Unix, wherever we run
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return out.getvalue()


def _read_archive(data: bytes, max_bytes: int) -> dict[str, bytes]:
    """Every file of the archive, after checks that cost no memory beyond ``data`` itself."""
    if len(data) > max_bytes:
        raise BundleError(f"expected a bundle of at most {max_bytes} bytes, found {len(data)}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_directory(archive.infolist(), len(data))
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except _ZIP_ERRORS as exc:
        raise BundleError(f"expected a whole zip archive ({exc})") from exc
    if MANIFEST not in files:
        raise BundleError(f"expected a file {MANIFEST} in the bundle")
    return files


def _check_directory(entries: list[zipfile.ZipInfo], data_bytes: int) -> None:
    if len(entries) > _MAX_FILES:
        raise BundleError(f"expected at most {_MAX_FILES} files in a bundle, found {len(entries)}")
    names = [entry.filename for entry in entries]
    if bad := next((name for name in names if not _FILE_NAME.fullmatch(name)), None):
        raise BundleError(f"{bad!r}: expected a plain file name")
    if len(set(names)) != len(names):
        raise BundleError("expected each file name once in the bundle")
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise BundleError(f"{packed[0]}: expected a stored file, found a compressed one")
    # Stored files cannot be larger together than the archive, unless they overlap or lie.
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > data_bytes:
        raise BundleError(f"the files claim more bytes than the bundle's {data_bytes}")


def _parse_manifest(raw: bytes) -> Manifest:
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST}: expected at most {_MAX_MANIFEST_BYTES} bytes")
    try:
        schema = msgspec.json.decode(raw, type=_Schema).schema
        if schema != BUNDLE_SCHEMA:
            raise BundleError(f"{MANIFEST}: expected schema {BUNDLE_SCHEMA}, found {schema}")
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BundleError(f"{MANIFEST}: {exc}") from exc


def _verify_files(manifest: Manifest, files: Mapping[str, bytes]) -> None:
    for name in (*REQUIRED_FILES, *manifest.files):
        if name not in files:
            raise BundleError(f"expected a file {name} in the bundle")
    for name, data in files.items():
        entry = manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{name}: not listed in {MANIFEST}")
        if len(data) != entry.size_bytes:
            raise BundleError(f"{name}: expected {entry.size_bytes} bytes, found {len(data)}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{name}: its content differs from the SHA-256 in {MANIFEST}")
