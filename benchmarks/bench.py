"""Interleaved measurements of one case: our step, the floor, the undivided network, and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cases import Case, Variant
from mqtt_floor import MessageSizes, floor_sizes, measure_floor
from processes import Processes
from samples import Median, Sample, build_median
from split_fleet import FleetRun, build_agents, measure_fleet
from undivided import Batch, SharedData, measure_undivided

from coordinator.broker import EmbeddedBroker
from wire.client_choice import ClientName
from wire.messages import Precision

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure; ``steps`` None takes each case's own number.

    A sample during which other processes kept more than ``quiet_cores`` busy is taken again, up
    to ``attempts`` times in all; the quietest one counts.
    """

    cases: Sequence[Case]
    precisions: Sequence[Precision]
    engines: Sequence[str]
    clients: Sequence[ClientName]
    repeats: int
    steps: int | None
    warm_up: int
    threads: int
    undivided_threads: int
    attempts: int
    quiet_cores: float

    def steps_of(self, case: Case) -> int:
        """Measured steps of a case."""
        return self.steps or case.steps


@dataclass(slots=True)
class Series:
    """Samples of one case and variant."""

    floor: list[Sample] = field(default_factory=list)
    ours: list[Sample] = field(default_factory=list)
    undivided: list[Sample] = field(default_factory=list)
    undivided_one_thread: list[Sample] = field(default_factory=list)
    loss_difference: float = 0.0
    bytes_up_per_step: float = 0.0
    floor_bytes_up_per_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case's result under one variant."""

    case: Case
    variant: Variant
    steps: int
    floor: Median
    ours: Median
    undivided: Median
    undivided_one_thread: Median
    loss_difference: float
    bytes_up_per_step: float
    floor_bytes_up_per_step: int

    @property
    def share_of_floor(self) -> float:
        """Our steps per second over the floor's; the target is at least 0.5."""
        return self.ours.steps_per_s / self.floor.steps_per_s

    @property
    def times_undivided(self) -> float:
        """Our time per step over the undivided network's; on the CNN the target is at most 2.

        Its faster thread setting counts: on a busy machine torch's default can be the slower one.
        """
        return self.ours.step_ms / min(self.undivided.step_ms, self.undivided_one_thread.step_ms)


class Bench:
    """Measures one case; for each engine and client the agents stay while runs come and go."""

    def __init__(
        self,
        plan: Plan,
        case: Case,
        broker: EmbeddedBroker,
        directory: Path,
        note: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._case = case
        self._broker = broker
        self._directory = directory
        self._note = note
        self._runs = 0
        self._steps = plan.steps_of(case)
        self._samples = (self._steps + plan.warm_up) * case.global_batch
        self._data = SharedData(case, self._samples)

    def measure(self, engine: str) -> list[Row]:
        """All clients and precisions of the plan, interleaved."""
        plan = self._plan
        variants = [
            Variant(precision=precision, engine=engine, client=client)
            for client in plan.clients
            for precision in plan.precisions
        ]
        series = {variant: Series() for variant in variants}
        for repeat in range(plan.repeats):
            for client in plan.clients:
                directory = self._directory / f"agents-{engine}-{client}"
                with build_agents(
                    self._case, engine, client, self._broker, directory, samples=self._samples
                ) as agents:
                    for variant in variants:
                        if variant.client == client:
                            self._measure_once(variant, series[variant], agents)
                            self._note(_describe(self._case, variant, repeat + 1, series[variant]))
        return [self._row(variant, series[variant]) for variant in variants]

    def _measure_once(self, variant: Variant, series: Series, agents: Processes) -> None:
        run = self._quietest(
            lambda: self._train_fleet(variant, agents), lambda result: result.sample
        )
        sizes = floor_sizes(self._case, variant, run.manifest)
        floor = self._quietest(
            lambda: self._pass_messages(sizes, variant.client), lambda result: result
        )
        series.ours.append(run.sample)
        series.floor.append(floor)
        series.bytes_up_per_step = run.bytes_up_per_step
        series.floor_bytes_up_per_step = sum(s.activations + s.gradients for s in sizes.values())
        batches = self._data.batches(run.settings, run.records)
        series.undivided.append(
            self._train_undivided(series, run, batches, self._plan.undivided_threads)
        )
        series.undivided_one_thread.append(self._train_undivided(series, run, batches, 1))

    def _train_fleet(self, variant: Variant, agents: Processes) -> FleetRun:
        self._runs += 1
        name = f"{variant.engine}-{variant.client}-{variant.precision.value}-{self._runs}"
        return measure_fleet(
            self._case,
            variant,
            self._broker,
            agents,
            self._directory / name,
            threads=self._plan.threads,
            steps=self._steps,
            warm_up=self._plan.warm_up,
        )

    def _pass_messages(self, sizes: Mapping[str, MessageSizes], client: ClientName) -> Sample:
        return measure_floor(
            sizes,
            self._broker,
            client,
            self._directory / "floor",
            steps=self._steps,
            warm_up=self._plan.warm_up,
        )

    def _train_undivided(
        self, series: Series, run: FleetRun, batches: Sequence[Batch], threads: int
    ) -> Sample:
        result = self._quietest(
            lambda: measure_undivided(
                self._case,
                run.settings,
                batches,
                run.records,
                threads=threads,
                warm_up=self._plan.warm_up,
            ),
            lambda result: result.sample,
        )
        series.loss_difference = max(series.loss_difference, result.loss_difference)
        return result.sample

    def _quietest(self, measure: Callable[[], R], sample_of: Callable[[R], Sample]) -> R:
        """Measure until nobody disturbs, or take the attempt that was disturbed least."""
        results: list[R] = []
        for _ in range(self._plan.attempts):
            results.append(measure())
            if sample_of(results[-1]).usage.others_cores <= self._plan.quiet_cores:
                break
        return min(results, key=lambda result: sample_of(result).usage.others_cores)

    def _row(self, variant: Variant, series: Series) -> Row:
        return Row(
            case=self._case,
            variant=variant,
            steps=self._steps,
            floor=build_median(series.floor),
            ours=build_median(series.ours),
            undivided=build_median(series.undivided),
            undivided_one_thread=build_median(series.undivided_one_thread),
            loss_difference=series.loss_difference,
            bytes_up_per_step=series.bytes_up_per_step,
            floor_bytes_up_per_step=series.floor_bytes_up_per_step,
        )


def _describe(case: Case, variant: Variant, repeat: int, series: Series) -> str:
    floor, ours, undivided = series.floor[-1], series.ours[-1], series.undivided[-1]
    others = max(sample.usage.others_cores for sample in (floor, ours, undivided))
    return (
        f"{case.name} {variant.engine} {variant.client} {variant.precision.value} #{repeat}: "
        f"floor {floor.steps_per_s:.1f}/s, ours {ours.steps_per_s:.1f}/s, "
        f"undivided {undivided.steps_per_s:.1f}/s; others used up to {others:.2f} cores"
    )
