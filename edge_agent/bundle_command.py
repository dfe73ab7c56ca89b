"""``edge-agent bundle show`` and ``verify``: what a bundle file is, and whether it may be used."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.admission import check_manifest
from edge_agent.config import ComputeSettings
from edge_agent.journal import Journal
from edge_agent.self_test import Job, Outcome, SelfTest
from wire import __version__
from wire.bundle import Bundle, Manifest, TensorSpec
from wire.errors import ConfigError, ModelError
from wire.signing import SignatureError, TrustedKeys, parse_signatures

POLL_S = 0.05

Report = dict[str, Any]


def read_bundle_file(path: Path, *, max_bytes: int) -> bytes:
    """The file's bytes; ConfigError if it cannot be read, ModelError if it is too large."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelError(f"{path}: expected at most {max_bytes} bytes, found {size}")
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"expected a bundle ({exc.strerror})", source=path) from exc


def show_bundle(path: Path, *, max_bytes: int) -> Report:
    """What a bundle says of itself; its files are held against their hashes, signatures are not
    checked. Raises ModelError for a file that is none."""
    data = read_bundle_file(path, max_bytes=max_bytes)
    return _describe(_parse(path, data, max_bytes, None), len(data))


def verify_bundle_file(
    path: Path,
    *,
    max_bytes: int,
    trust: TrustedKeys | None,
    compute: ComputeSettings | None,
    memory_bytes: int,
    limit_s: float,
) -> Report:
    """All that an agent checks before it uses a bundle; raises ModelError with what is wrong.

    Without ``trust`` signatures are not checked, without ``compute`` the self-test is left out.
    """
    data = read_bundle_file(path, max_bytes=max_bytes)
    bundle = _parse(path, data, max_bytes, trust)
    try:
        check_manifest(
            bundle.manifest,
            Journal(),
            now=datetime.now(UTC),
            agent_version=__version__,
            check_sequence=False,
        )
    except ModelError as exc:
        raise ModelError(f"{path}: {exc}") from exc
    report = _describe(bundle, len(data)) | {"signed_by": bundle.signed_by, "self_test": None}
    if compute is None:
        return report
    outcome = _run_self_test(bundle, compute, memory_bytes, limit_s)
    if outcome.report is None:
        raise ModelError(f"{path}: {outcome.failure}")
    return report | {"self_test": msgspec.to_builtins(outcome.report)}


def _run_self_test(
    bundle: Bundle, compute: ComputeSettings, memory_bytes: int, limit_s: float
) -> Outcome:
    job = Job(bundle, compute, memory_bytes)
    test = SelfTest(job, limit_s=limit_s, now_s=time.monotonic(), wake=lambda: None)
    try:
        while (outcome := test.poll(time.monotonic())) is None:
            time.sleep(POLL_S)
    finally:
        test.kill()
    return outcome


def _parse(path: Path, data: bytes, max_bytes: int, trust: TrustedKeys | None) -> Bundle:
    try:
        return Bundle.from_bytes(data, max_bytes=max_bytes, trust=trust)
    except ModelError as exc:
        raise ModelError(f"{path}: {exc}") from exc


def _describe(bundle: Bundle, size_bytes: int) -> Report:
    return {
        "digest": bundle.digest,
        "size_bytes": size_bytes,
        "signatures": _claimed_keys(bundle),
        "manifest": msgspec.to_builtins(bundle.manifest),
    }


def _claimed_keys(bundle: Bundle) -> list[str]:
    """Ids of the keys that ``manifest.sig`` names; unchecked."""
    if bundle.signature_file is None:
        return []
    try:
        return [entry.key for entry in parse_signatures(bundle.signature_file)]
    except SignatureError:
        return ["unreadable"]


def bundle_lines(report: Report) -> Iterator[tuple[str, str]]:
    """The report for people."""
    manifest = msgspec.convert(report["manifest"], Manifest)
    trained = "frozen" if manifest.frozen else "trained on the devices"
    yield "bundle", f"{manifest.name} {manifest.version}, {report['size_bytes']} bytes"
    yield "digest", f"sha256 {report['digest']}"
    yield "created", f"{manifest.created}, sequence {manifest.sequence}"
    yield "expires", manifest.expires or "never"
    yield "agent", f"{manifest.minimum_agent} or later" if manifest.minimum_agent else "any"
    yield "network", f"{manifest.network} cut at {manifest.cut_layer}, {trained}"
    yield "sample", f"{_shape(manifest.input.shape)}, {manifest.classes} classes"
    yield "activation", _shape(manifest.activation.shape)
    yield "parameters", _count(manifest.parameters)
    yield "buffers", _count(manifest.buffers)
    yield "golden", f"{manifest.golden.batch} samples" if manifest.golden else "none"
    for name, entry in manifest.files.items():
        yield "file", f"{name}, {entry.size_bytes} bytes, sha256 {entry.sha256[:16]}"
    yield "signatures", _signatures(report)
    if report.get("self_test"):
        yield "self-test", _self_test(report["self_test"])


def _signatures(report: Report) -> str:
    if report.get("signed_by"):
        return f"good, by key {report['signed_by']}"
    if not report["signatures"]:
        return "none: only agents without bundle_keys take it"
    return f"not checked; claims to be by {', '.join(report['signatures'])}"


def _self_test(report: Report) -> str:
    text = f"passed in {report['seconds']:.3f} s, {report['peak_bytes'] / 1e6:.1f} MB"
    if report["max_error"] is not None:
        text += f", off by {report['max_error']:.2g}"
    if report["gradient_error"] is not None:
        text += f", gradients by {report['gradient_error']:.2g} of their norm"
    return text


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _count(specs: tuple[TensorSpec, ...]) -> str:
    return f"{sum(math.prod(spec.shape) for spec in specs)} values in {len(specs)} tensors"
