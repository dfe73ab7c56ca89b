"""The options of ``coordinator simulate``, in the groups that its help shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.demo_options import BATCH_NAMES

DEFAULT_SEEDS = "3"


def _who(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Who holds what", **settings)


def _slow(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="How slow devices are", **settings)


def _what(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="What to compare", **settings)


def _out(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Output", **settings)


LabelCounts = Annotated[
    str | None,
    _who(metavar="FILE.json", help="A matrix: a row per device, a column per class."),
]
PopulationFrom = Annotated[
    str | None,
    _who(metavar="RUN", help="Label counts of a run: its folder, or URL#RUN of its store."),
]
Devices = Annotated[int | None, _who(help="Devices to make up (128).")]
Samples = Annotated[int | None, _who(help="Samples of all together (50000).")]
Classes = Annotated[int | None, _who(help="Classes, equally frequent (10).")]
ClassesPerDevice = Annotated[
    int | None, _who("-C", "--classes-per-device", help="C of extended Dirichlet (2).")
]
Alpha = Annotated[float | None, _who(help="alpha of extended Dirichlet (3); small: unequal sizes.")]
Iid = Annotated[bool, _who("--iid", help="Shuffle, and deal out equally.")]

Delays = Annotated[
    str | None,
    _slow(metavar="FILE.json", help="A list: seconds, or pairs of fixed_s, per_sample_s."),
]
DelaysFrom = Annotated[str | None, _slow(metavar="RUN", help="Delays as a run has measured them.")]
Stragglers = Annotated[
    str | None, _slow(metavar="N|SHARE%", help="How many devices are slow (10%).")
]
Factor = Annotated[float | None, _slow(help="How many times as long they take (10).")]
Lognormal = Annotated[
    float | None, _slow(metavar="SIGMA", help="In place of stragglers: log-normal factors.")
]
FixedS = Annotated[float | None, _slow(help="Seconds a step takes an ordinary device (1).")]
PerSampleS = Annotated[float | None, _slow(help="Seconds that each sample adds (0).")]

Policies = Annotated[
    list[str] | None,
    _what(
        "-p",
        "--policies",
        "--policy",
        metavar="NAMES",
        help="With commas between; UGS is always among them. LDS also as lds@DELTA or "
        "lds@BUDGET%. (all)",
    ),
]
GlobalBatch = Annotated[int, _what(*BATCH_NAMES, help="Samples of a step.")]
Delta = Annotated[float | None, _what(help="LDS's delta.")]
DeviationBudget = Annotated[
    float | None, _what(help="Chooses delta: deviation allowed over UGS's (0.1).")
]
MaxBatch = Annotated[
    str | None,
    _what(metavar="N|FILE.json", help="Most samples of a device in a step: for all, or a list."),
]
RefitEvery = Annotated[int, _what(help="Steps between LDS's refits.")]
Seeds = Annotated[str, _what(metavar="N|LIST", help="How many seeds, or which: 0,1,2.")]
FirstSeed = Annotated[int, _what("--seed", help="The first seed.")]
FleetSeed = Annotated[int | None, _what(help="Keep one made-up fleet for all seeds.")]

AsJson = Annotated[bool, _out("--json", help="Print JSON.")]
CsvFile = Annotated[
    Path | None, _out("--csv", metavar="FILE", help="Write a row per policy and seed.")
]
PlotFile = Annotated[
    Path | None,
    _out("--plot", metavar="FILE.png", help="Draw delta sweep, deviation, and who gave when."),
]
