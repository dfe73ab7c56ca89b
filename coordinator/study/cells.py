"""The cells of a study's grid, and which of them share one training.

A policy that never looks at delays feeds the network the same batches whichever devices are slow,
and the undivided network does not know of devices at all: those are trained once, and only their
modelled time is worked out for each cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from coordinator.study.methods import Method
from coordinator.study.schemes import Scheme
from coordinator.study.settings import StudySettings, TrainingSettings
from wire.settings import Settings

# Part of every cell's key: raise it when the same settings come to give other results.
REVISION = 1


class Fleet(Settings, frozen=True, kw_only=True):
    """A number of devices and what they hold; ``stragglers`` is the share of slow ones."""

    scheme: Scheme
    devices: int
    stragglers: float


class Cell(Settings, frozen=True, kw_only=True):
    """One result: a method on a fleet with a seed. The undivided network has no fleet."""

    method: Method
    fleet: Fleet | None
    seed: int

    @property
    def title(self) -> str:
        """For people."""
        if self.fleet is None:
            return f"{self.method.name}, seed {self.seed}"
        fleet = self.fleet
        return (
            f"{self.method.name}, {fleet.scheme.name}, {fleet.devices} devices, "
            f"{fleet.stragglers:.0%} slow, seed {self.seed}"
        )


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """One network to train, and the cells that get its result."""

    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """For people; where cells share a training, without the share of slow devices."""
        cell = self.cells[0]
        if cell.fleet is None or cell.method.sees_delays:
            return cell.title
        fleet = cell.fleet
        name = f"{cell.method.name}, {fleet.scheme.name}, {fleet.devices} devices"
        return f"{name}, seed {cell.seed}"


def all_cells(settings: StudySettings) -> Iterator[Cell]:
    """Every cell, seed by seed: a study that was stopped has whole grids of fewer seeds."""
    for seed in settings.seeds:
        for method in settings.methods:
            if method.policy is None:
                yield Cell(method=method, fleet=None, seed=seed)
        for fleet in _all_fleets(settings):
            for method in settings.methods:
                if method.policy is not None:
                    yield Cell(method=method, fleet=fleet, seed=seed)


def _all_fleets(settings: StudySettings) -> Iterator[Fleet]:
    """The largest fleets first: that is where methods differ most."""
    for devices in sorted(settings.devices, reverse=True):
        for scheme in settings.schemes:
            for stragglers in settings.stragglers:
                yield Fleet(scheme=scheme, devices=devices, stragglers=stragglers)


def all_trainings(cells: Iterable[Cell]) -> list[Training]:
    """Group the cells that share a training, in the order of their first."""
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_trained_as(cell), []).append(cell)
    return [Training(cells=tuple(group)) for group in groups.values()]


def _trained_as(cell: Cell) -> Cell:
    if cell.fleet is None or cell.method.sees_delays:
        return cell
    alike = msgspec.structs.replace(cell.fleet, stragglers=0.0)
    return msgspec.structs.replace(cell, fleet=alike)


def cell_file_name(training: TrainingSettings, cell: Cell) -> str:
    """Name of the cell's file: readable, and different for anything that changes its result."""
    key = msgspec.json.encode((REVISION, training, cell), order="deterministic")
    digest = hashlib.sha256(key).hexdigest()[:12]
    words = [cell.method.name.replace(":", "-").replace("=", "-")]
    if cell.fleet is not None:
        scheme = cell.fleet.scheme.name.replace("/", "-")
        words += [scheme, str(cell.fleet.devices), f"{cell.fleet.stragglers:g}"]
    return f"{'_'.join([*words, str(cell.seed)])}_{digest}.json"
