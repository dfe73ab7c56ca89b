"""ONNX Runtime sessions as the agent runs them: weights are inputs, memory comes from one arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from wire.bundle import Bundle
from wire.errors import ConfigError, ModelError

_LOG_ERRORS_ONLY: Final = 3
_EXTEND_AS_REQUESTED: Final = 1  # kSameAsRequested; by powers of two costs half as much more


class OnnxGraph:
    """One session for the life of a bundle: creating one costs 7 to 20 ms."""

    def __init__(self, bundle: Bundle, file: str, threads: int) -> None:
        self.file = file
        self._session = _open_session(bundle.files[file], file, threads)
        self.inputs = {entry.name for entry in self._session.get_inputs()}
        self.outputs = {entry.name: entry.shape for entry in self._session.get_outputs()}
        self._weights: dict[str, NDArray[Any]] = {}

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by name, in their own types; those absent keep their values."""
        for name, array in weights.items():
            if name in self.inputs:
                # The graph reads this memory; a view of a message need not be aligned.
                self._weights[name] = np.require(array, requirements=("C", "A"))

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with the weights and those of ``feeds`` that the graph takes."""
        used = {name: array for name, array in feeds.items() if name in self.inputs}
        try:
            results = self._session.run(outputs, {**self._weights, **used})
        except Exception as exc:  # the library raises its own types, which differ by version
            raise ModelError(f"{self.file}: {_one_line(exc)}") from exc
        return list(results)


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
