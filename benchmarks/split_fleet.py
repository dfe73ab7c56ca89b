"""Our step: a real coordinator service in this process and real agents as processes of their own.

The agents stay for all repeats of a case; each repeat is a run of its own with a fresh service.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cases import FLEET, Case, Variant, build_agent, build_run, device_names
from processes import BenchmarkError, Processes
from samples import Sample, SteadyClock

from coordinator.broker import EmbeddedBroker
from coordinator.config import RunSettings
from coordinator.model import BUNDLE_FILE
from coordinator.recorder import StepRecord
from coordinator.reporting import NullReporter
from coordinator.service import CoordinatorService
from wire.bundle import Bundle, Manifest
from wire.client_choice import ClientName
from wire.mqtt import MqttSettings

TIMEOUT_S = 600.0


class StepReporter(NullReporter):
    """Ticks when a step was applied, and keeps its record."""

    def __init__(self, clock: SteadyClock) -> None:
        self._clock = clock
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        """A step was applied: everything between two calls is one step."""
        self._clock.tick()
        self.records.append(record)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRun:
    """A run's measurement, its settings and its steps, for others to train the same batches."""

    sample: Sample
    settings: RunSettings
    records: Sequence[StepRecord]
    manifest: Manifest
    bytes_up_per_step: float


def build_agents(
    case: Case,
    engine: str,
    client: ClientName,
    broker: EmbeddedBroker,
    directory: Path,
    *,
    samples: int,
) -> Processes:
    """The case's agents, not yet started; ``samples`` are dealt out to them."""
    mqtt = MqttSettings(host=broker.host, port=broker.port, client=client)
    directory.mkdir(parents=True, exist_ok=True)
    state = directory.parent / "state"  # a device that comes back with another client is the same
    commands = {}
    for index, device in enumerate(device_names(case)):
        agent = build_agent(case, engine, mqtt, state, index=index, samples=samples)
        path = directory / f"{device}.yaml"
        path.write_bytes(msgspec.yaml.encode(agent))
        commands[device] = [sys.executable, "-m", "edge_agent", "run", "-c", str(path)]
    return Processes(commands, directory)


def measure_fleet(
    case: Case,
    variant: Variant,
    broker: EmbeddedBroker,
    agents: Processes,
    out: Path,
    *,
    threads: int,
    steps: int,
    warm_up: int,
) -> FleetRun:
    """Train one epoch and measure the steps after ``warm_up``."""
    mqtt = MqttSettings(host=broker.host, port=broker.port, client=variant.client)
    settings = build_run(case, variant, mqtt, out, name=out.name, threads=threads)
    roles = {"coordinator": [os.getpid()], "devices": agents.pids, "broker": [broker.pid or 0]}
    clock = SteadyClock(roles, warm_up=warm_up, steps=steps)
    reporter = StepReporter(clock)
    service = CoordinatorService(settings, source=FLEET, reporter=reporter)
    _run(service, agents)
    summary = service.summary
    assert summary is not None
    if clock.sample is None or summary.refused or summary.samples_missed:
        raise BenchmarkError(f"{out.name}: messages were refused or samples missed")
    return FleetRun(
        sample=clock.sample,
        settings=settings,
        records=reporter.records,
        manifest=Bundle.from_bytes((out / BUNDLE_FILE).read_bytes()).manifest,
        bytes_up_per_step=summary.bytes_up / summary.steps,
    )


def _run(service: CoordinatorService, agents: Processes) -> None:
    """Run to the end; a fleet that does not get there is an error, not a wait without end."""
    timer = threading.Timer(TIMEOUT_S, service.stop)
    timer.daemon = True
    timer.start()
    try:
        service.run()
    finally:
        timer.cancel()
    agents.raise_if_ended()
    if not service.is_complete:
        raise BenchmarkError(f"the run did not end within {TIMEOUT_S:g} s")
