"""Measurements for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from edge_agent.measuring.compare import Comparison, Result

_UNITS = ("B", "kB", "MB", "GB")
NONE = "-"


def format_bytes(count: float) -> str:
    """Bytes with a decimal unit, such as ``268 MB``."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.3g} {_UNITS[unit]}" if count < 1000 else f"{count:.0f} {_UNITS[unit]}"


def format_milliseconds(seconds: float | None) -> str:
    """Milliseconds with three digits, such as ``1.25 ms``; a dash for None."""
    return NONE if seconds is None else f"{_three_digits(1e3 * seconds)} ms"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def comparison_table(comparison: Comparison) -> Table:
    """One row per batch size and backend."""
    from rich.table import Table  # noqa: PLC0415 - an agent that runs never needs it

    table = Table(box=None, pad_edge=False)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    for column in ("forward", "backward", "step", "cpu time", "samples/s", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in comparison.results:
        table.add_row(*_row(result))
    return table


def _row(result: Result) -> tuple[str, ...]:
    times = result.times
    return (
        str(result.batch),
        result.backend,
        format_milliseconds(times.forward_median_s),
        format_milliseconds(times.backward_median_s),
        format_milliseconds(times.step_median_s),
        format_milliseconds(times.step_cpu_median_s),
        f"{result.batch / times.step_median_s:.0f}",
        format_bytes(result.peak_rss_bytes),
    )


def comparison_notes(comparison: Comparison) -> Iterator[str]:
    """How long each backend took to start, what was left out and why, and the ratio of both."""
    for name, seconds in comparison.start_s.items():
        yield f"{name}: {seconds:.1f} s from the start of a process until the bundle is loaded"
    for contender in comparison.contenders:
        if contender.problem:
            yield f"{contender.name}: not measured: {contender.problem}"
    for batch in sorted({result.batch for result in comparison.results}):
        onnx, torch = (comparison.find(name, batch) for name in ("onnxruntime", "torch"))
        if onnx is not None and torch is not None:
            yield (
                f"batch {batch}: ONNX Runtime takes {_ratio(onnx, torch):.2f} times the time of "
                f"PyTorch and {onnx.peak_rss_bytes / torch.peak_rss_bytes:.2f} times its memory"
            )


def _ratio(onnx: Result, torch: Result) -> float:
    return onnx.times.step_median_s / torch.times.step_median_s
