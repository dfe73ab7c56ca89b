"""The server segment: forward, backward, both optimisers. The coordinator's tensor work.

The loss is the mean over the global batch, so the sum of the devices' client gradients is exactly
the gradient of the undivided network (docs/architecture.md). B rows in a global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coordinator.checkpoint import below_prefix, flatten_optimiser, restore_optimiser, with_prefix
from coordinator.optimisers import OptimiserName, OptimiserSettings
from models.modes import evaluating, train_except
from wire.halves import TorchHalves, install_half_converter

Floats = NDArray[np.float32]

install_half_converter(TorchHalves(torch))


# One kernel per tensor in place of ten: the optimisers' steps were a sixth of the coordinator's
# time with small networks.
FUSED = True


def build_optimiser(
    settings: OptimiserSettings, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the torch optimiser that the settings describe."""
    if settings.name is OptimiserName.SGD:
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            fused=FUSED,
        )
    kind = torch.optim.Adam if settings.name is OptimiserName.ADAM else torch.optim.AdamW
    return kind(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=FUSED,
    )


@dataclass(frozen=True, slots=True)
class ServerResult:
    """What one pass of the server segment gave; ``cut_gradient`` is shaped like the input.

    ``is_finite`` holds for loss, cut gradient and the server segment's gradients together.
    """

    loss: float
    correct: int
    cut_gradient: Floats | None
    is_finite: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss and share of right answers on held-out data."""

    loss: float
    accuracy: float
    samples: int


class SplitTrainer:
    """Holds both segments' weights and optimisers; the client segment runs here only to evaluate.

    A server pass leaves gradients on the server segment; ``apply`` steps both optimisers at once,
    or ``discard`` forgets the pass, so that a step is applied as a whole or not at all. The server
    segment's ``eval_layers`` stay in eval mode: BatchNorm keeps its statistics there.
    """

    def __init__(
        self,
        client: nn.Module,
        server: nn.Module,
        optimiser: OptimiserSettings,
        *,
        client_optimiser: OptimiserSettings | None = None,
        frozen: bool = False,
        eval_layers: AbstractSet[str] = frozenset(),
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)  # dropout in the server segment draws from torch's generator
        self.client = client
        self.server = server
        self.frozen = frozen
        train_except(server, eval_layers)
        # What does not require gradients travels as a buffer and is not trained (models.export).
        self._client_parameters = _trainable(client)
        self._server_parameters = _trainable(server)
        for parameter in self._client_parameters.values():
            parameter.requires_grad_(not frozen)
        # Both are written in place, by optimisers and by ``restore``.
        self._client_weights = {
            name: tensor.detach().numpy()
            for name, tensor in client.state_dict().items()
            if tensor.is_floating_point()
        }
        self._server_optimiser = _optional_optimiser(optimiser, self._server_parameters)
        self._client_optimiser = (
            None
            if frozen
            else _optional_optimiser(client_optimiser or optimiser, self._client_parameters)
        )

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Trainable parameters of the client segment, in order."""
        return {name: tuple(p.shape) for name, p in self._client_parameters.items()}

    def client_weights(self) -> dict[str, Floats]:
        """The client segment's parameters and float buffers, as views that stay."""
        return self._client_weights

    def run_server(self, activations: Floats, labels: NDArray[np.int64]) -> ServerResult:
        """Forward and backward of the server segment on activations (B, …), labels (B,)."""
        self.server.zero_grad(set_to_none=True)
        cut = torch.from_numpy(activations).requires_grad_(not self.frozen)
        target = torch.from_numpy(labels)
        logits = self.server(cut)
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()  # type: ignore[no-untyped-call]
        correct = int((logits.detach().argmax(dim=1) == target).sum())
        gradient = None if cut.grad is None else cut.grad.numpy()
        value = float(loss.detach())
        return ServerResult(
            loss=value,
            correct=correct,
            cut_gradient=gradient,
            is_finite=math.isfinite(value) and self._has_finite_gradients(cut),
        )

    def _has_finite_gradients(self, cut: torch.Tensor) -> bool:
        """A sum is finite only if all of its terms are, and takes a third of isfinite's time."""
        tensors = (cut, *self._server_parameters.values())
        return all(math.isfinite(float(t.grad.sum())) for t in tensors if t.grad is not None)

    def discard(self) -> None:
        """Forget the last server pass."""
        self.server.zero_grad(set_to_none=True)

    def apply_client(self, client_gradients: Mapping[str, Floats]) -> None:
        """Step the client's optimiser; the gradients are summed over devices, by parameter.

        The next weights are there then, while the server pass waits for ``apply_server``.
        """
        if self._client_optimiser is not None:
            for name, parameter in self._client_parameters.items():
                parameter.grad = torch.from_numpy(client_gradients[name])
            self._client_optimiser.step()
            self._client_optimiser.zero_grad(set_to_none=True)

    def apply_server(self) -> None:
        """Step the server's optimiser; ends the server pass."""
        if self._server_optimiser is not None:
            self._server_optimiser.step()
        self.server.zero_grad(set_to_none=True)

    def evaluate(self, x: Floats, y: NDArray[np.int64], *, batch: int = 512) -> Evaluation:
        """Run the whole network on held-out samples x (N, …), y (N,)."""
        loss, correct = 0.0, 0
        with evaluating(self.client, self.server), torch.no_grad():
            for start in range(0, len(x), batch):
                target = torch.from_numpy(y[start : start + batch])
                logits = self.server(self.client(torch.from_numpy(x[start : start + batch])))
                loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
                correct += int((logits.argmax(dim=1) == target).sum())
        return Evaluation(loss=loss / len(x), accuracy=correct / len(x), samples=len(x))

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON-able data that ``restore`` needs to go on bit by bit."""
        tensors: dict[str, torch.Tensor] = {"random_state.torch": torch.get_rng_state()}
        document: dict[str, Any] = {}
        for segment, module in self._segments().items():
            tensors |= with_prefix(module.state_dict(), f"weights.{segment}.")
        for segment, (optimiser, parameters) in self._optimisers().items():
            state, scalars = flatten_optimiser(optimiser, parameters.items())
            tensors |= with_prefix(state, f"optimiser.{segment}.")
            document[segment] = scalars
        return tensors, document

    def restore(self, tensors: Mapping[str, torch.Tensor], document: dict[str, Any]) -> None:
        """Take up what ``checkpoint`` gave."""
        for segment, module in self._segments().items():
            module.load_state_dict(below_prefix(tensors, f"weights.{segment}."))
        for segment, (optimiser, parameters) in self._optimisers().items():
            state = below_prefix(tensors, f"optimiser.{segment}.")
            restore_optimiser(optimiser, parameters.items(), state, document[segment])
        torch.set_rng_state(tensors["random_state.torch"])

    def _segments(self) -> dict[str, nn.Module]:
        return {"client": self.client, "server": self.server}

    def _optimisers(
        self,
    ) -> dict[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]]:
        both = {
            "client": (self._client_optimiser, self._client_parameters),
            "server": (self._server_optimiser, self._server_parameters),
        }
        return {name: (opt, params) for name, (opt, params) in both.items() if opt is not None}


def _trainable(segment: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in segment.named_parameters() if p.requires_grad}


def _optional_optimiser(
    settings: OptimiserSettings, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer | None:
    """A segment without parameters (a cut behind a flatten, say) has nothing to step."""
    return build_optimiser(settings, list(parameters.values())) if parameters else None
