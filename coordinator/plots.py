"""A run as one picture: loss, accuracy, batch deviation and who contributed when.

Colours are from Okabe and Ito's palette, which people with any kind of colour vision tell apart:
https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from coordinator.recorder import (
    STEPS_FILE,
    SUMMARY_FILE,
    DeviceSummary,
    RunSummary,
    StepRecord,
    read_steps,
)
from coordinator.tables import SLOW_FACTOR, format_seconds, format_share
from wire.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
SIZE_INCHES = (13.0, 8.6)
MOST_COLUMNS = 320  # about one for every three pixels of the panel's width
MOST_ROWS = 100
MOST_ROW_LABELS = 26
MOST_LABEL_CHARACTERS = 18

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
HEAT_COLOURS = ("#F4F6F8", "#BBD7EC", "#6AAED6", "#2272B2", "#08306B")


def write_summary_plot(
    directory: Path, out_path: Path, *, pooled_class_counts: ArrayLike | None = None
) -> None:
    """Draw ``steps.jsonl`` and ``summary.json`` of a run's folder as a PNG.

    With ``pooled_class_counts`` (samples per class over all devices, (M,)) the deviation that
    uniform batches have by chance is drawn as a reference. Raises ModelError for a summary that
    is missing or cannot be read, ConfigError where the picture cannot be written.
    """
    summary = read_summary(directory)
    steps = read_steps(directory / STEPS_FILE)
    figure = build_figure(summary, steps, _chance_deviation(pooled_class_counts, summary))
    try:
        figure.savefig(out_path, format="png")
    except OSError as exc:
        raise ConfigError(f"expected a writable file ({exc.strerror})", source=out_path) from exc


def build_figure(
    summary: RunSummary, steps: list[StepRecord], chance: float | None = None
) -> Figure:
    """The picture; ``chance`` is the deviation that uniform batches have, None if not known."""
    with new_figure(_title(summary)) as figure:
        grid = figure.add_gridspec(2, 3, height_ratios=(1.0, 1.15))
        _draw_loss(figure.add_subplot(grid[0, 0]), steps)
        _draw_accuracy(figure.add_subplot(grid[0, 1]), summary, steps)
        _draw_deviation(figure.add_subplot(grid[0, 2]), steps, chance)
        _draw_allocation(figure, figure.add_subplot(grid[1, :]), summary, steps)
    return figure


@contextmanager
def new_figure(title: str) -> Iterator[Figure]:
    """An empty figure in our style; its panels are to be drawn inside."""
    from matplotlib import rc_context  # noqa: PLC0415 - takes a second, and only this needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    layout = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09)
    with rc_context(plot_style()):
        # No pyplot: it would keep the figure, and choose a backend for the whole process.
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12.5, fontweight="bold")
        yield figure


def read_summary(directory: Path) -> RunSummary:
    """Read a run's ``summary.json``; raise ModelError naming the file if that fails."""
    path = directory / SUMMARY_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunSummary)
    except OSError as exc:
        raise ModelError(f"{path}: expected a run's summary ({exc.strerror})") from exc
    except msgspec.DecodeError as exc:
        raise ModelError(f"{path}: expected a run's summary ({exc})") from exc


def allocation_matrix(steps: Sequence[StepRecord], devices: Sequence[str]) -> NDArray[np.float64]:
    """Samples that each device contributed to each step, (K, T); devices not named are left out."""
    row_of = {device: row for row, device in enumerate(devices)}
    counts_KT = np.zeros((len(devices), len(steps)))
    for column, record in enumerate(steps):
        for device, _, count in record.slots:
            if device in row_of:
                counts_KT[row_of[device], column] += count
    return counts_KT


def shrink(counts_KT: NDArray[np.float64], axis: int, most: int) -> NDArray[np.float64]:
    """Means over neighbours along ``axis``, so that at most ``most`` entries are left."""
    edges = group_edges(counts_KT.shape[axis], most)
    sums = np.add.reduceat(counts_KT, edges[:-1], axis=axis)
    sizes = np.diff(edges)
    means: NDArray[np.float64] = sums / (sizes[:, None] if axis == 0 else sizes[None, :])
    return means


def group_edges(count: int, most: int) -> NDArray[np.int64]:
    """Edges of at most ``most`` groups of neighbours, of sizes that differ by at most one."""
    return np.linspace(0, count, min(count, most) + 1).round().astype(np.int64)


def smooth(values_T: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred moving mean; the window is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values_T)])
    here = np.arange(len(values_T))
    low = np.maximum(0, here - window // 2)
    high = np.minimum(len(values_T), here + (window + 1) // 2 + (window + 1) % 2)
    means: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return means


def by_delay(devices: Sequence[DeviceSummary]) -> list[DeviceSummary]:
    """The slowest first; devices whose delay is not known come last."""
    return sorted(devices, key=lambda d: (d.delay_s is None, -(d.delay_s or 0.0), d.device))


def _chance_deviation(pooled_class_counts: ArrayLike | None, summary: RunSummary) -> float | None:
    if pooled_class_counts is None:
        return None
    from coordinator.allocation.budget import chance_deviation  # noqa: PLC0415

    counts_M = np.asarray(pooled_class_counts, dtype=np.float64)
    if counts_M.sum() <= 0:
        return None
    return chance_deviation(counts_M / counts_M.sum(), summary.global_batch)


def plot_style() -> Any:
    """Settings by name; matplotlib's type for them lists every name that there is."""
    return {
        "font.size": 9.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E4E7EA",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "path.simplify": True,
    }


def _title(summary: RunSummary) -> str:
    parts = [
        _short(summary.run, 32),
        f"{len(summary.devices)} device{'' if len(summary.devices) == 1 else 's'}",
        f"{_short(summary.network, 32)} cut at {_short(summary.cut_layer, 32)}",
        f"{summary.policy.upper()}, global batch {summary.global_batch}, {summary.precision}",
    ]
    if summary.test_accuracy is not None:
        parts.append(f"test accuracy {format_share(summary.test_accuracy)}")
    return "   ·   ".join(parts)


def _short(text: str, most: int = MOST_LABEL_CHARACTERS) -> str:
    """A name that fits, and that matplotlib does not read as a formula."""
    shortened = text if len(text) <= most else text[: most - 1] + "…"
    return shortened.replace("$", r"\$")


def _draw_loss(axes: Axes, steps: list[StepRecord]) -> None:
    axes.set_title("Loss")
    axes.set_xlabel("step")
    if not steps:
        _say_empty(axes)
        return
    numbers_T = np.array([record.step for record in steps])
    losses_T = np.array([record.loss for record in steps])
    window = max(1, len(steps) // 20)
    axes.plot(numbers_T, losses_T, color=_BLUE, alpha=0.25, linewidth=0.8, label="each step")
    marker = "o" if len(steps) < 3 else None
    label = f"mean of {window} steps" if window > 1 else "loss"
    smooth_T = smooth(losses_T, window)
    axes.plot(numbers_T, smooth_T, color=_BLUE, linewidth=1.8, marker=marker, label=label)
    positive = losses_T[losses_T > 0]
    if len(positive) == len(losses_T) and losses_T.max() > 30 * losses_T.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    else:
        axes.set_ylim(bottom=min(0.0, float(losses_T.min())))
    _mark_epochs(axes, steps)
    if window > 1:
        axes.legend(loc="upper right")


def _draw_accuracy(axes: Axes, summary: RunSummary, steps: list[StepRecord]) -> None:
    axes.set_title("Accuracy")
    axes.set_xlabel("epoch")
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:.0f} %")
    epochs, train = _train_accuracy(steps)
    if epochs:
        axes.plot(
            epochs, train, color=_GREY, alpha=0.75, marker=".", linewidth=1.2, label="train batches"
        )
    tested = [e for e in summary.epoch_results if e.test_accuracy is not None]
    if tested:
        numbers = [record.epoch + 1 for record in tested]
        values = [100 * (record.test_accuracy or 0.0) for record in tested]
        marker = "o" if len(tested) <= 40 else None
        axes.plot(
            numbers, values, color=_RED, marker=marker, markersize=4, linewidth=1.8, label="test"
        )
    if not epochs and not tested:
        _say_empty(axes)
        return
    _whole_epochs(axes, max([*epochs, *(record.epoch + 1 for record in tested)]))
    axes.legend(loc="lower right")


def _train_accuracy(steps: list[StepRecord]) -> tuple[list[int], list[float]]:
    """Epochs (from 1) and their mean accuracy in per cent, weighted with samples."""
    correct: dict[int, float] = {}
    samples: dict[int, int] = {}
    for record in steps:
        correct[record.epoch] = correct.get(record.epoch, 0.0) + record.accuracy * record.samples
        samples[record.epoch] = samples.get(record.epoch, 0) + record.samples
    epochs = sorted(epoch for epoch, count in samples.items() if count)
    return [e + 1 for e in epochs], [100 * correct[e] / samples[e] for e in epochs]


def _whole_epochs(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, last + 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low - 2), min(101.0, high + 2))


def _draw_deviation(axes: Axes, steps: list[StepRecord], chance: float | None) -> None:
    axes.set_title("Batch deviation")
    axes.set_xlabel("step")
    if not steps:
        _say_empty(axes)
        return
    numbers_T = np.array([record.step for record in steps])
    deviations_T = np.array([record.deviation for record in steps])
    # The last, small batches of epochs deviate far more than all others: they would flatten the
    # rest, and are marked at the upper edge instead.
    top = max(1.35 * float(np.percentile(deviations_T, 98)), 1.35 * (chance or 0.0), 1e-3)
    is_above_T = deviations_T > top
    look: dict[str, Any] = {"color": _GREEN, "linewidths": 0}
    look["alpha"] = 0.4 if len(steps) < 800 else 0.15
    axes.scatter(numbers_T[~is_above_T], deviations_T[~is_above_T], s=8, label="step", **look)
    if is_above_T.any():
        edge_T = np.full(int(is_above_T.sum()), 0.985 * top)
        look["alpha"] = 0.8
        axes.scatter(numbers_T[is_above_T], edge_T, s=14, marker="^", **look)
        axes.set_title("Batch deviation (triangles: higher)")
    label: str | None = "epoch mean"
    for first, last, mean in _epoch_means(steps):
        axes.plot([first - 0.5, last + 0.5], [mean, mean], color="#00553F", lw=2.2, label=label)
        label = None
    if chance is not None:
        axes.axhline(chance, color=_ORANGE, linestyle="--", linewidth=1.6, label="uniform batch")
    axes.set_ylim(0.0, top)
    _mark_epochs(axes, steps)
    legend = axes.legend(
        loc="lower right", ncols=3, columnspacing=1.0, handletextpad=0.5, handlelength=1.3
    )
    legend.legend_handles[0].set_alpha(0.8)  # type: ignore[union-attr]


def _epoch_means(steps: list[StepRecord]) -> list[tuple[int, int, float]]:
    """(first step, last step, mean deviation) of each epoch."""
    by_epoch: dict[int, list[StepRecord]] = {}
    for record in steps:
        by_epoch.setdefault(record.epoch, []).append(record)
    return [
        (records[0].step, records[-1].step, statistics.fmean(r.deviation for r in records))
        for records in by_epoch.values()
    ]


def _epoch_starts(steps: list[StepRecord]) -> list[int]:
    """Indices of the steps that begin an epoch, without the first."""
    return [i for i in range(1, len(steps)) if steps[i].epoch != steps[i - 1].epoch]


def _mark_epochs(axes: Axes, steps: list[StepRecord]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    starts = _epoch_starts(steps)
    axes.set_xlim(steps[0].step - 0.5, steps[-1].step + 0.5)
    if len(starts) <= 40:
        for start in starts:
            axes.axvline(steps[start].step - 0.5, color="#C4CAD0", linewidth=0.7, zorder=0.5)


def _draw_allocation(
    figure: Figure, axes: Axes, summary: RunSummary, steps: list[StepRecord]
) -> None:
    axes.set_title("Samples that each device contributed to each step, slowest device on top")
    axes.set_xlabel("step")
    axes.grid(visible=False)
    devices = by_delay(summary.devices)
    if not steps or not devices:
        _say_empty(axes)
        return
    counts_KT = allocation_matrix(steps, [device.device for device in devices])
    cells = shrink(shrink(counts_KT, 1, MOST_COLUMNS), 0, MOST_ROWS)
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # noqa: PLC0415

    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("samples", HEAT_COLOURS),
        # A root scale: one step that a straggler fills would hide all that the others do.
        norm=PowerNorm(0.5, vmin=0.0, vmax=max(1.0, float(cells.max()))),
        extent=(-0.5, len(steps) - 0.5, len(devices) - 0.5, -0.5),
    )
    means = "mean samples" if cells.shape != counts_KT.shape else "samples"
    figure.colorbar(image, ax=axes, label=means, pad=0.01, fraction=0.03)
    _label_steps(axes, steps)
    _label_devices(axes, devices)


def _label_steps(axes: Axes, steps: list[StepRecord]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    # Columns are counted; a step that nobody contributed to has a number, but no column.
    numbers_T = np.array([record.step for record in steps])
    round_numbers = MaxNLocator(14, integer=True).tick_values(numbers_T[0], numbers_T[-1])
    wanted = np.intersect1d(numbers_T, np.asarray(round_numbers).round())
    ticks = wanted if len(wanted) else numbers_T[:1]
    axes.set_xticks(np.searchsorted(numbers_T, ticks), [f"{number:.0f}" for number in ticks])
    starts = _epoch_starts(steps)
    if len(starts) <= 60:
        for start in starts:
            axes.axvline(start - 0.5, color=_ORANGE, linewidth=1.0)
    if starts:
        axes.set_xlabel("step (lines: a new epoch)" if len(starts) <= 60 else "step")


def _label_devices(axes: Axes, devices: list[DeviceSummary]) -> None:
    """Names and delays, as many as fit; stragglers stand out."""
    delays = [device.delay_s for device in devices if device.delay_s is not None]
    slow_s = SLOW_FACTOR * statistics.median(delays) if delays else float("inf")
    stride = -(-len(devices) // MOST_ROW_LABELS)
    rows = list(range(0, len(devices), stride))
    axes.set_yticks(rows, [_device_label(devices[row]) for row in rows], fontsize=8)
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        if (devices[row].delay_s or 0.0) > slow_s:
            label.set_color(_RED)
            label.set_fontweight("bold")


def _device_label(device: DeviceSummary) -> str:
    name = _short(device.device)
    return name if device.delay_s is None else f"{name}  {format_seconds(device.delay_s)}"


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no steps", transform=axes.transAxes, ha="center", color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
