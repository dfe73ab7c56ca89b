"""Forward and backward pass on ONNX Runtime, with the weights as inputs of the graphs.

The backward graph holds the forward pass too: it takes samples, weights and the gradient at the cut
and gives the parameters' gradients, so nothing stands in memory between the two passes.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from wire.bundle import CLIENT_BACKWARD, CLIENT_FORWARD, Bundle
from wire.errors import ConfigError, ModelError

SAMPLES: Final = "x"
ACTIVATIONS: Final = "activations"
CUT_GRADIENT: Final = "grad_out"
GRADIENT_PREFIX: Final = "grad."  # of an output of the backward graph; a parameter's name follows

_LOG_ERRORS_ONLY = 3
_EXTEND_AS_REQUESTED = 1  # onnxruntime's kSameAsRequested; by powers of two costs half as much more


class _Graph:
    """One session for the life of a bundle: creating one costs 7 to 20 ms."""

    def __init__(self, bundle: Bundle, file: str, threads: int) -> None:
        self._file = file
        self._session = _open_session(bundle.files[file], file, threads)
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self._weights: dict[str, NDArray[Any]] = {}

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by name, in their own types; those absent keep their values."""
        for name, array in weights.items():
            if name in self._inputs:
                # The graph reads this memory; a view of a message need not be aligned.
                self._weights[name] = np.require(array, requirements=("C", "A"))

    def _run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            results = self._session.run(outputs, {**self._weights, **feeds})
        except Exception as exc:  # the library raises its own types, which differ by version
            raise ModelError(f"{self._file}: {_one_line(exc)}") from exc
        return list(results)


class OnnxForward(_Graph):
    """The bundle's forward graph."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        super().__init__(bundle, CLIENT_FORWARD, threads)

    def forward(self, x_BX: NDArray[Any]) -> NDArray[Any]:
        """Activations of one micro-batch."""
        (activations_BA,) = self._run([ACTIVATIONS], {SAMPLES: x_BX})
        return activations_BA


class OnnxBackward(_Graph):
    """The bundle's backward graph. Raises ModelError for a bundle that has none or a wrong one."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        if CLIENT_BACKWARD not in bundle.files:
            raise ModelError(
                f"{CLIENT_BACKWARD}: expected this file in the bundle, for training on ONNX "
                "Runtime: export it again without 'backward: torch', or install 'agent-torch' here"
            )
        super().__init__(bundle, CLIENT_BACKWARD, threads)
        self._outputs = {GRADIENT_PREFIX + p.name: p.name for p in bundle.manifest.parameters}
        self._check_interface(bundle)

    def backward(self, x_BX: NDArray[Any], grad_BA: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Parameter gradients for one micro-batch, summed over its rows."""
        feeds = {SAMPLES: x_BX, CUT_GRADIENT: grad_BA}
        used = {name: array for name, array in feeds.items() if name in self._inputs}
        gradients = self._run(list(self._outputs), used)
        return dict(zip(self._outputs.values(), gradients, strict=True))

    def _check_interface(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        known = {spec.name for spec in (*manifest.parameters, *manifest.buffers)}
        if foreign := self._inputs - known - {SAMPLES, CUT_GRADIENT}:
            raise ModelError(
                f"{CLIENT_BACKWARD}: input {min(foreign)!r}: expected {SAMPLES}, {CUT_GRADIENT}, "
                "parameters and buffers"
            )
        found = {entry.name: entry.shape for entry in self._session.get_outputs()}
        for spec in manifest.parameters:
            shape = found.get(GRADIENT_PREFIX + spec.name)
            if shape is None or tuple(shape) != spec.shape:
                raise ModelError(
                    f"{CLIENT_BACKWARD}: expected an output {GRADIENT_PREFIX + spec.name!r} of "
                    f"shape {spec.shape}, found {'none' if shape is None else tuple(shape)}"
                )


def _open_session(model: bytes, file: str, threads: int) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    # A pattern reserves all of a pass in one piece, for each batch size anew: measured on a ResNet
    # stage, twice the memory for no time.
    options.enable_mem_pattern = False
    if _share_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # as above
        raise ModelError(f"{file}: {_one_line(exc)}") from exc


def import_onnxruntime() -> Any:
    """ONNX Runtime, imported now if it is not yet; ConfigError says what to install."""
    try:
        import onnxruntime  # noqa: PLC0415 - an agent on torch alone can do without
    except ImportError as exc:
        raise ConfigError(
            "onnxruntime: expected ONNX Runtime to be installed "
            f"(pip install 'splitfleet[agent]'): {exc}"
        ) from exc
    return onnxruntime


@cache
def _share_arena() -> bool:
    """Have all sessions of the process take memory from one arena; tell whether they can.

    The forward and the backward graph never run at the same time, but each keeps what it once had.
    """
    ort = import_onnxruntime()
    try:
        memory = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        arena = ort.OrtArenaCfg(0, _EXTEND_AS_REQUESTED, -1, -1)
        ort.create_and_register_allocator(memory, arena)
    except Exception:  # a version without it, or a program that has registered its own
        return False
    return True


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]
