"""From what a person asked for to fleets: which options belong together, and what they mean.

Every refusal is a ConfigError that names the option and what is possible.

Shapes: K devices, M classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from coordinator.simulation.delay_models import (
    BaseDelay,
    DeviceDelays,
    lognormal_delays,
    straggler_delays,
)
from coordinator.simulation.fleet import IntArray, SimulatedFleet
from coordinator.simulation.inputs import (
    GivenDelays,
    GivenPopulation,
    read_delays,
    read_label_counts,
    read_max_batch,
)
from coordinator.simulation.populations import PopulationSettings, Scheme, build_label_counts
from coordinator.simulation.recorded import RecordedRun
from wire.errors import ConfigError

T = TypeVar("T")
ReadRun = Callable[[str, str], RecordedRun]

DEFAULT_DEVICES = 128
DEFAULT_SAMPLES = 50_000
DEFAULT_CLASSES = 10
DEFAULT_CLASSES_PER_DEVICE = 2
DEFAULT_ALPHA = 3.0
DEFAULT_STRAGGLERS = "10%"
DEFAULT_FACTOR = 10.0
DEFAULT_GLOBAL_BATCH = 128
MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationOptions:
    """Who holds what: a file, a run, or a population to make up. None is what was not asked for."""

    label_counts: str | None = None
    population_from: str | None = None
    devices: int | None = None
    samples: int | None = None
    classes: int | None = None
    iid: bool = False
    classes_per_device: int | None = None
    alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayOptions:
    """How slow devices are: a file, a run, log-normal factors, or stragglers (the default)."""

    delays: str | None = None
    delays_from: str | None = None
    lognormal: float | None = None
    stragglers: str | None = None
    factor: float | None = None
    fixed_s: float | None = None
    per_sample_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """A fleet to simulate; ``fleet_seed`` keeps a made-up one the same for all seeds."""

    population: PopulationOptions = field(default_factory=PopulationOptions)
    delays: DelayOptions = field(default_factory=DelayOptions)
    max_batch: str | None = None
    fleet_seed: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FleetSource:
    """Builds the fleet of a seed; what was read is the same for all of them."""

    population: GivenPopulation | PopulationSettings
    delays: GivenDelays | DelayOptions
    max_batch_K: IntArray | None
    fleet_seed: int | None

    @property
    def is_made_up(self) -> bool:
        """Whether another seed may give another fleet."""
        made_up = isinstance(self.population, PopulationSettings) or isinstance(
            self.delays, DelayOptions
        )
        return made_up and self.fleet_seed is None

    def fleet_of(self, seed: int) -> SimulatedFleet:
        """The fleet of a seed."""
        seed = seed if self.fleet_seed is None else self.fleet_seed
        if isinstance(self.population, PopulationSettings):
            settings = self.population
            counts_KM = build_label_counts(settings, seed)
            names = self.delays.names if isinstance(self.delays, GivenDelays) else None
        else:
            counts_KM, names = self.population.label_counts_KM, self.population.names
        if isinstance(self.delays, GivenDelays):
            delays = self.delays.in_order_of(names, source="delays")
        else:
            delays = _build_delays(self.delays, len(counts_KM), seed)
        return SimulatedFleet(counts_KM, delays, self.max_batch_K, names)


def open_fleet(options: FleetOptions, read_run: ReadRun) -> FleetSource:
    """Read what the options name and check that it fits together.

    read_run: gives a run's devices for what ``--population-from`` and ``--delays-from`` say, and
    the option's name for errors. Raises ConfigError.
    """
    population = _open_population(options.population, read_run)
    delays = _open_delays(options.delays, read_run)
    if isinstance(population, PopulationSettings):
        population = _with_devices(population, options.population.devices, delays)
        _check_population(population)
        devices = population.devices
    else:
        devices = len(population.label_counts_KM)
        if isinstance(delays, GivenDelays):
            delays = _matched(population, delays, options)
    max_batch_K = None if isinstance(population, PopulationSettings) else population.max_batch_K
    if options.max_batch is not None:
        max_batch_K = read_max_batch(options.max_batch, devices)
    if isinstance(delays, DelayOptions) and delays.stragglers is not None:
        _count_or_share(delays.stragglers, devices)
    return FleetSource(population, delays, max_batch_K, options.fleet_seed)


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """``3``: three seeds from ``first`` on; ``1,5,9``: these seeds."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) > 1 and min(numbers) >= 0 and len(numbers) <= MOST_SEEDS:
        return tuple(dict.fromkeys(numbers))
    if len(numbers) == 1 and 1 <= numbers[0] <= MOST_SEEDS:
        return tuple(range(first, first + numbers[0]))
    raise ConfigError(
        f"expected how many seeds (1 to {MOST_SEEDS}) or a list such as 0,1,2, found {text!r}",
        field="--seeds",
    )


def _open_population(
    options: PopulationOptions, read_run: ReadRun
) -> GivenPopulation | PopulationSettings:
    _at_most_one(options, "label_counts", "population_from")
    given = options.label_counts or options.population_from
    if given:
        made_up = {"devices", "samples", "classes", "iid", "classes_per_device", "alpha"}
        beside = "label_counts" if options.label_counts else "population_from"
        _none_beside(options, made_up, beside)
    if options.label_counts:
        return read_label_counts(options.label_counts)
    if options.population_from:
        return read_run(options.population_from, "--population-from").population()
    if options.iid:
        _none_beside(options, {"classes_per_device", "alpha"}, "iid")
    classes = _or(options.classes, DEFAULT_CLASSES)
    return PopulationSettings(
        devices=_or(options.devices, DEFAULT_DEVICES),
        samples=_or(options.samples, DEFAULT_SAMPLES),
        classes=classes,
        scheme=Scheme.IID if options.iid else Scheme.DIRICHLET,
        classes_per_device=_or(
            options.classes_per_device, min(DEFAULT_CLASSES_PER_DEVICE, classes)
        ),
        alpha=_or(options.alpha, DEFAULT_ALPHA),
    )


def _open_delays(options: DelayOptions, read_run: ReadRun) -> GivenDelays | DelayOptions:
    _at_most_one(options, "delays", "delays_from", "lognormal", "stragglers")
    _at_most_one(options, "delays", "delays_from", "lognormal", "factor")
    given = options.delays or options.delays_from
    if given:
        beside = "delays" if options.delays else "delays_from"
        _none_beside(options, {"fixed_s", "per_sample_s"}, beside)
    if options.delays:
        return read_delays(options.delays)
    if options.delays_from:
        return read_run(options.delays_from, "--delays-from").delays()
    _check_delay_options(options)
    return options


def _with_devices(
    settings: PopulationSettings, asked: int | None, delays: GivenDelays | DelayOptions
) -> PopulationSettings:
    """Given delays say how many devices there are."""
    if not isinstance(delays, GivenDelays):
        return settings
    known = delays.delays.devices
    if asked not in {None, known}:
        raise ConfigError(
            f"expected {known}, as many as there are delays, found {asked}", field="--devices"
        )
    return replace(settings, devices=known)


def _matched(
    population: GivenPopulation, delays: GivenDelays, options: FleetOptions
) -> GivenDelays:
    """The delays in the order of the population; the two must be of the same devices."""
    option = "--delays" if options.delays.delays else "--delays-from"
    where = options.delays.delays or options.delays.delays_from
    source = f"{option} {where}"
    if population.names is None or delays.names is None:
        expected, found = len(population.label_counts_KM), delays.delays.devices
        if expected != found:
            raise ConfigError(
                f"expected {expected} delays, as many as devices in the label counts, "
                f"found {found}",
                source=source,
            )
        return delays
    return GivenDelays(delays.in_order_of(population.names, source=source), population.names)


def _build_delays(options: DelayOptions, devices: int, seed: int) -> DeviceDelays:
    base = BaseDelay(_or(options.fixed_s, 1.0), _or(options.per_sample_s, 0.0))
    if options.lognormal is not None:
        return lognormal_delays(devices, base, sigma=options.lognormal, seed=seed)
    return straggler_delays(
        devices,
        base,
        stragglers=_count_or_share(_or(options.stragglers, DEFAULT_STRAGGLERS), devices),
        factor=_or(options.factor, DEFAULT_FACTOR),
        seed=seed,
    )


def _check_delay_options(options: DelayOptions) -> None:
    for name in ("fixed_s", "per_sample_s", "lognormal"):
        value = getattr(options, name)
        _expect(value is None or 0 <= value < math.inf, "a finite number from 0", value, name)
    parts = (_or(options.fixed_s, 1.0), _or(options.per_sample_s, 0.0))
    _expect(sum(parts) > 0, "--fixed-s or --per-sample-s above 0", "0 and 0", "fixed_s")
    factor = options.factor
    _expect(factor is None or 1 <= factor < math.inf, "a finite factor from 1", factor, "factor")


def _check_population(settings: PopulationSettings) -> None:
    """What the schemes would refuse, by the names that the options have."""
    for name in ("devices", "samples", "classes"):
        value = getattr(settings, name)
        _expect(value >= 1, "a whole number from 1", value, name)
    per_device = settings.classes_per_device
    if settings.scheme is Scheme.IID or per_device is None:
        return
    present = min(settings.classes, settings.samples)
    _expect(
        1 <= per_device <= present,
        f"1 to {present}, the classes with samples",
        per_device,
        "classes_per_device",
    )
    _expect(
        settings.devices * per_device >= present,
        f"at least {-(-present // per_device)} devices with {per_device} classes each, so that "
        f"each of {present} classes has a holder",
        settings.devices,
        "devices",
    )
    _expect(0 < settings.alpha < math.inf, "a finite number above 0", settings.alpha, "alpha")


def _count_or_share(text: str, devices: int) -> int:
    """``13`` devices, or ``10%`` of them, rounded."""
    try:
        count = float(text[:-1]) / 100 * devices if text.endswith("%") else int(text)
    except ValueError:
        count = math.nan
    if not 0 <= count <= devices:
        raise ConfigError(
            f"expected a number of devices from 0 to {devices} or a share such as 10%, "
            f"found {text!r}",
            field="--stragglers",
        )
    return round(count)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _is_set(options: object, name: str) -> bool:
    return getattr(options, name) not in {None, False}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_most_one(options: Any, *names: str) -> None:
    found = [_option(name) for name in names if _is_set(options, name)]
    if len(found) > 1:
        possible = ", ".join(map(_option, names))
        raise ConfigError(
            f"expected at most one of {possible}, found {' and '.join(found)}", field=found[1]
        )


def _none_beside(options: Any, names: set[str], beside: str) -> None:
    """Options that the one given leaves nothing to say to."""
    for name in (each.name for each in fields(options)):
        if name in names and _is_set(options, name):
            raise ConfigError(
                f"expected no {_option(name)} beside {_option(beside)}, which says it already",
                field=_option(name),
            )


def _expect(ok: bool, expected: str, found: object, name: str) -> None:
    if not ok:
        raise ConfigError(f"expected {expected}, found {found}", field=_option(name))
