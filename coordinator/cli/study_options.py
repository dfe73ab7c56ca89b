"""The options of ``coordinator study``; None leaves what --quick, or else the study, has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.demo_options import BATCH_NAMES

if TYPE_CHECKING:
    from coordinator.study.settings import StudySettings


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which samples."""

    data: Annotated[
        str | None,
        typer.Option(help="fashion-mnist, digits or FILE.npz with x and y. (fashion-mnist)"),
    ] = None
    test_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Test samples for --data FILE.npz.")
    ] = None
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with Fashion-MNIST's files.")
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="Training samples to use. (all)")] = (
        None
    )
    test_samples: Annotated[int | None, typer.Option(min=1, help="Test samples to use. (all)")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class FleetsOptions:
    """Who holds which of them, and how slow they are."""

    devices: Annotated[
        str | None, typer.Option(metavar="LIST", help="Numbers of devices. (16,32,64,128)")
    ] = None
    schemes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="iid, mild (5 classes a device, alpha 3), severe (2 classes), or C/ALPHA. "
            "(iid,mild,severe)",
        ),
    ] = None
    stragglers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Shares of slow devices. (0,0.1)")
    ] = None
    straggler_factor: Annotated[
        float | None, typer.Option(help="How many times longer a slow device takes. (10)")
    ] = None
    delay_fixed_s: Annotated[
        float | None, typer.Option(help="Seconds that a device takes for a step. (1)")
    ] = None
    delay_per_sample_s: Annotated[
        float | None, typer.Option(help="Seconds more for each of its samples. (0)")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingsOptions:
    """What is trained on it."""

    policies: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="undivided and policies, also as lds:delta=1, lds:budget=0.2. (all)",
        ),
    ] = None
    seeds: Annotated[
        str | None, typer.Option(metavar="LIST", help="Seeds, such as 0,1,2 or 0-4. (0-2)")
    ] = None
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs. (4)")] = None
    batch: Annotated[
        int | None, typer.Option(*BATCH_NAMES, min=1, help="Samples of a step. (128)")
    ] = None
    network: Annotated[
        str | None, typer.Option(help="mlp, cnn2d, cnn1d, resnet18 or module:function.")
    ] = None
    network_arguments: Annotated[
        str | None, typer.Option(metavar="JSON", help='Such as {"channels": [8, 16]}.')
    ] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam. (0.001)")] = None


def build_settings(
    data: DataOptions, fleets: FleetsOptions, trainings: TrainingsOptions, *, quick: bool
) -> StudySettings:
    """The study that these options describe; raises ConfigError naming the one that is wrong."""
    from coordinator.study import options
    from coordinator.study.options import Option

    arguments = options.parse_json_object(trainings.network_arguments, "--network-arguments")
    devices = options.parse_whole_numbers(fleets.devices, "--devices")
    stragglers = options.parse_numbers(fleets.stragglers, "--stragglers")
    return options.build_settings(
        [
            Option("--data", "training.data.name", data.data),
            Option("--test-data", "training.data.test_file", data.test_data),
            Option("--data-dir", "training.data.directory", data.data_dir),
            Option("--samples", "training.data.samples", data.samples),
            Option("--test-samples", "training.data.test_samples", data.test_samples),
            Option("--straggler-factor", "training.delays.factor", fleets.straggler_factor),
            Option("--delay-fixed-s", "training.delays.fixed_s", fleets.delay_fixed_s),
            Option(
                "--delay-per-sample-s", "training.delays.per_sample_s", fleets.delay_per_sample_s
            ),
            Option("--epochs", "training.epochs", trainings.epochs),
            Option("--batch", "training.global_batch", trainings.batch),
            Option("--network", "training.network", trainings.network),
            Option("--network-arguments", "training.network_arguments", arguments),
            Option("--lr", "training.optimiser.lr", trainings.lr),
            Option("--policies", "methods", options.parse_methods(trainings.policies)),
            Option("--schemes", "schemes", options.parse_schemes(fleets.schemes)),
            Option("--devices", "devices", devices),
            Option("--stragglers", "stragglers", stragglers),
            Option("--seeds", "seeds", options.parse_seeds(trainings.seeds)),
        ],
        quick=quick,
    )
