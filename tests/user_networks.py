"""Networks as a user would bring them: good ones, and one of each kind that must be refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NOT_CALLABLE = 3


class Residual(nn.Module):
    """Dense blocks with a skip connection inside ``body`` and a literal tensor at the end of it."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.body = _SkipBlock(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        batch = x.shape[0]
        h = self.body(F.relu(self.stem(x)))
        h = F.dropout(h.view(batch, -1), 0.25, training=self.training)
        logits: Tensor = self.head(h if scale is None else h * scale)
        return logits


class _SkipBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        if h.ndim != 2:  # looks at the shape: cannot be traced through
            raise ValueError("expected rows of features")
        return h + self.norm(self.inner(h)) * torch.tensor([0.5])


def residual(input_shape: Sequence[int], classes: int, width: int = 16) -> nn.Module:
    return Residual(input_shape[0], width, classes)


def with_arguments(classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(arguments["features"], 4), nn.Linear(4, classes))


def not_a_module() -> str:
    return "network"


def fails(classes: int) -> nn.Module:
    raise ValueError("the shelf is empty")


class SkipAcross(nn.Module):
    """The output of ``first`` goes round ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        logits: Tensor = self.head(h + self.second(h))
        return logits


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.shared(torch.relu(self.shared(x))))
        return logits


class TiedWeights(nn.Module):
    """``second`` has the weight of ``first``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))))
        return logits


class DataDependent(nn.Module):
    """Chooses its way by the sign of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        logits: Tensor = self.head(h if h.sum() > 0 else -h)
        return logits


class LooksAtData(nn.Module):
    """Refuses numbers that are not finite: harmless, but no graph can say so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("expected finite numbers")
        h: Tensor = self.linear(x)
        return h


class BatchMixing(nn.Module):
    """Centres each batch: samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.centre = _Centre()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.centre(self.first(x)))
        return logits


class _Centre(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class BatchLast(nn.Module):
    """``turned`` puts the batch into the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.turned = _Turn()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.turned(self.first(x)).T)
        return logits


class _Turn(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.T


class ModeDependent(nn.Module):
    """Skips a layer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.training:
            h = torch.relu(h)
        logits: Tensor = self.head(h)
        return logits


def batch_norm_network() -> nn.Module:
    """3x8x8 images, BatchNorm in ``body`` with statistics of its own, 3 classes."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    torch.nn.init.normal_(body[1].running_mean)  # type: ignore[arg-type]
    torch.nn.init.uniform_(body[1].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return nn.Sequential(body, nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


class TwoLayers(nn.Module):
    """``body`` is whatever is to be cut; ``head`` makes 3 classes of it."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.flatten = nn.Flatten()
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flatten(self.body(x)))
        return logits


def norm_kept_as_it_is(input_shape: Sequence[int], classes: int) -> nn.Module:
    """BatchNorm whose statistics are to stay as they are."""
    width = math.prod(input_shape)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(width).eval(), nn.Linear(width, classes))
