"""From a training of the grid to the results of its cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.planning import PolicySettings
from coordinator.study.cells import Cell, Training
from coordinator.study.costs import CostMeter, Costs
from coordinator.study.data import StudyData
from coordinator.study.fleet import EpochOrder, EpochPlans, StudyFleet, build_fleet
from coordinator.study.methods import Method
from coordinator.study.results import CellResult
from coordinator.study.settings import TrainingSettings
from coordinator.study.training import EpochOutcome, Trainer
from wire.messages import SampleOrder

Indices = NDArray[np.intp]
StepsOfEpoch = Iterator[tuple[Indices, NDArray[np.int64] | None]]
_SHUFFLE_STREAM = 20


def _never() -> bool:
    return False


def run_training(
    training: Training,
    settings: TrainingSettings,
    data: StudyData,
    *,
    known: CellResult | None = None,
    should_stop: Callable[[], bool] = _never,
) -> list[CellResult]:
    """Train once and work out every cell's costs; ``known`` is a cell that was trained before.

    Raises Stopped once ``should_stop`` says so, ConfigError where a fleet cannot be dealt.
    """
    if known is not None:
        return [_with_costs(known, c, replay_costs(c, settings, data)) for c in training.cells]
    first, *others = training.cells
    started_s = time.perf_counter()
    outcomes, costs = _train(first, settings, data, should_stop)
    result = CellResult(
        cell=first,
        test_accuracies=tuple(outcome.test_accuracy for outcome in outcomes),
        train_losses=tuple(outcome.train_loss for outcome in outcomes),
        steps=costs.steps,
        epoch_end_s=costs.epoch_end_s,
        deviation_mean=costs.deviation_mean,
        deviation_p95=costs.deviation_p95,
        straggler_steps=costs.straggler_steps,
        trained_s=time.perf_counter() - started_s,
    )
    replayed = [_with_costs(result, cell, replay_costs(cell, settings, data)) for cell in others]
    return [result, *replayed]


def replay_costs(cell: Cell, settings: TrainingSettings, data: StudyData) -> Costs:
    """Plan a cell without training it."""
    schedule = Schedule(cell, settings, data)
    for epoch in range(settings.epochs):
        for _ in schedule.epoch(epoch):
            pass
    return schedule.meter.costs()


def _train(
    cell: Cell, settings: TrainingSettings, data: StudyData, should_stop: Callable[[], bool]
) -> tuple[list[EpochOutcome], Costs]:
    schedule = Schedule(cell, settings, data)
    trainer = Trainer(settings, data, cell.seed)
    outcomes = [
        trainer.train_epoch(schedule.epoch(epoch), should_stop) for epoch in range(settings.epochs)
    ]
    return outcomes, schedule.meter.costs()


def _with_costs(trained: CellResult, cell: Cell, costs: Costs) -> CellResult:
    return CellResult(
        cell=cell,
        test_accuracies=trained.test_accuracies,
        train_losses=trained.train_losses,
        trained_s=trained.trained_s,
        steps=costs.steps,
        epoch_end_s=costs.epoch_end_s,
        deviation_mean=costs.deviation_mean,
        deviation_p95=costs.deviation_p95,
        straggler_steps=costs.straggler_steps,
    )


class Schedule:
    """The batches of a cell, epoch by epoch, and in ``meter`` what they cost."""

    def __init__(self, cell: Cell, settings: TrainingSettings, data: StudyData) -> None:
        self._y = data.train.y
        pooled_M = data.train.label_counts
        self._steps: Callable[[int], StepsOfEpoch]
        if cell.fleet is None:
            self.meter = CostMeter(pooled_M)
            self._steps = _Shuffled(len(self._y), settings.global_batch, cell.seed).steps
            return
        fleet = build_fleet(data, cell.fleet, settings.delays, cell.seed)
        slow_K = fleet.delays.stragglers(fleet.held_K, settings.global_batch)
        self.meter = CostMeter(pooled_M, fleet.delays, slow_K)
        self._steps = _Planned(fleet, self._y, cell.method, settings, cell.seed).steps

    def epoch(self, epoch: int) -> Iterator[Indices]:
        """The epoch's batches, as indices into the pooled samples."""
        for rows, counts_K in self._steps(epoch):
            self.meter.add(self._y[rows], counts_K)
            yield rows
        self.meter.end_epoch()


class _Shuffled:
    """The undivided network's batches: all samples in random order, B at a time."""

    def __init__(self, samples: int, global_batch: int, seed: int) -> None:
        self._samples = samples
        self._global_batch = global_batch
        self._seed = seed

    def steps(self, epoch: int) -> StepsOfEpoch:
        sequence = np.random.SeedSequence([self._seed, _SHUFFLE_STREAM, epoch])
        order = np.random.Generator(np.random.PCG64(sequence)).permutation(self._samples)
        for start in range(0, self._samples, self._global_batch):
            yield order[start : start + self._global_batch], None


class _Planned:
    """A policy's batches on a fleet."""

    def __init__(
        self,
        fleet: StudyFleet,
        labels_N: NDArray[np.int64],
        method: Method,
        settings: TrainingSettings,
        seed: int,
    ) -> None:
        assert method.policy is not None
        policy = PolicySettings(
            name=method.policy,
            delta=method.delta,
            deviation_budget=method.deviation_budget,
            refit_every=settings.refit_every,
        )
        self._fleet = fleet
        self._labels_N = labels_N
        self._order = SampleOrder.BY_CLASS if method.policy.is_by_class else SampleOrder.SHUFFLED
        self._seed = seed
        self._plans = EpochPlans(fleet, policy, global_batch=settings.global_batch, seed=seed)

    def steps(self, epoch: int) -> StepsOfEpoch:
        order = EpochOrder(self._fleet, self._labels_N, self._order, seed=self._seed, epoch=epoch)
        for step in self._plans.epoch(epoch):
            yield order.rows(step), order.counts_K(step)


def expect_all_fleets_possible(
    trainings: Sequence[Training], settings: TrainingSettings, data: StudyData
) -> None:
    """Deal every kind of fleet once, so that an impossible one is found before the first training.

    Raises ConfigError naming the options.
    """
    fleets = {c.fleet for training in trainings for c in training.cells if c.fleet is not None}
    for fleet in fleets:
        build_fleet(data, fleet, settings.delays, 0)
