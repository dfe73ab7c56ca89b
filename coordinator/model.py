"""From a run's settings to its network, cut in two, and the bundle that devices get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coordinator.config import RunSettings
from models.export import export_bundle
from models.registry import build_network, default_cut
from models.release import Release
from models.split import SplitNetwork, split_network
from models.verify import CHECK_BYTES
from wire.bundle import Bundle, bundle_digest, sign_bundle
from wire.errors import ConfigError
from wire.signing import build_signature_file, load_signing_key

BUNDLE_FILE = "client.bundle"


@dataclass(frozen=True, slots=True)
class RunModel:
    """The two segments and the client segment's bundle, as bytes and read."""

    split: SplitNetwork
    bundle: Bundle
    bundle_bytes: bytes

    @property
    def digest(self) -> str:
        return bundle_digest(self.bundle_bytes)


def build_split(
    settings: RunSettings, *, input_shape: tuple[int, ...], classes: int, source: str
) -> SplitNetwork:
    """Build the network, load its initial weights, cut it; ModelError or ConfigError if not."""
    network = settings.network
    module = build_network(
        network.name,
        input_shape=input_shape,
        classes=classes,
        arguments=network.arguments,
        seed=settings.seed,
    )
    if network.initial_weights is not None:
        _load_weights(module, network.initial_weights, source)
    cut = network.cut or default_cut(module)
    return split_network(module, cut, input_shape, network=network.name)


def export_split(
    settings: RunSettings,
    split: SplitNetwork,
    *,
    classes: int,
    samples: NDArray[np.float32] | None,
    name: str | None = None,
    version: str = "1",
    check_bytes: int = CHECK_BYTES,
    release: Release | None = None,
) -> bytes:
    """The client segment as a bundle, as the settings want it, checked on ``samples`` too where
    they fit it; raises ModelError naming the layer that stands in the way."""
    fits = samples is not None and samples.shape[1:] == split.input_shape
    return export_bundle(
        split,
        name=name or settings.run,
        version=version,
        classes=classes,
        frozen=settings.network.frozen,
        backward=settings.network.backward,
        global_batch=settings.global_batch,
        samples=samples if fits else None,
        check_bytes=check_bytes,
        release=release,
    )


def build_model(
    settings: RunSettings,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    source: str,
    samples: NDArray[np.float32] | None = None,
) -> RunModel:
    """Build, cut and export; a resumed run finds its bundle in its folder and keeps it.

    ``samples`` are real ones, (N, *input_shape), to check the bundle with.
    """
    sign = build_signer(settings.bundle_key, source=source)
    split = build_split(settings, input_shape=input_shape, classes=classes, source=source)
    path = settings.directory / BUNDLE_FILE
    release = Release(sign=sign)
    data = export_split(settings, split, classes=classes, samples=samples, release=release)
    bundle = Bundle.from_bytes(data)
    if path.exists():
        kept = path.read_bytes()
        if _same_content(Bundle.from_bytes(kept), bundle):
            if sign is not None:  # the same bytes again, unless the key is another one
                kept = sign_bundle(kept, sign)
            return RunModel(split=split, bundle=Bundle.from_bytes(kept), bundle_bytes=kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return RunModel(split=split, bundle=bundle, bundle_bytes=data)


def build_signer(
    path: str | None, *, source: str | None, field: str = "$.bundle_key"
) -> Callable[[bytes], bytes] | None:
    """What signs a manifest with a key file; None without one, ConfigError if it is none."""
    if path is None:
        return None
    try:
        key = load_signing_key(path)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.expected}", source=source, field=field) from exc
    return lambda manifest: build_signature_file(manifest, [key])


def _same_content(one: Bundle, other: Bundle) -> bool:
    """Equal in all but the time of export."""
    return one.manifest.files == other.manifest.files


def _load_weights(module: nn.Module, path: str, source: str) -> None:
    field = "$.network.initial_weights"
    try:
        tensors = load_file(Path(path))
    except (OSError, SafetensorError) as exc:
        raise ConfigError(
            f"expected a safetensors file at {path} ({exc})", source=source, field=field
        ) from exc
    try:
        module.load_state_dict(tensors)
    except RuntimeError as exc:
        raise ConfigError(
            f"expected the weights of network {type(module).__name__}: {exc}",
            source=source,
            field=field,
        ) from exc


def limit_threads(threads: int | None) -> None:
    """Limit PyTorch's threads in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
