"""The pooled samples that a study deals out to its devices, and the test samples.

Shapes: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.study.settings import DIGITS, FASHION_MNIST, DataChoice
from edge_agent.datasets import (
    DataSettings,
    IdxSource,
    LabelledData,
    NormalizeSettings,
    NpzSource,
    load_data,
)
from wire.errors import ConfigError

CLASSES = 10
# Measured on all training images, as in configs/fashion-mnist.yaml.
_FASHION_MNIST_SCALE = NormalizeSettings(mean=0.286, std=0.353)
# Which samples a subset keeps is no part of what seeds vary: every training sees the same pool.
_SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """The pooled training samples and the test samples, of the same shape and classes."""

    train: LabelledData
    test: LabelledData

    @property
    def classes(self) -> int:
        return self.train.classes


def load_study_data(choice: DataChoice) -> StudyData:
    """Read what ``choice`` names; raise ConfigError naming option or file."""
    train, test = _read(choice)
    if train.sample_shape != test.sample_shape:
        raise ConfigError(
            f"expected samples of shape {train.sample_shape} as in --data, "
            f"found {test.sample_shape}",
            source=f"--test-data {choice.test_file}",
        )
    return StudyData(
        train=_subset(train, choice.samples, "--samples"),
        test=_subset(test, choice.test_samples, "--test-samples"),
    )


def _read(choice: DataChoice) -> tuple[LabelledData, LabelledData]:
    if choice.name == FASHION_MNIST:
        return _fashion_mnist(choice, "train"), _fashion_mnist(choice, "t10k")
    if choice.name == DIGITS:
        return _digits("train"), _digits("test")
    if not choice.name.endswith(".npz"):
        raise ConfigError(
            f"expected {FASHION_MNIST}, {DIGITS} or FILE.npz, found {choice.name!r}",
            source="--data",
        )
    if choice.test_file is None:
        raise ConfigError("expected --test-data FILE.npz with it", source="--data")
    return _own_files(choice.name, choice.test_file)


def _fashion_mnist(choice: DataChoice, part: str) -> LabelledData:
    directory = Path(choice.directory)
    images = directory / f"{part}-images-idx3-ubyte.gz"
    if not images.exists():
        raise ConfigError(
            f"expected {images.name} there; Debian's package dataset-fashion-mnist has it, "
            f"--data-dir names another folder, --data {DIGITS} needs none",
            source=directory,
        )
    labels = directory / f"{part}-labels-idx1-ubyte.gz"
    settings = DataSettings(
        idx=IdxSource(images=str(images), labels=str(labels)),
        classes=CLASSES,
        normalize=_FASHION_MNIST_SCALE,
    )
    return load_data(settings, source=f"--data {FASHION_MNIST}")


def _digits(part: str) -> LabelledData:
    function = f"edge_agent.datasets.samples:digits_{part}"
    return load_data(DataSettings(function=function, classes=CLASSES), source=f"--data {DIGITS}")


def _own_files(train_file: str, test_file: str) -> tuple[LabelledData, LabelledData]:
    train = _own_file(train_file, "--data", None)
    test = _own_file(test_file, "--test-data", None)
    classes = max(train.classes, test.classes)
    return (
        LabelledData(x=train.x, y=train.y, classes=classes),
        LabelledData(x=test.x, y=test.y, classes=classes),
    )


def _own_file(path: str, option: str, classes: int | None) -> LabelledData:
    settings = DataSettings(npz=NpzSource(path=path), classes=classes)
    return load_data(settings, source=option, field="npz")


def _subset(data: LabelledData, samples: int | None, option: str) -> LabelledData:
    """Keep ``samples`` of them, of each class its share; which ones never changes."""
    if samples is None or samples == len(data):
        return data
    if samples > len(data):
        raise ConfigError(f"expected at most {len(data):,}, found {samples:,}", source=option)
    chosen = np.sort(_spread_over_classes(data.y)[:samples])
    return LabelledData(x=data.x[chosen], y=data.y[chosen], classes=data.classes)


def _spread_over_classes(y_N: NDArray[np.int64]) -> NDArray[np.intp]:
    """An order of the samples in which every beginning holds the classes in their shares, (N,)."""
    rng = np.random.Generator(np.random.PCG64(_SUBSET_SEED))
    position_N = np.empty(len(y_N))
    for label in np.unique(y_N):
        members = rng.permutation(np.flatnonzero(y_N == label))
        position_N[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position_N, kind="stable")


def describe_choice(choice: DataChoice) -> str:
    """For people: which data, and how much of it."""
    parts = [choice.name]
    if choice.samples is not None:
        parts.append(f"{choice.samples:,} training samples")
    if choice.test_samples is not None:
        parts.append(f"{choice.test_samples:,} test samples")
    return ", ".join(parts)


def absolute(choice: DataChoice) -> DataChoice:
    """With absolute paths, so that a study that is resumed elsewhere knows its files."""
    test_file = None if choice.test_file is None else str(Path(choice.test_file).resolve())
    name = str(Path(choice.name).resolve()) if choice.name.endswith(".npz") else choice.name
    return msgspec.structs.replace(choice, name=name, test_file=test_file)
