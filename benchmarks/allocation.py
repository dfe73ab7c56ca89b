"""What planning costs: every policy on fleets of 128 to 1,000,000 devices, and the naive way.

The naive way shuffles a list with one entry per sample, cuts it up into global batches and counts:
what UGS is, written down at once. Each measurement runs in a process of its own, on one core, so
that its peak of memory is its own. Processor time is what counts on a busy machine.
Example, from the repository's root:

    python benchmarks/allocation.py --cases small large --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from coordinator.allocation import EpochPlanner

IntArray = NDArray[np.int64]

NAIVE = "naive"
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fleet: ``samples`` in all over ``classes``, some held by each device.

    ``most_steps``: of the epoch, where the whole would take too long.
    """

    devices: int
    samples: int
    classes_each: int
    global_batch: int
    most_steps: int | None = None
    classes: int = 10


CASES = {
    "tiny": Case(devices=16, samples=2_000, classes_each=2, global_batch=64),
    "small": Case(devices=128, samples=50_000, classes_each=2, global_batch=128),
    "large": Case(devices=100_000, samples=3_000_000, classes_each=2, global_batch=4096),
    "huge": Case(
        devices=1_000_000, samples=30_000_000, classes_each=2, global_batch=4096, most_steps=20
    ),
}
POLICIES: dict[str, dict[str, Any]] = {
    "ugs": {"policy": "ugs"},
    "lds, delta 1": {"policy": "lds", "delta": 1.0},
    "lds, budget 10 %": {"policy": "lds"},
    "class-targeted": {"policy": "class-targeted"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one epoch, or its first steps: processor seconds and peak resident memory.

    ``setup_s`` until the first step can be asked for. The fleet's own arrays are in ``peak_mb`` and
    in ``fleet_mb``, which was the peak before planning began.
    """

    case: str
    way: str
    steps: int
    setup_s: float
    plan_s: float
    wall_s: float
    fleet_mb: float
    peak_mb: float

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.plan_s / self.steps


def build_fleet(case: Case, seed: int = 0) -> tuple[IntArray, NDArray[np.float64]]:
    """Label counts (K, M) and delays (K,): a tenth of the devices takes ten times as long."""
    rng = np.random.Generator(np.random.PCG64(seed))
    counts_KM = np.zeros((case.devices, case.classes), dtype=np.int64)
    rows = np.arange(case.devices)
    mean = case.samples / case.devices / case.classes_each
    for turn in range(case.classes_each):
        held_K = rng.integers(0, int(2 * mean) + 1, case.devices)
        counts_KM[rows, (rows + turn * rng.integers(1, case.classes, case.devices)) % 10] += held_K
    delays_K = np.where(rng.random(case.devices) < 0.1, 10.0, 1.0)
    return counts_KM, delays_K * rng.uniform(0.95, 1.05, case.devices)


def naive_steps(counts_KM: IntArray, global_batch: int) -> Iterator[Counter[int]]:
    """Shuffle one entry per sample, cut, count."""
    entries = np.repeat(np.arange(len(counts_KM)), counts_KM.sum(axis=1)).tolist()
    random.Random(0).shuffle(entries)
    for start in range(0, len(entries), global_batch):
        yield Counter(entries[start : start + global_batch])


def planned_steps(
    counts_KM: IntArray, delays_K: NDArray[np.float64], global_batch: int, way: str
) -> Iterator[object]:
    """The steps of a policy."""
    planner = EpochPlanner(counts_KM, global_batch, delays_s=delays_K, **POLICIES[way])
    while (step := planner.next_step()) is not None:
        yield step


def measure(case_name: str, way: str) -> Cost:
    """Plan in this process."""
    case = CASES[case_name]
    counts_KM, delays_K = build_fleet(case)
    fleet_mb = _peak_mb()
    wall, began = time.perf_counter(), time.process_time()
    steps = (
        naive_steps(counts_KM, case.global_batch)
        if way == NAIVE
        else planned_steps(counts_KM, delays_K, case.global_batch, way)
    )
    next(steps)
    first = time.process_time()
    done = 1 + sum(1 for _ in islice(steps, None if case.most_steps is None else case.most_steps))
    ended = time.process_time()
    return Cost(
        case=case_name,
        way=way,
        steps=done,
        setup_s=first - began,
        plan_s=ended - began,
        wall_s=time.perf_counter() - wall,
        fleet_mb=fleet_mb,
        peak_mb=_peak_mb(),
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Measure each pair of case and way in its own process, print a table, write JSON."""
    options = _parse_options()
    if options.child:
        print(json.dumps(asdict(measure(*options.child))))
        return 0
    costs = []
    print("| fleet | way | steps | processor time | a step | peak memory |")
    print("|---|---|---|---|---|---|")
    for case in options.cases:
        for way in (NAIVE, *POLICIES):
            if way == NAIVE and CASES[case].most_steps is not None:
                continue  # a list of tens of millions of entries is no planner
            costs.append(_median_of(case, way, options.repeats))
            print(_row(costs[-1]), flush=True)
    if options.json:
        facts = {
            "machine": describe_machine(),
            "load_average": os.getloadavg(),
            "repeats": options.repeats,
            "costs": [asdict(cost) for cost in costs],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
    return 0


def _median_of(case: str, way: str, repeats: int) -> Cost:
    """The run in the middle, by processor time."""
    command = [sys.executable, __file__, "--child", case, way]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(
            command, env=os.environ | ONE_CORE, check=True, capture_output=True, text=True
        )
        runs.append(Cost(**json.loads(done.stdout)))
    return sorted(runs, key=lambda cost: cost.plan_s)[len(runs) // 2]


def _row(cost: Cost) -> str:
    case = CASES[cost.case]
    part = "" if case.most_steps is None else " (first)"
    return (
        f"| {case.devices:,} x {case.classes}, B = {case.global_batch} | {cost.way} "
        f"| {cost.steps}{part} | {1000 * cost.plan_s:,.0f} ms | {cost.ms_per_step:.2f} ms "
        f"| {cost.peak_mb:,.0f} MB |"
    )


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=["small", "large", "huge"], help="fleets"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each; the median counts")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
