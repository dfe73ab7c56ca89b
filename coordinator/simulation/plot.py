"""A simulation as one picture: the choice of delta, deviation over the epoch, who gave when.

Shapes: K devices, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coordinator.allocation.budget import chance_deviation
from coordinator.plots import (
    HEAT_COLOURS,
    MOST_COLUMNS,
    MOST_ROWS,
    group_edges,
    new_figure,
    smooth,
)
from coordinator.simulation.comparison import Comparison
from coordinator.simulation.fleet import SimulatedFleet
from coordinator.simulation.play import EpochPlay, StepCounts
from coordinator.simulation.sweep import Sweep, SweepPoint
from coordinator.tables import format_seconds
from wire.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, https://jfly.uni-koeln.de/color/; every policy keeps its colour.
_COLOURS = {
    "ugs": "#0072B2",
    "lds": "#D55E00",
    "class-targeted": "#009E73",
    "fls": "#8A8A8A",
    "fpls": "#CC79A7",
}
_OTHER_COLOURS = ("#E69F00", "#56B4E9", "#6B4E16", "#000000")
_INK, _DIM = "#30363C", "#7A828A"
_MOST_ROW_LABELS = 20


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn: all policies over all seeds, and each policy's epoch of the first seed."""

    comparison: Comparison
    sweep: Sweep
    fleet: SimulatedFleet
    plays: Mapping[str, EpochPlay]
    global_batch: int

    @property
    def focus(self) -> str:
        """The policy of the heat map: LDS, or else the last one that was asked for."""
        names = list(self.plays)
        return next((name for name in names if name.startswith("lds")), names[-1])


def write_plot(picture: Picture, path: Path) -> None:
    """Draw the picture as a PNG; raises ConfigError where it cannot be written."""
    figure = build_figure(picture)
    try:
        figure.savefig(path, format="png")
    except OSError as exc:
        raise ConfigError(
            f"expected a file that can be written ({exc.strerror}), found {str(path)!r}",
            field="--plot",
        ) from exc


def build_figure(picture: Picture) -> Figure:
    """Three panels: delta sweep, deviation over the epoch, heat map."""
    with new_figure(_title(picture)) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1.0))
        _draw_sweep(figure.add_subplot(grid[0, 0]), picture)
        _draw_deviation(figure.add_subplot(grid[0, 1]), picture)
        _draw_heat(figure, figure.add_subplot(grid[1, :]), picture)
    return figure


def heat_cells(
    counts: Sequence[StepCounts], order_K: NDArray[np.intp], *, most_rows: int, most_columns: int
) -> NDArray[np.float64]:
    """Mean samples per device and step, devices in this order, neighbours pooled to fit."""
    row_edges = group_edges(order_K.size, most_rows)
    column_edges = group_edges(len(counts), most_columns)
    row_of_K = np.empty(order_K.size, dtype=np.int64)
    row_of_K[order_K] = np.searchsorted(row_edges, np.arange(order_K.size), side="right") - 1
    column_of_T = np.searchsorted(column_edges, np.arange(len(counts)), side="right") - 1
    cells = np.zeros((row_edges.size - 1, column_edges.size - 1))
    for column, step in zip(column_of_T, counts, strict=True):
        np.add.at(cells[:, column], row_of_K[step.devices], step.counts)
    means: NDArray[np.float64] = cells / np.outer(np.diff(row_edges), np.diff(column_edges))
    return means


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = iter(_OTHER_COLOURS * (1 + len(names) // len(_OTHER_COLOURS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}


def _title(picture: Picture) -> str:
    counts_KM = picture.fleet.label_counts_KM
    stragglers = int(
        picture.fleet.delays.stragglers(picture.fleet.held_K, picture.global_batch).sum()
    )
    parts = [
        f"{picture.fleet.devices:,} devices, {stragglers:,} of them slow",
        f"{int(counts_KM.sum()):,} samples of {counts_KM.shape[1]} classes",
        f"global batch {picture.global_batch:,}",
    ]
    return "   ·   ".join(parts)


def _draw_sweep(axes: Axes, picture: Picture) -> None:
    sweep = picture.sweep
    axes.set_title("What time costs in deviation")
    axes.set_xlabel("mean batch deviation, relative to UGS")
    axes.set_ylabel("modelled time, relative to UGS")
    _limit_axes(axes, picture)
    colour = _COLOURS["lds"]
    _draw_points(axes, sweep.deltas, colour, "LDS, delta given", marker="o", labelled="δ ")
    _draw_points(axes, sweep.budgets, "#E69F00", "LDS, budget given", marker="s", labelled="")
    if sweep.bound_ratio is not None:
        axes.axhline(
            sweep.bound_ratio, color=_INK, linestyle="--", linewidth=1.3, label="lower bound"
        )
    _mark_policies(axes, picture)
    axes.legend(loc="upper right")


def _draw_points(
    axes: Axes,
    points: Sequence[SweepPoint],
    colour: str,
    label: str,
    *,
    marker: str,
    labelled: str,
) -> None:
    x = [point.deviation_ratio for point in points]
    y = [point.time_ratio for point in points]
    axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=label)
    offset, align = ((6, 4), "left") if labelled else ((-4, -12), "right")
    for point in points:
        axes.annotate(
            f"{labelled}{point.setting}",
            (point.deviation_ratio, point.time_ratio),
            xytext=offset,
            textcoords="offset points",
            ha=align,
            fontsize=7.5,
            color=colour,
            annotation_clip=True,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6},
        )


def _limit_axes(axes: Axes, picture: Picture) -> None:
    """The sweep fills the panel; policies far beyond it are listed rather than drawn."""
    points = [*picture.sweep.deltas, *picture.sweep.budgets]
    x = [point.deviation_ratio for point in points]
    targeted = picture.comparison.policies.get("class-targeted")
    if targeted is not None and targeted.mean.deviation_ratio is not None:
        x.append(targeted.mean.deviation_ratio)
    width = max(max(x) - min(x), 0.05)
    axes.set_xlim(min(x) - 0.12 * width, max(x) + 0.14 * width)
    axes.set_ylim(0.0, max(1.08, 1.08 * max(point.time_ratio for point in points)))


def _mark_policies(axes: Axes, picture: Picture) -> None:
    outside = []
    colours = _colours(list(picture.comparison.policies))
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    for name, result in picture.comparison.policies.items():
        x, y = result.mean.deviation_ratio, result.mean.time_ratio
        if x is None or y is None or (name.startswith("lds") and name != "lds"):
            continue
        if low_x <= x <= high_x and low_y <= y <= high_y:
            size = 150 if name == "lds" else 90
            axes.scatter(
                [x], [y], s=size, marker="*", color=colours[name], edgecolor="white", zorder=4,
                linewidth=0.7, label="LDS as compared" if name == "lds" else name.upper(),
            )  # fmt: skip
        else:
            outside.append(f"{name.upper()}  {x:.2f} / {y:.2f}")
    if outside:
        text = "beyond this panel (deviation / time):\n" + "\n".join(outside)
        axes.text(
            0.03, 0.03, text, transform=axes.transAxes, fontsize=7.5, color=_DIM, va="bottom"
        )  # fmt: skip


def _draw_deviation(axes: Axes, picture: Picture) -> None:
    axes.set_title("Batch deviation over the epoch (moving mean)")
    axes.set_xlabel("share of the epoch's samples that are used up")
    axes.set_ylabel("L1 distance to the pooled class mix")
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:.0f} %")
    tops = []
    for (name, play), colour in zip(
        picture.plays.items(), _colours(list(picture.plays)).values(), strict=True
    ):
        used_T = 100 * np.cumsum(play.samples_T) / play.samples_T.sum()
        smooth_T = smooth(play.deviation_T, max(1, play.steps // 25))
        width = 2.2 if name == picture.focus else 1.4
        axes.plot(used_T, smooth_T, color=colour, label=name.upper(), linewidth=width)
        if name not in {"fls", "fpls"}:
            tops.append(float(smooth_T.max()))
    pooled_M = picture.fleet.label_counts_KM.sum(axis=0)
    chance = chance_deviation(pooled_M / pooled_M.sum(), picture.global_batch)
    axes.axhline(chance, color=_INK, linestyle="--", linewidth=1.3, label="uniform batch")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, max(3.0 * chance, 1.15 * max([chance, *tops])) or 1.0)
    axes.legend(loc="upper left", ncols=2)


def _draw_heat(figure: Figure, axes: Axes, picture: Picture) -> None:
    play = picture.plays[picture.focus]
    axes.set_title(
        f"{picture.focus.upper()}: samples that each device gives to each step, the slowest on top"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("device, and what a contribution takes")
    axes.grid(visible=False)
    typical_s_K = picture.fleet.delays.typical_s(picture.fleet.held_K, picture.global_batch)
    order_K = np.argsort(-typical_s_K, kind="stable")
    cells = heat_cells(play.counts or (), order_K, most_rows=MOST_ROWS, most_columns=MOST_COLUMNS)
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # noqa: PLC0415

    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("samples", HEAT_COLOURS),
        # A root scale: one step that a straggler fills would hide all that the others do.
        norm=PowerNorm(0.5, vmin=0.0, vmax=max(1.0, float(cells.max()))),
        extent=(-0.5, play.steps - 0.5, order_K.size - 0.5, -0.5),
    )
    pooled = cells.shape != (order_K.size, play.steps)
    figure.colorbar(
        image, ax=axes, label="mean samples" if pooled else "samples", pad=0.01, fraction=0.03
    )
    stride = -(-order_K.size // _MOST_ROW_LABELS)
    rows = range(0, order_K.size, stride)
    labels = [
        _row_label(picture, int(order_K[row]), float(typical_s_K[order_K[row]])) for row in rows
    ]
    axes.set_yticks(list(rows), labels, fontsize=8)


def _row_label(picture: Picture, device: int, typical_s: float) -> str:
    name = picture.fleet.name_of(device)
    name = name if len(name) <= 18 else name[:17] + "…"
    return f"{name}  {format_seconds(typical_s)}".replace("$", r"\$")
