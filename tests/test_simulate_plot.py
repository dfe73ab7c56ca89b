"""The picture of a simulation: what is in it, and that odd fleets can be drawn too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coordinator.simulation import plot, sweep
from coordinator.simulation.choices import parse_choices
from coordinator.simulation.comparison import compare
from coordinator.simulation.delay_models import BaseDelay, DeviceDelays, straggler_delays
from coordinator.simulation.fleet import SimulatedFleet
from coordinator.simulation.play import StepCounts, play_epoch
from coordinator.simulation.plot import Picture, build_figure, heat_cells, write_plot
from coordinator.simulation.populations import PopulationSettings, build_label_counts
from coordinator.simulation.sweep import run_sweep
from wire.errors import ConfigError

RULES = {"global_batch": 32, "refit_every": 10}


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "DELTAS", (1.0, 2.0))
    monkeypatch.setattr(sweep, "BUDGETS", (0.1,))


def _fleet() -> SimulatedFleet:
    counts_KM = build_label_counts(PopulationSettings(devices=24, samples=1500), seed=0)
    return SimulatedFleet(
        counts_KM, straggler_delays(24, BaseDelay(), stragglers=3, factor=10, seed=0)
    )


def _picture(fleet: SimulatedFleet, names: Sequence[str] = ("fls", "ugs", "lds")) -> Picture:
    choices = parse_choices(names)
    comparison = compare(lambda _seed: fleet, choices, seeds=[0], **RULES)
    plays = {c.name: play_epoch(fleet, c, seed=0, keep_counts=True, **RULES) for c in choices}
    swept = run_sweep(lambda _seed: fleet, seeds=[0, 1, 2, 3], **RULES)
    return Picture(comparison, swept, fleet, plays, RULES["global_batch"])


def test_sweep_goes_from_ugs_towards_the_bound_over_at_most_three_seeds() -> None:
    swept = _picture(_fleet()).sweep
    assert [point.setting for point in swept.deltas] == ["0", "1", "2"]
    assert [point.setting for point in swept.budgets] == ["10%"]
    times = [point.time_ratio for point in swept.deltas]
    assert times[0] == 1.0 > times[1] > times[2] >= (swept.bound_ratio or 2.0)
    assert swept.seeds == 3


def test_picture_has_sweep_with_bound_deviation_of_every_policy_and_heat_map() -> None:
    picture = _picture(_fleet())
    sweep_axes, deviation_axes, heat_axes, _colour_bar = build_figure(picture).axes
    bound = picture.sweep.bound_ratio
    assert any(line.get_ydata()[0] == pytest.approx(bound) for line in sweep_axes.get_lines())
    assert "FLS" in sweep_axes.texts[-1].get_text(), "far beyond the sweep, so it is listed"
    labels = [text.get_text() for text in deviation_axes.get_legend().get_texts()]
    assert labels == ["FLS", "UGS", "LDS", "uniform batch"]
    assert heat_axes.get_title(loc="left").startswith("LDS: samples that each device gives")
    assert len(heat_axes.get_images()) == 1


def test_heat_map_pools_neighbours_and_keeps_the_samples() -> None:
    steps = [
        StepCounts(np.array([0, 2]), np.array([4, 6])),
        StepCounts(np.array([1]), np.array([8])),
        StepCounts(np.array([0, 1, 2]), np.array([1, 1, 1])),
    ]
    order_K = np.array([2, 0, 1])
    whole = heat_cells(steps, order_K, most_rows=9, most_columns=9)
    assert whole.tolist() == [[6, 0, 1], [4, 0, 1], [0, 8, 1]]
    pooled = heat_cells(steps, order_K, most_rows=2, most_columns=1)
    assert pooled == pytest.approx(np.array([[12 / 6], [9 / 3]]))


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([[5]], ("ugs",)),
        ([[300, 0], [0, 0]], ("lds@2", "lds", "class-targeted")),
        ([[40, 40]] * 3, ("lds@1",)),
    ],
)
def test_odd_fleets_are_drawn(counts: list[list[int]], names: Sequence[str]) -> None:
    fleet = SimulatedFleet(
        np.array(counts), DeviceDelays(np.ones(len(counts)), np.zeros(len(counts)))
    )
    picture = _picture(fleet, names)
    figure = build_figure(picture)
    figure.canvas.draw()
    assert len(figure.axes) == 4
    assert picture.focus == (names[0] if names[0].startswith("lds") else "ugs")


def test_fleet_without_any_delay_is_drawn() -> None:
    fleet = SimulatedFleet(np.array([[40, 3], [9, 30]]), DeviceDelays(np.zeros(2), np.zeros(2)))
    build_figure(_picture(fleet)).canvas.draw()


def test_picture_is_written_as_png_or_the_option_is_named(tmp_path: Path) -> None:
    picture = _picture(_fleet(), ("ugs",))
    write_plot(picture, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--plot: expected a file that can be written"):
        write_plot(picture, tmp_path / "no" / "out.png")


def test_every_policy_keeps_its_colour_and_others_differ() -> None:
    colours = plot._colours(["lds", "ugs", "lds@1", "lds@2", "x"])
    assert colours["lds"] == plot._colours(["lds"])["lds"]
    assert len(set(colours.values())) == 5
