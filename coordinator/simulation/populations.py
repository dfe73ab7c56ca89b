"""Who holds how many samples of which class: made-up populations for simulations and studies.

A population is its label counts, (K, M) int64: samples per device and class. Pure functions.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_agent.datasets.partition import dirichlet_label_counts

IntArray = NDArray[np.int64]

# Its own stream of a seed, so that a population and delays of the same seed are independent.
_POPULATION_STREAM = 10


class Scheme(StrEnum):
    """How samples are dealt out to devices."""

    IID = "iid"
    DIRICHLET = "dirichlet"


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationSettings:
    """A population to make up; the classes have the same number of samples, give or take one.

    ``classes_per_device`` (C) and ``alpha`` are those of the extended Dirichlet scheme: each device
    gets C classes (None: all), and each class is dealt to its holders in Dirichlet(alpha) shares.
    ``iid`` deals the shuffled samples out in parts of equal size. Wrong values raise ValueError
    when the population is built.
    """

    devices: int
    samples: int
    classes: int = 10
    scheme: Scheme = Scheme.DIRICHLET
    classes_per_device: int | None = 2
    alpha: float = 3.0


def build_label_counts(settings: PopulationSettings, seed: int) -> IntArray:
    """The population of ``settings`` that belongs to ``seed``: (K, M)."""
    totals_M = even_class_totals(settings.samples, settings.classes)
    if settings.scheme is Scheme.IID:
        return iid_label_counts(totals_M, settings.devices, seed)
    return dirichlet_label_counts(
        totals_M, settings.devices, settings.classes_per_device, settings.alpha, seed
    )


def even_class_totals(samples: int, classes: int) -> IntArray:
    """Samples per class, (M,), that differ by at most one and sum up to ``samples``."""
    if classes < 1:
        raise ValueError(f"expected at least 1 class, found {classes}")
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, found {samples}")
    return _even_parts(samples, classes)


def iid_label_counts(class_totals: ArrayLike, devices: int, seed: int) -> IntArray:
    """Deal shuffled samples out in parts of equal size, give or take one: (K, M).

    class_totals: (M,) samples per class; columns sum up to them. A device's classes are then
    distributed as in a uniform draw without replacement from the pool.
    """
    left_M = np.array(class_totals, dtype=np.int64)
    if devices < 1:
        raise ValueError(f"expected at least 1 device, found {devices}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _POPULATION_STREAM])))
    sizes_K = _even_parts(int(left_M.sum()), devices)
    counts_KM = np.empty((devices, left_M.size), dtype=np.int64)
    for k, size in enumerate(sizes_K):
        counts_KM[k] = rng.multivariate_hypergeometric(left_M, size)
        left_M -= counts_KM[k]
    return counts_KM


def _even_parts(total: int, parts: int) -> IntArray:
    """The first ``total mod parts`` parts have one more."""
    return np.full(parts, total // parts) + (np.arange(parts) < total % parts)
