"""``edge-agent bench``: what a bundle costs on each backend of this device."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from edge_agent.checking import FoundBundle, find_used_bundle, read_bundle
from edge_agent.config import AgentSettings, ComputeSettings
from edge_agent.measuring.compare import Comparison, compare_backends, list_contenders
from edge_agent.measuring.text import comparison_notes, comparison_table
from wire.bundle import Bundle
from wire.errors import ConfigError, ModelError

_FILE_WIDTH = 120


def run_bench(
    settings: AgentSettings | None,
    bundle_path: Path | None,
    batches: Sequence[int],
    *,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure and print. Raises ConfigError without a bundle, ModelError for one that no backend
    here can run."""
    compute = ComputeSettings() if settings is None else settings.compute
    if bundle_path is not None:
        found = read_bundle(bundle_path, sys.maxsize)
    else:
        found = _used_bundle(settings)
    contenders = list_contenders(found.bundle)
    if all(contender.problem for contender in contenders):
        problems = "; ".join(f"{c.name}: {c.problem}" for c in contenders)
        raise ModelError(f"{found.path}: no backend here can run it: {problems}")
    comparison = compare_backends(found.path, contenders, compute, batches=batches, rounds=rounds)
    if as_json:
        document = build_document(found.path, found.bundle, compute, comparison)
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    print(_title(found.path, found.bundle, compute))
    # Whole lines where the output goes to a file.
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False).print(
        comparison_table(comparison)
    )
    for note in comparison_notes(comparison):
        print(note)


def build_document(
    path: Path, bundle: Bundle, compute: ComputeSettings, comparison: Comparison
) -> dict[str, Any]:
    """All that was measured, as data; times in seconds, memory in bytes."""
    return {
        "bundle": str(path),
        "network": bundle.manifest.network,
        "cut": bundle.manifest.cut_layer,
        "threads": compute.threads,
        "max_batch_bytes": compute.max_batch_bytes,
        "start_s": comparison.start_s,
        "left_out": {c.name: c.problem for c in comparison.contenders if c.problem},
        "results": [result.to_json() for result in comparison.results],
    }


def _used_bundle(settings: AgentSettings | None) -> FoundBundle:
    if settings is None:
        raise ConfigError("expected --bundle FILE, or -c FILE of an agent that has had a bundle")
    found = find_used_bundle(settings)
    if found is None:
        raise ConfigError(
            f"expected a bundle in {settings.state_directory / 'bundles'}, or --bundle FILE"
        )
    return found


def _title(path: Path, bundle: Bundle, compute: ComputeSettings) -> str:
    manifest = bundle.manifest
    parameters = f"threads {compute.threads}, max_batch_bytes {compute.max_batch_bytes}"
    return f"{path}: {manifest.network} cut at {manifest.cut_layer}; {parameters}"
