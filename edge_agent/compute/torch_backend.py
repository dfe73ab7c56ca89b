"""Forward and backward pass on torch, from the bundle's list of ATen calls.

The only place of the agent that imports torch, and only when a segment is loaded. The calls are
those that the segment's modules make in eager torch, so results are the same to the bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from wire.bundle import CLIENT_TORCH, Bundle
from wire.errors import ConfigError, ModelError
from wire.halves import TorchHalves, install_half_converter
from wire.segment_graph import GraphNode, decode_segment_graph, references

if TYPE_CHECKING:
    import torch

_SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}


@dataclass(frozen=True, slots=True)
class _Call:
    """One operator call; ``done`` names the values that no later call uses."""

    name: str
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    done: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Ref:
    """An argument that is an earlier value."""

    name: str


class TorchSegment:
    """A client segment on torch, on the CPU."""

    can_keep = True

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._torch = import_torch()
        self._torch.set_num_threads(threads)
        graph = decode_segment_graph(bundle.files[CLIENT_TORCH], source=CLIENT_TORCH)
        self._inputs = {entry.name: entry.tensor for entry in graph.inputs}
        self._calls = _compile_calls(self._torch, graph.nodes, graph.output)
        self._output = graph.output
        self._parameters = [spec.name for spec in bundle.manifest.parameters]
        self._weights: dict[str, torch.Tensor] = {}

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take weights by name, in their own types; those absent keep their values.

        Memory that may be written becomes the segment's own: a copy would be the third of each
        step's weights.
        """
        for name, array in weights.items():
            self._weights[name] = self._tensor(array).requires_grad_(name in self._parameters)

    def forward(self, x_BX: NDArray[Any]) -> NDArray[Any]:
        """Activations of one micro-batch; nothing is kept."""
        with self._torch.no_grad():
            return _read_only(self._run(x_BX).numpy())

    def forward_kept(self, x_BX: NDArray[Any]) -> tuple[NDArray[Any], torch.Tensor]:
        """Activations of one micro-batch, and what ``backward`` can take in place of its own
        forward pass, once: they carry the graph."""
        with self._torch.enable_grad():
            activations_BA = self._run(x_BX)
        return _read_only(activations_BA.detach().numpy()), activations_BA

    def backward(
        self, x_BX: NDArray[Any], grad_BA: NDArray[Any], kept: torch.Tensor | None = None
    ) -> dict[str, NDArray[Any]]:
        """Parameter gradients for one micro-batch; without ``kept`` its forward pass is computed
        again."""
        if kept is None:
            with self._torch.enable_grad():
                kept = self._run(x_BX)
        return self._gradients(kept, grad_BA)

    def _gradients(
        self, activations_BA: torch.Tensor, grad_BA: NDArray[Any]
    ) -> dict[str, NDArray[Any]]:
        parameters = [self._weights[name] for name in self._parameters]
        gradients = self._torch.autograd.grad(
            activations_BA, parameters, self._tensor(grad_BA), materialize_grads=True
        )
        arrays = (gradient.contiguous().numpy() for gradient in gradients)
        return dict(zip(self._parameters, arrays, strict=True))

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        """The array's memory as a tensor; a copy where it may not be written, as torch asks."""
        writeable = array if array.flags.writeable else array.copy()
        tensor: torch.Tensor = self._torch.from_numpy(writeable)
        return tensor

    def _run(self, x_BX: NDArray[Any]) -> torch.Tensor:
        x = self._tensor(x_BX)
        values: dict[str, Any] = {
            name: x if tensor == "x" else self._weights[tensor]
            for name, tensor in self._inputs.items()
        }
        for call in self._calls:
            args = [_resolve(argument, values) for argument in call.args]
            kwargs = {key: _resolve(argument, values) for key, argument in call.kwargs.items()}
            try:
                values[call.name] = call.function(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as exc:
                reason = " ".join(str(exc).split())[:300]
                raise ModelError(f"{CLIENT_TORCH}: node {call.name}: {reason}") from exc
            for name in call.done:
                del values[name]
        result: torch.Tensor = values[self._output]
        return result


def import_torch() -> Any:
    """PyTorch, imported now if it is not yet; ConfigError says what to install."""
    try:
        import torch  # noqa: PLC0415 - 200 MB and seconds of start: only where it is used
    except ImportError as exc:
        raise ConfigError(
            "backend torch: expected PyTorch to be installed "
            f"(pip install 'splitfleet[agent-torch]'): {exc}"
        ) from exc
    install_half_converter(TorchHalves(torch))
    return torch


def warm_up_autograd() -> None:
    """Let torch import what its first backward pass imports: 0.5 s, better spent before a fork
    than in the child and in the first step as well."""
    torch = import_torch()
    x = torch.zeros(1, requires_grad=True)
    torch.autograd.grad(x * 2, [x], torch.ones(1))  # with a gradient given, as in a step


def _compile_calls(torch: Any, nodes: Iterable[GraphNode], output: str) -> list[_Call]:
    """Resolve operators and constants once; note where each intermediate value is used last."""
    ordered = list(nodes)
    last_use = {name: node.name for node in ordered for name in references(node)}
    own = {node.name for node in ordered} - {output}
    calls = []
    for node in ordered:
        done = tuple(n for n, user in last_use.items() if user == node.name and n in own)
        calls.append(
            _Call(
                name=node.name,
                function=_find_function(torch, node),
                args=[_compile_argument(torch, argument) for argument in node.args],
                kwargs={key: _compile_argument(torch, arg) for key, arg in node.kwargs.items()},
                done=done,
            )
        )
    return calls


def _find_function(torch: Any, node: GraphNode) -> Callable[..., Any]:
    if (scalar := _SCALAR_FUNCTIONS.get(node.op)) is not None:
        return scalar
    _, name, overload = node.op.split(".")
    function = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if function is None:
        raise ModelError(
            f"{CLIENT_TORCH}: node {node.name}: torch {torch.__version__} has no {node.op}"
        )
    if function._schema.is_mutable:
        raise ModelError(f"{CLIENT_TORCH}: node {node.name}: {node.op} writes to its arguments")
    if node.op == "aten.max_pool2d.default" and _has_quick_pool(torch, node):
        return _quick_max_pool2d(torch)
    found: Callable[..., Any] = function
    return found


def _has_quick_pool(torch: Any, node: GraphNode) -> bool:
    """Whether windows lie side by side, in steps of their own size, and oneDNN is there."""
    kernel, *rest = node.args[1:]  # then stride, padding, dilation, ceil_mode
    stride = rest[0] if rest else node.kwargs.get("stride")
    plain = len(rest) < 2 and not node.kwargs.keys() - {"stride"}
    return plain and stride == kernel and bool(torch.backends.mkldnn.is_available())


def _quick_max_pool2d(torch: Any) -> Callable[..., Any]:
    """Max-pooling by oneDNN, where its values and gradients are those of torch's kernel to the bit.

    That one goes from value to value with a branch at each: it took a third of a training step of
    two convolutions with pools. oneDNN passes over values that are not numbers; they must show, so
    that what was computed with them is refused.
    """
    slow = torch.ops.aten.max_pool2d.default
    quick = torch.ops.aten.mkldnn_max_pool2d.default

    def pool(x: torch.Tensor, kernel: list[int], stride: list[int]) -> torch.Tensor:
        finite = math.isfinite(x.detach().sum().item())  # a sum is finite only if its terms are
        if not finite or x.dim() != 4 or x.dtype is not torch.float32:
            result: torch.Tensor = slow(x, kernel, stride)
            return result
        pooled: torch.Tensor = quick(x.to_mkldnn(), kernel, stride).to_dense()
        return pooled

    return pool


def _compile_argument(torch: Any, argument: Any) -> Any:
    if isinstance(argument, list):
        return [_compile_argument(torch, item) for item in argument]
    if not isinstance(argument, dict):
        return argument
    ((marker, value),) = argument.items()
    if marker == "ref":
        return _Ref(value)
    if marker == "float":
        return float(value)
    if marker == "device":
        return torch.device("cpu")
    kind = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
    constant = getattr(torch, str(value), None)
    if not isinstance(constant, kind[marker]):
        raise ModelError(f"{CLIENT_TORCH}: torch {torch.__version__} has no {marker} {value}")
    return constant


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, _Ref):
        return values[argument.name]
    if isinstance(argument, list):
        return [_resolve(item, values) for item in argument]
    return argument


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Torch may still need this memory for the backward pass."""
    array.flags.writeable = False
    return array
