"""What ``edge-agent check`` finds: settings, data, backends, a bundle's cost, the broker."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.compute import ComputeBackend, choose_backward
from edge_agent.config import AgentSettings
from edge_agent.datasets import LabelledData, load_data
from edge_agent.measuring.capacity import find_capacity
from edge_agent.measuring.limits import MemoryLimits, memory_limits
from edge_agent.measuring.memory import available_bytes
from edge_agent.measuring.text import format_bytes, format_milliseconds
from edge_agent.measuring.timing import time_steps
from edge_agent.slots import find_file_in_use
from edge_agent.start import build_settings_backend
from edge_agent.worker import Worker
from wire.brief_connection import brief_connection
from wire.bundle import Bundle
from wire.errors import ConfigError, ModelError, TransportError
from wire.exit_codes import ExitCode
from wire.signing import load_trusted_keys
from wire.topics import build_client_id

BROKER_TIMEOUT_S = 5.0
TIMED_BATCH = 16
TIMED_S = 0.5

Report = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBundle:
    """A bundle and where it was found."""

    bundle: Bundle
    path: Path


def check_device(
    settings: AgentSettings, *, source: str, bundle_path: Path | None = None
) -> Report:
    """Facts about this device, what a bundle costs here, and whether the broker answers.

    Without ``bundle_path`` it is the one that the agent used last. Raises ConfigError for settings
    or data that cannot be used, ModelError for a bundle of ``bundle_path`` that is none.
    """
    data = load_data(settings.data, source=source)
    backend = build_settings_backend(settings)
    if bundle_path is not None:
        found: FoundBundle | None = read_bundle(bundle_path, settings.max_bundle_bytes)
    else:
        found = find_used_bundle(settings)
    trust = load_trusted_keys(settings.bundle_keys, source=source)
    failure = _try_broker(settings)
    return {
        "device": settings.device,
        "fleet": settings.fleet,
        "samples": len(data),
        "sample_shape": list(data.sample_shape),
        "label_counts": data.label_counts.tolist(),
        **_describe_backend(settings, backend),
        **_describe_bundle(settings, backend, data, found),
        "bundle_keys": [] if trust is None else [key.key_id for key in trust.keys],
        "broker": f"{settings.mqtt.host}:{settings.mqtt.port}",
        "broker_reachable": failure is None,
        "broker_failure": failure or "",
    }


def exit_code_of(report: Report) -> ExitCode:
    """A bundle that cannot be used counts before a broker that does not answer."""
    if report["bundle_problem"]:
        return ExitCode.DATA
    return ExitCode.OK if report["broker_reachable"] else ExitCode.UNAVAILABLE


def read_bundle(path: Path, max_bytes: int) -> FoundBundle:
    """The bundle in a file; raises ConfigError if it cannot be read, ModelError if it is none."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"expected a bundle ({exc.strerror})", source=path) from exc
    try:
        return FoundBundle(bundle=Bundle.from_bytes(data, max_bytes=max_bytes), path=path)
    except ModelError as exc:
        raise ModelError(f"{path}: {exc}") from exc


def find_used_bundle(settings: AgentSettings) -> FoundBundle | None:
    """The bundle in use, else the newest in the state directory; damaged ones are skipped."""
    directory = settings.state_directory / "bundles"
    in_use = find_file_in_use(directory)
    for path in [*([in_use] if in_use else []), *_newest_first(directory)]:
        try:
            return read_bundle(path, settings.max_bundle_bytes)
        except (ConfigError, ModelError):  # removed by the agent meanwhile, or damaged
            continue
    return None


def _newest_first(directory: Path) -> list[Path]:
    aged = []
    for path in directory.glob("*.bundle"):
        try:
            aged.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return [path for _, path in sorted(aged, reverse=True)]


def _describe_backend(settings: AgentSettings, backend: ComputeBackend) -> Report:
    compute = settings.compute
    return {
        "forward": backend.forward_name,
        "backward": backend.backward_name,
        "backward_reason": choose_backward(compute.backward).why,
        "onnxruntime": _version("onnxruntime"),
        "torch": _version("torch"),
        "threads": compute.threads,
        "max_batch": compute.max_batch,
        "max_batch_bytes": compute.max_batch_bytes,
        "memory_available_bytes": available_bytes(),
        "memory_limits": memory_limits().value,
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_bundle(
    settings: AgentSettings, backend: ComputeBackend, data: LabelledData, found: FoundBundle | None
) -> Report:
    """What the bundle costs on this device; None throughout without one that can be used."""
    names = (
        *("bundle", "bundle_network", "bundle_cut", "bundle_frozen"),
        *("forward_pass_samples", "backward_pass_samples", "largest_batch", "largest_batch_limit"),
        *("timed_batch", "forward_s", "backward_s", "samples_per_s"),
    )
    report: Report = {**dict.fromkeys(names), "bundle_problem": ""}
    if found is None:
        return report
    manifest = found.bundle.manifest
    report |= {
        "bundle": str(found.path),
        "bundle_network": manifest.network,
        "bundle_cut": manifest.cut_layer,
        "bundle_frozen": manifest.frozen,
    }
    try:
        Worker(data, backend).install(found.bundle)
        return report | _measure_bundle(settings, backend, found.bundle, len(data))
    except (ModelError, ConfigError) as exc:
        return report | {"bundle_problem": str(exc)}


def _measure_bundle(
    settings: AgentSettings, backend: ComputeBackend, bundle: Bundle, samples: int
) -> Report:
    manifest, compute = bundle.manifest, settings.compute
    capacity = find_capacity(
        manifest,
        samples=samples,
        available_bytes=available_bytes(),
        pass_bytes=compute.max_batch_bytes,
        max_payload_bytes=settings.mqtt.max_payload_bytes,
        max_batch=compute.max_batch,
    )
    batch = max(1, min(TIMED_BATCH, capacity.largest_batch))
    times = time_steps(backend, manifest, batch, at_least_s=TIMED_S, warm_up=2)
    trains = backend.can_backward and not manifest.frozen
    return {
        "forward": backend.forward_name,  # loading may have changed what auto means
        "forward_pass_samples": backend.forward_pass_samples,
        "backward_pass_samples": backend.backward_pass_samples if trains else None,
        "largest_batch": capacity.largest_batch,
        "largest_batch_limit": capacity.limit,
        "timed_batch": batch,
        "forward_s": times.forward_median_s,
        "backward_s": times.backward_median_s,
        "samples_per_s": batch / times.step_median_s,
    }


def check_lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The report for people: what it is about, and what was found."""
    yield "device", f"{report['device']} in fleet {report['fleet']}"
    shape = "x".join(map(str, report["sample_shape"]))
    yield "samples", f"{report['samples']} of shape {shape}; per class {report['label_counts']}"
    yield "forward", str(report["forward"])
    yield "backward", f"{report['backward']}: {report['backward_reason']}"
    for library in ("onnxruntime", "torch"):
        yield library, report[library] or "not installed"
    yield "threads", str(report["threads"])
    yield "memory of one pass", f"{format_bytes(report['max_batch_bytes'])} (max_batch_bytes)"
    available = report["memory_available_bytes"]
    if available is not None:
        note = " - less than one pass may take" if available < report["max_batch_bytes"] else ""
        yield "memory available", format_bytes(available) + note
    if report["memory_limits"] == MemoryLimits.IGNORED:
        yield (
            "memory limits",
            "ignored by this kernel (cgroup_disable=memory)",
        )
    yield from _bundle_lines(report)
    keys = ", ".join(report["bundle_keys"])
    yield "bundle keys", keys or "none: unsigned bundles are accepted, for a lab"
    if report["broker_reachable"]:
        yield "broker", f"{report['broker']} answers"
    else:
        yield "broker", f"{report['broker']}: {report['broker_failure']}"


def _bundle_lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report["bundle"] is None:
        yield "bundle", "none here yet; --bundle FILE tells what one costs on this device"
        return
    kind = "frozen" if report["bundle_frozen"] else "trains"
    yield "bundle", report["bundle"]
    yield "segment", f"{report['bundle_network']} cut at {report['bundle_cut']}, {kind}"
    if report["bundle_problem"]:
        yield "cannot be used", report["bundle_problem"]
        return
    passes = f"forward {report['forward_pass_samples']}"
    if report["backward_pass_samples"] is not None:
        passes += f", backward {report['backward_pass_samples']}"
    yield "samples in a pass", passes
    yield "largest batch", f"{report['largest_batch']} (limit: {report['largest_batch_limit']})"
    times = f"forward {format_milliseconds(report['forward_s'])}"
    if report["backward_s"] is not None:
        times += f", backward {format_milliseconds(report['backward_s'])}"
    yield f"time, batch {report['timed_batch']}", times
    yield "samples a second", f"{report['samples_per_s']:.0f}"


def _try_broker(settings: AgentSettings) -> str | None:
    """Connect under another client id, so that a running agent keeps its connection."""
    client_id = build_client_id(settings.fleet, settings.device, purpose="check")
    try:
        with brief_connection(
            settings.mqtt, client_id=client_id, fleet=settings.fleet, timeout_s=BROKER_TIMEOUT_S
        ):
            return None
    except TransportError as exc:
        return str(exc)
