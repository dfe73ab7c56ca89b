"""Trains one network on batches of indices and says how well it does after each epoch.

Every client segment of a fleet holds the same weights, and the summed client gradients are exactly
those of the undivided network (docs/architecture.md): a fleet and one network that is fed the same
global batches learn the same.

Shapes: N samples, B rows in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coordinator.study.data import StudyData
from coordinator.study.settings import TrainingSettings
from coordinator.trainer import build_optimiser
from models.modes import evaluating
from models.registry import build_network

_TEST_BATCH = 500
_NETWORK_FOR = {1: "mlp", 2: "cnn1d", 3: "cnn2d"}


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The training was asked to stop before its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOutcome:
    """Mean training loss of an epoch's samples, and the share of test samples got right after it.

    The loss is None where it is not finite: the training has diverged.
    """

    train_loss: float | None
    test_accuracy: float


def network_name(settings: TrainingSettings, sample_shape: tuple[int, ...]) -> str:
    """The network of the study, or one that takes samples of this shape."""
    return settings.network or _NETWORK_FOR.get(len(sample_shape), "mlp")


def build(settings: TrainingSettings, data: StudyData, seed: int) -> nn.Module:
    """The network with the initial weights of ``seed``; ModelError if it cannot be built."""
    return build_network(
        network_name(settings, data.train.sample_shape),
        input_shape=data.train.sample_shape,
        classes=data.classes,
        arguments=settings.network_arguments,
        seed=seed,
    )


class Trainer:
    """One network and its optimiser; the seed decides its initial weights and dropout."""

    def __init__(self, settings: TrainingSettings, data: StudyData, seed: int) -> None:
        self.network = build(settings, data, seed)
        torch.manual_seed(seed)
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        self._optimiser = build_optimiser(settings.optimiser, trainable)
        self._x, self._y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
        self._test_x, self._test_y = torch.from_numpy(data.test.x), torch.from_numpy(data.test.y)

    def train_epoch(
        self, batches: Iterator[NDArray[np.intp]], should_stop: Callable[[], bool]
    ) -> EpochOutcome:
        """Train on batches of indices into the pooled samples, then test. Stopped if asked to."""
        loss_sum, samples = 0.0, 0
        for rows in batches:
            if should_stop():
                raise Stopped
            loss_sum += self.train_step(rows) * len(rows)
            samples += len(rows)
        mean = loss_sum / samples
        return EpochOutcome(
            train_loss=mean if math.isfinite(mean) else None,
            test_accuracy=self.test_accuracy(),
        )

    def train_step(self, rows: NDArray[np.intp]) -> float:
        """One step on the mean loss over these samples, (B,); the loss before it."""
        chosen = torch.from_numpy(rows)
        self._optimiser.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.network(self._x[chosen]), self._y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return float(loss.detach())

    def test_accuracy(self) -> float:
        """Share of the test samples whose class gets the largest logit."""
        correct = 0
        with evaluating(self.network), torch.inference_mode():
            for start in range(0, len(self._test_y), _TEST_BATCH):
                logits = self.network(self._test_x[start : start + _TEST_BATCH])
                target = self._test_y[start : start + _TEST_BATCH]
                correct += int((logits.argmax(dim=1) == target).sum())
        return correct / len(self._test_y)
