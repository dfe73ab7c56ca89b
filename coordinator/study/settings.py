"""What a study trains; everything that a result depends on, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from coordinator.optimisers import OptimiserSettings
from coordinator.study.methods import Method, all_methods, parse_method
from coordinator.study.schemes import SCHEMES, Scheme
from wire.settings import Settings

FASHION_MNIST = "fashion-mnist"
DIGITS = "digits"
# Where Debian's package dataset-fashion-mnist puts the files.
FASHION_MNIST_DIRECTORY = "/usr/share/datasets/fashion-mnist"

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Seed = Annotated[int, Meta(ge=0, le=2**53)]


class DataChoice(Settings, frozen=True, kw_only=True):
    """``name`` is fashion-mnist, digits or a NumPy archive with x and y.

    ``samples`` and ``test_samples`` keep that many, the same share of each class; None keeps all.
    """

    name: str = FASHION_MNIST
    test_file: str | None = None
    directory: str = FASHION_MNIST_DIRECTORY
    samples: Count | None = None
    test_samples: Count | None = None


class DelayModel(Settings, frozen=True, kw_only=True):
    """Seconds of a device's part of a step: (fixed_s + per_sample_s * count), times ``factor``
    on the devices that are slow.
    """

    fixed_s: Seconds = 1.0
    per_sample_s: Seconds = 0.0
    factor: Annotated[float, Meta(ge=1, le=1e6)] = 10.0


class TrainingSettings(Settings, frozen=True, kw_only=True):
    """What holds for every training of the study. ``network`` None is chosen by the samples."""

    data: DataChoice = DataChoice()
    network: str | None = None
    network_arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    optimiser: OptimiserSettings = OptimiserSettings()
    epochs: Count = 4
    global_batch: Count = 128
    refit_every: Count = 10
    delays: DelayModel = DelayModel()


class StudySettings(Settings, frozen=True, kw_only=True):
    """The grid: every method for every scheme, number of devices, share of slow ones and seed."""

    training: TrainingSettings = TrainingSettings()
    methods: tuple[Method, ...] = msgspec.field(default_factory=all_methods)
    schemes: tuple[Scheme, ...] = tuple(SCHEMES.values())
    devices: tuple[Count, ...] = (16, 32, 64, 128)
    stragglers: tuple[Share, ...] = (0.0, 0.1)
    seeds: tuple[Seed, ...] = (0, 1, 2)


QUICK = StudySettings(
    training=TrainingSettings(
        data=DataChoice(name=DIGITS),
        network="mlp",
        optimiser=OptimiserSettings(lr=6e-3),
        global_batch=64,
    ),
    methods=tuple(
        parse_method(name) for name in ("undivided", "fls", "fpls", "ugs", "lds", "class-targeted")
    ),
    schemes=(SCHEMES["severe"],),
    devices=(32,),
    stragglers=(0.1,),
)
