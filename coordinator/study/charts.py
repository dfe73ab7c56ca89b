"""The study's pictures as SVG text: accuracy of every method, and accuracy over modelled time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coordinator.study.cells import Fleet
from coordinator.study.methods import Method
from coordinator.study.summary import Group, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any kind of colour vision tell apart:
# https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_PANEL_WIDTH, _PANEL_HEIGHT = 4.4, 3.1  # inches
_STYLE: Any = {  # matplotlib's stubs list every key
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "svg.fonttype": "path",  # the page looks the same wherever it is read
    "svg.hashsalt": "splitfleet",  # and the same results give the same bytes
}

Value = Callable[[Group], Interval | None]


def accuracy_chart(groups: Sequence[Group]) -> str | None:
    """Accuracy of each method with its interval: a panel for each scheme and share of slow ones.

    The line is the undivided network's. None without fleets.
    """
    fleets = _fleets(groups)
    if not fleets:
        return None
    columns = list(dict.fromkeys(fleet.scheme.name for fleet in fleets))
    rows = list(dict.fromkeys(fleet.stragglers for fleet in fleets))
    with _figure(len(rows), len(columns)) as (figure, out):
        axes = figure.subplots(len(rows), len(columns), sharey=True, squeeze=False)
        for y, stragglers in enumerate(rows):
            for x, scheme in enumerate(columns):
                own = [
                    fleet
                    for fleet in fleets
                    if fleet.scheme.name == scheme and fleet.stragglers == stragglers
                ]
                _draw_accuracies(axes[y][x], groups, own)
                axes[y][x].set_title(f"{scheme}, {stragglers:.0%} slow")
            axes[y][0].set_ylabel("test accuracy, %")
        axes[0][0].set_ylim(*accuracy_limits_percent(groups))
        _add_legend(figure, axes[0][0])
    return _inline(out)


def accuracy_limits_percent(groups: Sequence[Group]) -> tuple[float, float]:
    """Lowest and highest accuracy to show: all means are inside, wide intervals may be cut off."""
    lowest = min(100 * group.accuracy.mean for group in groups)
    return max(0.0, 10.0 * math.floor((lowest - 3) / 10)), 100.0


def race_chart(groups: Sequence[Group]) -> str | None:
    """Accuracy at each epoch's end over modelled time, on the largest fleet of each scheme.

    None where no fleet has slow devices.
    """
    fleets = [fleet for fleet in _fleets(groups) if fleet.stragglers > 0]
    largest = max((fleet.devices for fleet in fleets), default=0)
    chosen = [fleet for fleet in fleets if fleet.devices == largest]
    if not chosen:
        return None
    with _figure(1, len(chosen)) as (figure, out):
        axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for panel, fleet in zip(axes, chosen, strict=True):
            _draw_race(panel, groups, fleet)
        axes[0].set_ylabel("test accuracy, %")
        _add_legend(figure, axes[0])
    return _inline(out)


@contextmanager
def _figure(rows: int, columns: int) -> Iterator[tuple[Figure, io.StringIO]]:
    """An empty figure; on leaving it is drawn into the buffer."""
    from matplotlib import rc_context  # noqa: PLC0415 - takes a second, and only this needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    size = (_PANEL_WIDTH * columns + 1.8, _PANEL_HEIGHT * rows + 0.2)
    out = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, out
        figure.savefig(out, format="svg", metadata={"Date": None})


def _inline(out: io.StringIO) -> str:
    """Without the XML declaration, which has no place inside a page."""
    text = out.getvalue()
    return text[text.index("<svg") :]


def _fleets(groups: Sequence[Group]) -> list[Fleet]:
    return list(dict.fromkeys(group.fleet for group in groups if group.fleet is not None))


def _methods(groups: Sequence[Group]) -> list[Method]:
    return list(dict.fromkeys(group.method for group in groups))


def _look(groups: Sequence[Group], method: Method) -> dict[str, Any]:
    index = _methods(groups).index(method)
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "label": method.label}


def _draw_accuracies(axes: Axes, groups: Sequence[Group], fleets: Sequence[Fleet]) -> None:
    methods = [method for method in _methods(groups) if method.policy is not None]
    _draw_undivided(axes, groups)
    for number, method in enumerate(methods):
        shift = 0.7 * ((number + 0.5) / len(methods) - 0.5)
        own = {g.fleet: g.accuracy for g in groups if g.method == method and g.fleet in fleets}
        points = [(x, own[fleet]) for x, fleet in enumerate(fleets) if fleet in own]
        axes.errorbar(
            [x + shift for x, _ in points],
            [100 * value.mean for _, value in points],
            yerr=[100 * (value.half_width or 0.0) for _, value in points],
            linestyle="none",
            capsize=2,
            **_look(groups, method),
        )
    axes.set_xticks(range(len(fleets)), [f"{fleet.devices} devices" for fleet in fleets])
    axes.set_xlim(-0.5, len(fleets) - 0.5)


def _draw_undivided(axes: Axes, groups: Sequence[Group]) -> None:
    for group in groups:
        if group.method.policy is None:
            colour = _look(groups, group.method)["color"]
            level = 100 * group.accuracy.mean
            axes.axhline(level, color=colour, linewidth=1, linestyle="--", label="undivided")


def _draw_race(axes: Axes, groups: Sequence[Group], fleet: Fleet) -> None:
    _draw_undivided(axes, groups)
    for group in groups:
        if group.fleet == fleet and group.curve_s is not None:
            hours = [seconds / 3600 for seconds in group.curve_s]
            axes.plot(hours, [100 * share for share in group.curve], **_look(groups, group.method))
    axes.set_title(f"{fleet.scheme.name}, {fleet.devices} devices, {fleet.stragglers:.0%} slow")
    axes.set_xlabel("modelled time, hours")
    axes.set_xlim(left=0)


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
