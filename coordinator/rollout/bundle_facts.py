"""What a campaign needs to know of a bundle, read from the bundle."""

from __future__ import annotations

from coordinator.rollout.records import BundleFacts
from wire.bundle import Bundle
from wire.signing import SignatureError, parse_signatures


def describe_bundle(data: bytes) -> BundleFacts:
    """Facts of a whole bundle; raises BundleError if it is damaged.

    ``signed_by`` is what the signature claims: devices check it with the keys that they hold.
    """
    bundle = Bundle.from_bytes(data)
    manifest = bundle.manifest
    return BundleFacts(
        digest=bundle.digest,
        size_bytes=len(data),
        name=manifest.name,
        version=manifest.version,
        input_shape=manifest.input.shape,
        classes=manifest.classes,
        frozen=manifest.frozen,
        signed_by=_claimed_keys(bundle.signature_file),
    )


def _claimed_keys(signature_file: bytes | None) -> str:
    if signature_file is None:
        return ""
    try:
        return ", ".join(signature.key for signature in parse_signatures(signature_file))
    except SignatureError:
        return "unreadable"
