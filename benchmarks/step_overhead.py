"""How much a training step over MQTT costs, against what it cannot do without.

In one run, interleaved, for each case: the bare messages of a step (the floor), our step, and the
undivided network on the same batches. Example, from the repository's root:

    python benchmarks/step_overhead.py --cases mlp-n1 mlp-n4 --repeats 5 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from bench import Bench, Plan, Row
from cases import CASES, ENGINES
from machine import describe_machine
from processes import BenchmarkError

from coordinator.broker import BrokerKind, embedded_broker
from wire.client_choice import ClientName
from wire.command import configure_logging
from wire.errors import SplitfleetError
from wire.messages import Precision

WARM_UP_STEPS = 20
QUICK_STEPS = 4
QUICK_WARM_UP_STEPS = 2

HEADER = (
    "| case | passes | client | payload | floor, steps/s | ours, steps/s | ours/floor "
    "| undivided, ms (1 thread) | ours, ms | ours/undivided | others, cores |"
)


def main() -> int:
    """Measure, print a table, write JSON if asked to."""
    options = _parse_options()
    configure_logging(verbose=False, quiet=True)
    plan = _build_plan(options)
    started = {"time": _now(), "load_average": os.getloadavg()}
    try:
        with tempfile.TemporaryDirectory(prefix="splitfleet-benchmark-") as folder:
            broker, rows = _measure(plan, Path(folder))
    except (BenchmarkError, SplitfleetError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine() | {"broker": broker},
        "started": started,
        "ended": {"time": _now(), "load_average": os.getloadavg()},
        "repeats": plan.repeats,
        "warm_up_steps": plan.warm_up,
        "torch_threads": {"coordinator": plan.threads, "undivided": plan.undivided_threads},
    }
    _print_report(facts, rows)
    if options.json is not None:
        document = facts | {"results": [_to_builtins(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32", "fp16"]
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=["torch", "onnxruntime"],
        help="what runs the client segment's passes (mixed: forward onnxruntime, backward torch)",
    )
    parser.add_argument(
        "--clients",
        nargs="+",
        choices=get_args(ClientName),
        default=list(get_args(ClientName)),
        help="the MQTT client of the floor and of ours: ours upon paho, or paho's own",
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="samples per measurement")
    parser.add_argument("--steps", type=_positive, help="steps per sample, instead of the case's")
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        help="the coordinator's torch threads; the agents need the other cores (default: 1)",
    )
    parser.add_argument(
        "--quiet-cores",
        type=float,
        default=0.1,
        help="a sample is taken again if others kept more cores busy (default: %(default)s)",
    )
    parser.add_argument(
        "--attempts", type=_positive, default=3, help="at most so often (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--quick", action="store_true", help="one repeat of a few steps: a trial")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return number


def _build_plan(options: argparse.Namespace) -> Plan:
    quick = options.quick
    return Plan(
        cases=[CASES[name] for name in options.cases],
        precisions=[Precision(name) for name in options.precisions],
        engines=options.engines,
        clients=options.clients,
        repeats=1 if quick else options.repeats,
        steps=options.steps or (QUICK_STEPS if quick else None),
        warm_up=QUICK_WARM_UP_STEPS if quick else WARM_UP_STEPS,
        threads=options.threads,
        undivided_threads=torch.get_num_threads(),
        attempts=1 if quick else options.attempts,
        quiet_cores=options.quiet_cores,
    )


def _measure(plan: Plan, folder: Path) -> tuple[str, list[Row]]:
    """(the broker, results) of all cases of the plan."""
    rows: list[Row] = []
    directory = folder / "broker"
    with embedded_broker(directory=directory, kind=BrokerKind.MOSQUITTO) as broker:
        for case in plan.cases:
            bench = Bench(plan, case, broker, folder / case.name, _note)
            for engine in plan.engines:
                rows += bench.measure(engine)
        return f"{broker.kind.value} {broker.version}", rows


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _print_report(facts: dict[str, Any], rows: list[Row]) -> None:
    for name, value in facts.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {part}" for key, part in value.items())
        print(f"{name}: {shown}")
    print()
    print(HEADER)
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(_table_line(row))


def _table_line(row: Row) -> str:
    others = max(m.others_cores for m in (row.floor, row.ours, row.undivided))
    cells = (
        row.case.title,
        row.variant.engine,
        row.variant.client,
        row.variant.precision.value,
        f"{row.floor.steps_per_s:.1f}",
        f"{row.ours.steps_per_s:.1f}",
        f"{row.share_of_floor:.2f}",
        f"{row.undivided.step_ms:.2f} ({row.undivided_one_thread.step_ms:.2f})",
        f"{row.ours.step_ms:.2f}",
        f"{row.times_undivided:.2f}",
        f"{others:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _to_builtins(row: Row) -> dict[str, Any]:
    variant = {
        "engine": row.variant.engine,
        "client": row.variant.client,
        "precision": row.variant.precision.value,
    }
    document = asdict(row) | variant
    del document["variant"]
    for name in ("floor", "ours", "undivided", "undivided_one_thread"):
        document[name]["step_ms"] = getattr(row, name).step_ms
    shares = {"share_of_floor": row.share_of_floor, "times_undivided": row.times_undivided}
    return document | shares


if __name__ == "__main__":
    sys.exit(main())
