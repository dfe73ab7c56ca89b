"""Ed25519 signatures over a bundle's manifest, and the key files.

The manifest names every other file with its SHA-256, so a signature over the manifest's bytes
covers the bundle. ``manifest.sig`` is JSON: ``{"schema": 1, "signatures": [{"key", "signature"}]}``
with the signature in base64; several signatures let a fleet change its key. A key's id is the
beginning of the SHA-256 of its 32 public bytes. Key files are PEM, as OpenSSL writes them.

Only those who sign or check signatures need the library ``cryptography``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from wire.credentials import secret_path
from wire.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_SCHEMA: Final = 1
MAX_SIGNATURES: Final = 8
_KEY_BYTES: Final = 32
_MAX_KEY_FILE_BYTES: Final = 16 * 1024


class SignatureError(ModelError):
    """A bundle that no trusted key has signed as it is."""


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature over the manifest's bytes: 64 bytes, in base64."""

    key: str
    signature: str


class SignatureFile(msgspec.Struct, frozen=True, kw_only=True):
    """``manifest.sig``."""

    schema: int
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(max_length=MAX_SIGNATURES)]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with; ``raw`` has 32 bytes."""

    raw: bytes

    @property
    def key_id(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The key in base64, as an agent's settings may hold it."""
        return base64.b64encode(self.raw).decode()

    def has_signed(self, data: bytes, signature: bytes) -> bool:
        """Whether this key made ``signature`` over ``data``."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - see above

        try:
            _ed25519().Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError):  # wrong, or not a signature at all
            return False
        return True


@dataclass(frozen=True, slots=True)
class SigningKey:
    """The private half."""

    private: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.private.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> Signature:
        signature = base64.b64encode(self.private.sign(data)).decode()
        return Signature(key=self.public.key_id, signature=signature)


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """The keys whose bundles a device accepts; at least one."""

    keys: tuple[PublicKey, ...]

    def check(self, manifest: bytes, signature_file: bytes | None) -> str:
        """The id of the trusted key that signed ``manifest``; raise SignatureError if none did."""
        if signature_file is None:
            raise SignatureError("expected a signed bundle, found no manifest.sig in it")
        trusted = {key.key_id: key for key in self.keys}
        signatures = parse_signatures(signature_file)
        for entry in signatures:
            key = trusted.get(entry.key)
            if key is not None and key.has_signed(manifest, _decode_base64(entry.signature)):
                return entry.key
        found = ", ".join(entry.key[:16] for entry in signatures) or "none"
        if any(entry.key in trusted for entry in signatures):
            raise SignatureError(f"manifest.sig: key {found} did not sign this manifest")
        raise SignatureError(
            f"manifest.sig: expected a signature of key {', '.join(trusted)}, found {found}"
        )


def parse_signatures(signature_file: bytes) -> tuple[Signature, ...]:
    """What ``manifest.sig`` claims, unchecked; raise SignatureError if it cannot be read."""
    try:
        parsed = msgspec.json.decode(signature_file, type=SignatureFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise SignatureError(f"manifest.sig: {exc}") from exc
    if parsed.schema != SIGNATURE_SCHEMA:
        raise SignatureError(
            f"manifest.sig: expected schema {SIGNATURE_SCHEMA}, found {parsed.schema}"
        )
    return parsed.signatures


def build_signature_file(manifest: bytes, keys: Iterable[SigningKey]) -> bytes:
    """``manifest.sig`` for the manifest's bytes."""
    signatures = tuple(key.sign(manifest) for key in keys)
    return msgspec.json.encode(SignatureFile(schema=SIGNATURE_SCHEMA, signatures=signatures))


# Keys


def generate_key() -> SigningKey:
    """A new key."""
    return SigningKey(_ed25519().Ed25519PrivateKey.generate())


def write_key_pair(key: SigningKey, private_path: Path, public_path: Path) -> None:
    """Write both halves as PEM, the private one for its owner alone (0600).

    Raises ConfigError if a file is there already: a key that bundles are signed with must not be
    lost to a slip.
    """
    serialization = _serialization()
    private = key.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for path in (private_path, public_path):
        if path.exists():
            raise ConfigError("expected no file here: a key is never overwritten", source=path)
    _write_new(private_path, private, 0o600)
    _write_new(public_path, public, 0o644)


def load_signing_key(path: str | Path, *, field: str | None = None) -> SigningKey:
    """Read a private key file, or ``credential:NAME``; raise ConfigError naming it."""
    raw = _read_key_file(str(path), field)
    try:
        private = _serialization().load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, _unsupported()) as exc:
        raise ConfigError(
            "expected an Ed25519 private key in PEM, without a password", source=path, field=field
        ) from exc
    if not isinstance(private, _ed25519().Ed25519PrivateKey):
        raise ConfigError("expected an Ed25519 private key", source=path, field=field)
    return SigningKey(private)


def load_public_key(text: str, *, field: str | None = None) -> PublicKey:
    """A public key from a PEM file's path, or from the key itself in base64."""
    raw = _decode_base64(text)
    if len(raw) == _KEY_BYTES:
        return PublicKey(raw)
    data = _read_key_file(text, field)
    try:
        public = _serialization().load_pem_public_key(data)
    except (ValueError, TypeError, _unsupported()) as exc:
        raise ConfigError(
            "expected an Ed25519 public key in PEM", source=text, field=field
        ) from exc
    if not isinstance(public, _ed25519().Ed25519PublicKey):
        raise ConfigError("expected an Ed25519 public key", source=text, field=field)
    return PublicKey(public.public_bytes_raw())


def load_trusted_keys(
    texts: Iterable[str], *, source: str | None = None, field: str = "$.bundle_keys"
) -> TrustedKeys | None:
    """The keys that settings name, by file or inline; None when there are none."""
    keys = []
    for number, text in enumerate(texts):
        place = f"{field}[{number}]"
        try:
            keys.append(load_public_key(text, field=place))
        except ConfigError as exc:
            where = "" if exc.source is None else f"{exc.source}: "
            raise ConfigError(f"{where}{exc.expected}", source=source, field=place) from exc
    return TrustedKeys(tuple(keys)) if keys else None


def _read_key_file(text: str, field: str | None) -> bytes:
    path = secret_path(text, field=field or "")
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_FILE_BYTES)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ConfigError(
            f"expected a readable key file ({reason})", source=path, field=field
        ) from exc


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise ConfigError(f"expected a writable place ({exc.strerror})", source=path) from exc


def _decode_base64(text: str) -> bytes:
    """The bytes, or none of them where the text is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(
            "expected the library cryptography to be installed, for bundle keys "
            f"(pip install 'splitfleet[agent]'): {exc}"
        ) from exc
    return ed25519


def _serialization() -> Any:
    _ed25519()  # says what to install
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    return serialization


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415

    return UnsupportedAlgorithm
