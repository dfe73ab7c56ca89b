"""Compute backends: the client segment's forward and backward pass on a device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from edge_agent.compute.protocol import ComputeBackend
from edge_agent.compute.segment import SegmentBackend
from wire.errors import ConfigError

__all__ = ["BackwardChoice", "ComputeBackend", "build_backend", "choose_backward"]

ForwardName = Literal["auto", "onnxruntime", "torch"]
BackwardName = Literal["auto", "torch", "onnxruntime", "none"]


def build_backend(
    forward: ForwardName = "auto",
    backward: BackwardName = "auto",
    threads: int = 1,
    *,
    max_batch_bytes: int | None = None,
) -> ComputeBackend:
    """A backend without a bundle.

    ``backward: auto`` means torch where it is installed, else ONNX Runtime. ``forward: auto`` means
    torch for a segment that torch trains, which spares its second forward pass, else ONNX Runtime.

    ``max_batch_bytes`` limits the memory of intermediate values; batches are cut to fit. Raises
    ConfigError naming the library that is missing. Nothing heavy is imported before ``load``.
    """
    if threads < 1:
        raise ConfigError(f"threads: expected a whole number above 0, found {threads}")
    if max_batch_bytes is not None and max_batch_bytes < 1:
        raise ConfigError(f"max_batch_bytes: expected at least 1 byte, found {max_batch_bytes}")
    _expect_choice("forward", forward, get_args(ForwardName))
    _expect_choice("backward", backward, get_args(BackwardName))
    _expect_library("forward", "onnxruntime" if forward == "auto" else forward)
    if backward in ("torch", "onnxruntime"):
        _expect_library("backward", backward)
    return SegmentBackend(
        forward=forward,
        backward=choose_backward(backward).name,
        threads=threads,
        max_batch_bytes=max_batch_bytes,
    )


@dataclass(frozen=True, slots=True)
class BackwardChoice:
    """What runs the backward pass, ``torch``, ``onnxruntime`` or ``none``, and why."""

    name: str
    why: str


def choose_backward(setting: BackwardName) -> BackwardChoice:
    """Resolve ``compute.backward`` by what is installed; nothing is imported."""
    if setting != "auto":
        return BackwardChoice(setting, f"backward is set to {setting}")
    if find_spec("torch") is not None:
        return BackwardChoice("torch", "PyTorch is installed")
    if find_spec("onnxruntime") is not None:
        return BackwardChoice("onnxruntime", "PyTorch is not installed")
    return BackwardChoice("none", "neither PyTorch nor ONNX Runtime is installed")


def _expect_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field}: expected one of {', '.join(choices)}, found {value!r}")


def _expect_library(field: str, library: str) -> None:
    if find_spec(library) is None:
        extra = "agent-torch" if library == "torch" else "agent"
        raise ConfigError(
            f"{field}: {library}: expected {library} to be installed "
            f"(pip install 'splitfleet[{extra}]')"
        )
