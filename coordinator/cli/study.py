"""``coordinator study``: train what the policies make of one fleet, and compare."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wire.command import stop_on_signals
from wire.exit_codes import ExitCode

if TYPE_CHECKING:
    from coordinator.study.output import StudyDocument
    from coordinator.study.settings import StudySettings


def study(
    quick: Annotated[
        bool, typer.Option("--quick", help="The digits, one kind of fleet, 3 seeds: seconds.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="fashion-mnist, digits or FILE.npz with x and y.  [fashion-mnist]"),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Test samples for --data FILE.npz.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with Fashion-MNIST's files.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Training samples to use.  [all]")
    ] = None,
    test_samples: Annotated[
        int | None, typer.Option(min=1, help="Test samples to use.  [all]")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="LIST", help="Numbers of devices.  [16,32,64,128]")
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="iid, mild (5 classes a device, alpha 3), severe (2 classes), or C/ALPHA."
            "  [iid,mild,severe]",
        ),
    ] = None,
    stragglers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Shares of slow devices.  [0,0.1]")
    ] = None,
    straggler_factor: Annotated[
        float | None, typer.Option(help="How many times longer a slow device takes.  [10]")
    ] = None,
    delay_fixed_s: Annotated[
        float | None, typer.Option(help="Seconds that a device takes for a step.  [1]")
    ] = None,
    delay_per_sample_s: Annotated[
        float | None, typer.Option(help="Seconds more for each of its samples.  [0]")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="undivided and policies, also as lds:delta=1, lds:budget=0.2.  [all]",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="LIST", help="Seeds, such as 0,1,2 or 0-4.  [0-2]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs.  [4]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Global batch.  [128]")] = None,
    network: Annotated[
        str | None, typer.Option(help="mlp, cnn2d, cnn1d, resnet18 or module:function.")
    ] = None,
    network_arguments: Annotated[
        str | None, typer.Option(metavar="JSON", help='Such as {"channels": [8, 16]}.')
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam.  [0.001]")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Trainings at a time, each a process with one thread.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.  [runs/study or runs/study-quick]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train the undivided network and what each policy makes of a fleet, in process, and compare.

    Writes results.csv, results.json and report.html. The same command again goes on with what is
    missing, also after it was killed. Ends with 130 if it was stopped before its end.

    Example: coordinator study --devices 16,128 --schemes severe --samples 12000 --jobs 2
    """
    from coordinator.study import options
    from coordinator.study.options import Option

    settings = options.build_settings(
        [
            Option("--data", "training.data.name", data),
            Option("--test-data", "training.data.test_file", test_data),
            Option("--data-dir", "training.data.directory", data_dir),
            Option("--samples", "training.data.samples", samples),
            Option("--test-samples", "training.data.test_samples", test_samples),
            Option("--straggler-factor", "training.delays.factor", straggler_factor),
            Option("--delay-fixed-s", "training.delays.fixed_s", delay_fixed_s),
            Option("--delay-per-sample-s", "training.delays.per_sample_s", delay_per_sample_s),
            Option("--epochs", "training.epochs", epochs),
            Option("--batch", "training.global_batch", batch),
            Option("--network", "training.network", network),
            Option(
                "--network-arguments",
                "training.network_arguments",
                options.parse_json_object(network_arguments, "--network-arguments"),
            ),
            Option("--lr", "training.optimiser.lr", lr),
            Option("--policies", "methods", options.parse_methods(policies)),
            Option("--schemes", "schemes", options.parse_schemes(schemes)),
            Option("--devices", "devices", options.parse_whole_numbers(devices, "--devices")),
            Option("--stragglers", "stragglers", options.parse_numbers(stragglers, "--stragglers")),
            Option("--seeds", "seeds", options.parse_seeds(seeds)),
        ],
        quick=quick,
    )
    folder = out or Path("runs/study-quick" if quick else "runs/study")
    document = _run(settings, folder, jobs, as_json=as_json)
    if not document.is_complete:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _run(settings: StudySettings, folder: Path, jobs: int, *, as_json: bool) -> StudyDocument:
    from coordinator.study.output import as_json as document_as_json
    from coordinator.study.progress import StudyProgress
    from coordinator.study.study import run_study
    from coordinator.study.tables import print_groups

    stopped = threading.Event()
    stop_on_signals(stopped.set)
    stream = sys.stderr if as_json else sys.stdout
    with StudyProgress(stream) as progress:
        document = run_study(settings, folder, progress, jobs=jobs, should_stop=stopped.is_set)
    if as_json:
        typer.echo(json.dumps(document_as_json(document)))
    else:
        print_groups(sys.stdout, document, folder)
    return document
