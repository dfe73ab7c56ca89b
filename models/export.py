"""Export of a client segment as a bundle, verified on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from models.golden import build_golden
from models.memory import estimate_graph_bytes, estimate_memory, measure_kept_bytes
from models.onnx_graph import OPSET, program_to_onnx, program_to_onnx_backward
from models.program import SegmentProgram, program_to_graph, trace_program
from models.release import Release
from models.split import SplitNetwork, reproducible
from models.verify import CHECK_BYTES, verify_bundle
from wire.bundle import (
    CLIENT_BACKWARD,
    CLIENT_FORWARD,
    CLIENT_FORWARD_KEPT,
    CLIENT_TORCH,
    GOLDEN,
    WEIGHTS,
    ArraySpec,
    Bundle,
    Check,
    Manifest,
    TensorSpec,
    build_bundle,
    encode_weights,
)
from wire.errors import ModelError
from wire.segment_graph import SegmentGraph, encode_segment_graph

_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_USE_INSTEAD = (
    "takes its statistics from each device's own batches; use GroupNorm or LayerNorm, call eval() "
    "on the layer to keep its statistics as they are, or freeze the client segment"
)


def export_bundle(
    split: SplitNetwork,
    *,
    name: str,
    version: str,
    classes: int,
    frozen: bool = False,
    backward: str = "onnx",
    created: str | None = None,
    global_batch: int | None = None,
    samples: NDArray[np.float32] | None = None,
    check_bytes: int = CHECK_BYTES,
    release: Release | None = None,
) -> bytes:
    """The client segment of ``split`` as a bundle: ONNX, torch form, weights, manifest.

    ``frozen`` segments are run but not trained. ``backward`` is ``onnx``, or ``torch`` to leave out
    the backward graph for a fleet whose devices all have PyTorch. ``created`` is a timestamp, now
    by default. The forms are compared at small batches and at ``global_batch``, as far as
    ``check_bytes`` of intermediate values allow, on random numbers and on real ``samples``.
    Raises ModelError naming the layer that a device could not run or train faithfully.
    """
    if split.output_shape != (classes,):
        raise ModelError(
            f"network {split.network}: expected logits of shape ({classes},) for {classes} "
            f"classes, found {split.output_shape}"
        )
    if not frozen:
        _check_trainable(split)
    with reproducible():
        program = trace_program(split)
        files = _files(split, program, frozen=frozen, backward=backward)
        golden, files[GOLDEN] = build_golden(split, program)
        manifest = Manifest(
            name=name,
            version=version,
            created=created or datetime.now(UTC).isoformat("T", "seconds"),
            classes=classes,
            frozen=frozen,
            golden=golden,
            **_describe(split, program, files),
        )
        release = release or Release()
        manifest = release.stamp(manifest)
        bundle = Bundle.from_bytes(build_bundle(manifest, files))
        checks = verify_bundle(
            split, bundle, global_batch=global_batch, samples=samples, check_bytes=check_bytes
        )
    notes = (*manifest.notes, *_shortfall(checks, global_batch))
    manifest = msgspec.structs.replace(manifest, checks=checks, notes=notes)
    return build_bundle(manifest, files, sign=release.sign)


def _files(
    split: SplitNetwork, program: SegmentProgram, *, frozen: bool, backward: str
) -> dict[str, bytes]:
    """All files but the manifest; raises ModelError for a segment that cannot be trained."""
    what = f"network {split.network}: cut layer {split.cut_layer}: client segment"
    graph = program_to_graph(program)
    if not frozen:
        _check_graph_trainable(graph, split, what)
        if not program.parameters:
            raise ModelError(f"{what}: no parameter of it trains: freeze it")
    files = {}
    if not frozen and backward == "onnx":  # first: it is quick, and refuses most
        files.update(program_to_onnx_backward(program, what))
    return files | {
        CLIENT_FORWARD: program_to_onnx(program, what),
        CLIENT_TORCH: encode_segment_graph(graph),
        WEIGHTS: encode_weights({name: t.numpy() for name, t in program.weights.items()}),
    }


def _check_trainable(split: SplitNetwork) -> None:
    """Raise ModelError for a layer that keeps statistics of batches."""
    for layer_name, layer in split.client.named_modules():
        # InstanceNorm shares the base class and is harmless unless it keeps statistics.
        keeps = isinstance(layer, _NormBase) and (
            layer.track_running_stats or _is_batch_norm(layer)
        )
        frozen = layer_name in split.eval_layers and _has_statistics(layer)
        if keeps and not frozen:
            raise ModelError(f"layer {layer_name}: {type(layer).__name__} {_USE_INSTEAD}")


def _is_batch_norm(layer: nn.Module) -> bool:
    return "InstanceNorm" not in type(layer).__name__


def _has_statistics(layer: nn.Module) -> bool:
    """Without statistics of its own a layer takes each batch's, in eval mode too."""
    return getattr(layer, "running_mean", None) is not None


def _check_graph_trainable(graph: SegmentGraph, split: SplitNetwork, what: str) -> None:
    """Raise ModelError for batch statistics that a function keeps."""
    for node in graph.nodes:
        parts = node.op.split(".")
        if parts[1:2] and parts[1] in _BATCH_NORMS and node.layer not in split.eval_layers:
            where = f"layer {node.layer}" if node.layer else what
            raise ModelError(f"{where}: batch_norm {_USE_INSTEAD}")


def _describe(
    split: SplitNetwork, program: SegmentProgram, files: dict[str, bytes]
) -> dict[str, Any]:
    """What the manifest says of the segment itself."""
    memory = estimate_memory(program, split.input_shape)
    backward, halves = files.get(CLIENT_BACKWARD), files.get(CLIENT_FORWARD_KEPT)
    return {
        "network": split.network,
        "cut_layer": split.cut_layer,
        "input": ArraySpec(shape=split.input_shape),
        "activation": ArraySpec(shape=split.activation_shape),
        "parameters": _specs(program.parameters),
        "buffers": _specs({**program.buffers, **program.constants}),
        "opset": OPSET,
        "forward_bytes_per_sample": memory.forward_bytes,
        "backward_bytes_per_sample": memory.backward_bytes,
        "onnx_backward_bytes_per_sample": (
            0 if backward is None else estimate_graph_bytes(backward)
        ),
        "onnx_kept_bytes_per_sample": 0 if halves is None else measure_kept_bytes(halves),
        "notes": tuple(_notes(split)),
    }


def _notes(split: SplitNetwork) -> Iterator[str]:
    for layer in split.removed_dropout:
        yield f"dropout layer {layer} is off in the client segment"
    for name, layer in split.client.named_modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            yield f"{type(layer).__name__} layer {name} keeps its statistics as they are"


def _shortfall(checks: tuple[Check, ...], global_batch: int | None) -> Iterator[str]:
    largest = max(check.batch for check in checks)
    if global_batch is not None and largest < global_batch:
        yield f"compared at batches up to {largest}, not at the global batch {global_batch}"


def _specs(tensors: dict[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch.")
        )
        for name, tensor in tensors.items()
    )
