"""What a rollout costs: time, bytes, the coordinator's processor time and memory, per device.

Simulated devices, many to a process, each with a connection of its own, take one bundle from a real
``coordinator serve`` through one Mosquitto. The model behind the bundle is not run: what is
measured is the distribution. Example, from the repository's root:

    python benchmarks/rollout.py --devices 10 100 1000 --json results.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from machine import UsageMeter, describe_machine
from processes import BenchmarkError, Processes
from rollout_devices import SimulatedFleet, build_sample_bundle

from coordinator.broker import BrokerKind, embedded_broker
from coordinator.config import RunSettings
from coordinator.fleet_service import FleetService
from coordinator.rollout.bundle_facts import describe_bundle
from coordinator.rollout.client import OperatorClient, operator_client
from coordinator.rollout.records import ENDED_PHASES, CampaignSettings
from coordinator.rollout.requests import (
    CampaignView,
    ListReply,
    ListRequest,
    PlanReply,
    PlanRequest,
    StartRequest,
    StatusReply,
    StatusRequest,
)
from wire.errors import SplitfleetError, TransportError
from wire.mqtt import MqttSettings

FLEET = "bench"
POLL_S = 0.5
MANY_FILES = 8192

HEADER = (
    "| devices | waves | chunks | time, s | committed | coordinator CPU, s | per device, ms "
    "| coordinator peak, MB | coordinator sent, MB | devices received, MB | broker CPU, s "
    "| others, cores |"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rollout to measure."""

    devices: int
    waves: str
    shared: bool
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one rollout took. Bytes are payload bytes; CPU covers the campaign alone."""

    case: Case
    waves: int
    seconds: float
    committed: int
    coordinator_s: float
    broker_s: float
    devices_s: float
    others_cores: float
    coordinator_peak_bytes: int
    sent_bytes: int
    received_bytes: int
    device_bytes: int


def main() -> int:
    """Measure, print a table, write JSON if asked to."""
    if sys.argv[1:2] == ["--child"]:
        return _child(*sys.argv[2:])
    options = _parse_options()
    _allow_many_connections()
    rows = []
    print(HEADER, "|" + "--:|" * 12, sep="\n", flush=True)
    try:
        for case in _cases(options):
            with tempfile.TemporaryDirectory(prefix="splitfleet-benchmark-") as folder:
                row = _measure(case, Path(folder), options.processes, options.timeout)
            rows.append(row)
            print(_line(row), flush=True)
    except (BenchmarkError, SplitfleetError, TimeoutError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_average": os.getloadavg(),
        "rows": [asdict(row) for row in rows],
    }
    if options.json:
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--size", type=int, default=300_000, help="bundle, in bytes")
    parser.add_argument("--waves", default="1,10%,50%,100%")
    parser.add_argument("--processes", type=int, default=2, help="for the simulated devices")
    parser.add_argument(
        "--chunks", nargs="+", choices=["shared", "individual"], default=["shared", "individual"]
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one rollout")
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for devices in options.devices:
        for chunks in options.chunks:
            yield Case(
                devices=devices,
                waves=options.waves,
                shared=chunks == "shared",
                size_bytes=options.size,
            )


def _measure(case: Case, folder: Path, processes: int, timeout_s: float) -> Row:
    data = build_sample_bundle(case.size_bytes)
    with embedded_broker(directory=folder / "broker", kind=BrokerKind.MOSQUITTO) as broker:
        settings = RunSettings(
            fleet=FLEET,
            fleet_out=str(folder / "fleet"),
            mqtt=MqttSettings(host=broker.host, port=broker.port),
        )
        report = folder / "coordinator.json"
        commands = {"coordinator": _command("coordinator", settings, str(report))}
        for number in range(processes):
            share = f"{number}/{processes}/{case.devices}"
            totals = folder / f"devices{number}.json"
            commands[f"devices{number}"] = _command("devices", settings, share, str(totals))
        logs = folder / "logs"
        with Processes(commands, logs) as running, operator_client(settings.mqtt, FLEET) as client:
            _await_devices(client, data, case, running, timeout_s)
            roles = {
                "coordinator": running.pids[:1],
                "devices": running.pids[1:],
                "broker": [broker.pid],
            }
            meter = UsageMeter(roles)
            view = _roll_out(client, data, case, running, timeout_s)
            usage = meter.stop()
        return _row(case, view, usage, folder, processes)


def _row(case: Case, view: CampaignView, usage: Any, folder: Path, processes: int) -> Row:
    coordinator = json.loads((folder / "coordinator.json").read_text())
    totals = [
        json.loads((folder / f"devices{number}.json").read_text())["received_bytes"]
        for number in range(processes)
    ]
    return Row(
        case=case,
        waves=view.record.waves,
        seconds=usage.elapsed_s,
        committed=view.counts.get("committed", 0),
        coordinator_s=usage.seconds["coordinator"],
        broker_s=usage.seconds["broker"],
        devices_s=usage.seconds["devices"],
        others_cores=usage.others_cores,
        coordinator_peak_bytes=coordinator["peak_bytes"],
        sent_bytes=coordinator["sent_bytes"],
        received_bytes=coordinator["received_bytes"],
        device_bytes=sum(totals),
    )


def _await_devices(
    client: OperatorClient, data: bytes, case: Case, running: Processes, timeout_s: float
) -> None:
    """Until the coordinator has heard of all of them."""
    facts = describe_bundle(data)
    deadline_s = time.monotonic() + timeout_s
    _await_coordinator(client, running, deadline_s)
    client.upload(facts, data)
    while time.monotonic() < deadline_s:
        running.raise_if_ended()
        plan = client.ask(PlanRequest(bundle=facts, settings=CampaignSettings()), PlanReply).plan
        if sum(device.online for device in plan.devices) == case.devices:
            return
        time.sleep(POLL_S)
    raise BenchmarkError(f"{len(plan.devices)} of {case.devices} devices have connected")


def _await_coordinator(client: OperatorClient, running: Processes, deadline_s: float) -> None:
    while True:
        running.raise_if_ended()
        try:
            client.ask(ListRequest(), ListReply)
            return
        except TransportError:
            if time.monotonic() > deadline_s:
                raise


def _roll_out(
    client: OperatorClient, data: bytes, case: Case, running: Processes, timeout_s: float
) -> CampaignView:
    settings = CampaignSettings(waves=case.waves, soak_s=0.0, trial_s=0.0, shared=case.shared)
    request = StartRequest(bundle=describe_bundle(data), settings=settings)
    view = client.ask(request, StatusReply).campaign
    deadline_s = time.monotonic() + timeout_s
    while view.record.phase not in ENDED_PHASES:
        running.raise_if_ended()
        if time.monotonic() > deadline_s:
            raise BenchmarkError(f"not over after {timeout_s:g} s: {view.counts}")
        time.sleep(POLL_S)
        view = client.ask(StatusRequest(), StatusReply).campaign
    return view


def _line(row: Row) -> str:
    case = row.case
    cells = [
        f"{case.devices:,}",
        f"{row.waves}",
        "shared" if case.shared else "individual",
        f"{row.seconds:.1f}",
        f"{row.committed:,}",
        f"{row.coordinator_s:.2f}",
        f"{1000 * row.coordinator_s / case.devices:.1f}",
        f"{row.coordinator_peak_bytes / 1e6:.0f}",
        f"{row.sent_bytes / 1e6:.2f}",
        f"{row.device_bytes / 1e6:.1f}",
        f"{row.broker_s:.2f}",
        f"{row.others_cores:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


# Child processes


def _command(role: str, settings: RunSettings, *arguments: str) -> list[str]:
    document = msgspec.json.encode(settings).decode()
    return [sys.executable, __file__, "--child", role, document, *arguments]


def _child(role: str, document: str, *arguments: str) -> int:
    settings = msgspec.json.decode(document, type=RunSettings)
    _allow_many_connections()
    if role == "coordinator":
        return _serve(settings, *arguments)
    return _be_devices(settings, *arguments)


def _serve(settings: RunSettings, report: str) -> int:
    service = FleetService(settings, source="benchmark")
    signal.signal(signal.SIGTERM, lambda *_: service.stop())
    code = service.run()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "peak_bytes": usage.ru_maxrss * 1024,
        "sent_bytes": service._connection.bytes_sent,
        "received_bytes": service._connection.bytes_received,
    }
    Path(report).write_text(json.dumps(facts))
    return code


def _be_devices(settings: RunSettings, share: str, report: str) -> int:
    number, processes, devices = map(int, share.split("/"))
    names = [f"gw-{index:05}" for index in range(number, devices, processes)]
    is_over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_over.set())
    fleet = SimulatedFleet(names, fleet=FLEET, host=settings.mqtt.host, port=settings.mqtt.port)
    fleet.connect()
    while not is_over.is_set():
        fleet.turn()
    Path(report).write_text(json.dumps({"received_bytes": fleet.bytes_received}))
    fleet.close()
    return 0


def _allow_many_connections() -> None:
    """A thousand sockets are more than a shell's usual limit; the broker inherits it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
