"""Rollouts over a real broker to thirty devices: real agents and simulated ones, a coordinator that
is killed, bundles that must not get through. At the end the account is what devices stand on."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.rollout_devices import SimulatedFleet
from coordinator.broker import EmbeddedBroker
from coordinator.config import RunSettings
from coordinator.journal import DeviceRecord
from coordinator.journal import Journal as RunJournal
from coordinator.model import build_split
from coordinator.rollout.bundle_facts import describe_bundle
from coordinator.rollout.client import operator_client
from coordinator.rollout.records import CampaignPhase, DevicePhase
from coordinator.rollout.requests import (
    CampaignView,
    Order,
    OrderRequest,
    PlanReply,
    PlanRequest,
    StartRequest,
    StatusReply,
    StatusRequest,
)
from coordinator.store import open_store
from edge_agent.journal import Journal
from edge_agent.slots import find_file_in_use, read_journal
from models.export import export_bundle
from models.release import Release
from tests.campaigns import build_settings
from tests.commands import RunCommand
from tests.fleet import Fleet, Process, running_fleet, terminate
from wire.bundle import GOLDEN, Bundle, build_bundle, bundle_digest
from wire.codec import decode_tensors, encode_tensors, exact
from wire.exit_codes import ExitCode
from wire.mqtt import MqttSettings
from wire.signing import TrustedKeys, build_signature_file, generate_key, write_key_pair

pytestmark = [pytest.mark.broker, pytest.mark.processes]

KEY = generate_key()
REAL = ("gw-r1", "gw-r2", "gw-r3")
SIMULATED = tuple(f"gw-s{number:02}" for number in range(27))
SHAPE = (5,)
Export = Callable[..., bytes]


@pytest.fixture(scope="module")
def export() -> Export:
    """A small frozen bundle of a given sequence, signed or not."""
    network = {"name": "mlp", "cut": "block1", "arguments": {"hidden": [64, 6]}, "frozen": True}
    split = build_split(
        msgspec.convert({"network": network}, RunSettings),
        input_shape=SHAPE,
        classes=3,
        source="test",
    )

    def build(sequence: int, *, signed: bool = True) -> bytes:
        release = Release(sequence=sequence, sign=_sign if signed else None)
        return export_bundle(
            split, name="net", version=str(sequence), classes=3, frozen=True, release=release
        )

    return build


def _sign(manifest: bytes) -> bytes:
    return build_signature_file(manifest, [KEY])


def _with_wrong_golden(data: bytes) -> bytes:
    """A bundle in order and signed, whose segment does not compute what it promises."""
    bundle = Bundle.from_bytes(data)
    golden = decode_tensors(bundle.files[GOLDEN])
    parts = {
        name: exact(np.ascontiguousarray(array + 1 if array.dtype.kind == "f" else array))
        for name, array in golden.arrays.items()
    }
    files = {**bundle.files, GOLDEN: bytes(encode_tensors(parts, golden.metadata))}
    return build_bundle(bundle.manifest, files, sign=_sign)


class Lab:
    """A coordinator between runs, its devices, and an operator."""

    def __init__(
        self, processes: Fleet, broker: EmbeddedBroker, agents: tuple[str, ...] = ()
    ) -> None:
        self.processes = processes
        self.settings = MqttSettings(port=broker.port)
        self.config = processes.directory / "serve.yaml"
        self.config.write_bytes(
            msgspec.yaml.encode(
                {
                    "fleet": processes.name,
                    "fleet_out": str(processes.directory / "fleet"),
                    "mqtt": {"port": broker.port, "reconnect_min_s": 0.2, "reconnect_max_s": 0.5},
                }
            )
        )
        self.serve = self._serve()
        self.agents = [self._agent(name) for name in agents]

    @classmethod
    def of(cls, processes: Fleet, broker: EmbeddedBroker) -> Lab:
        """The same for a run that is on: no coordinator of its own."""
        lab = cls.__new__(cls)
        lab.processes, lab.settings = processes, MqttSettings(port=broker.port)
        return lab

    def wait_for_run(self, ready: set[str]) -> None:
        """Until exactly these devices take part in the run."""
        self.processes.wait_until(
            lambda: {n for n, r in self.device_records().items() if r.ready} == ready, f"{ready}"
        )

    def device_records(self) -> dict[str, DeviceRecord]:
        """Devices as the run has written them down."""
        return self._read(lambda journal: journal.device_records()) or {}

    def run_step(self) -> int:
        record = self._read(lambda journal: journal.run_record())
        return 0 if record is None else record.step

    def _read(self, read: Callable[[RunJournal], Any]) -> Any:
        path = self.processes.out / "state.sqlite"
        if not path.exists():
            return None
        store = open_store(f"sqlite:///{path}")
        try:
            return read(RunJournal(store, "test", self.processes.out, keep=1))
        finally:
            store.close()

    def _serve(self) -> Process:
        log = self.processes.directory / "serve.log"
        command = [sys.executable, "-m", "coordinator", "serve", "-c", str(self.config)]
        process = Process("serve", command, log)
        self.processes.processes.append(process)
        process.start()
        return process

    def _agent(self, name: str) -> Process:
        x = np.random.default_rng(1).normal(size=(9, 5))
        data = {"npz": {"path": self.processes.write_data(name, x, np.arange(9) % 3)}}
        compute = {"forward": "onnxruntime", "backward": "none"}
        return self.processes.agent(name, data, compute=compute, bundle_keys=[KEY.public.text])

    def kill_coordinator(self) -> None:
        """kill -9 and start again."""
        self.serve.kill()
        self.serve = self._serve()

    def start(self, data: bytes, name: str, **settings: Any) -> None:
        facts = describe_bundle(data)
        wanted = build_settings(**{"soak_s": 0.2, "trial_s": 0.3, **settings})
        with operator_client(self.settings, self.processes.name) as client:
            client.upload(facts, data)
            request = StartRequest(bundle=facts, settings=wanted, campaign=name)
            client.ask(request, StatusReply)

    def order(self, name: str, order: Order, **fields: Any) -> None:
        with operator_client(self.settings, self.processes.name) as client:
            client.ask(OrderRequest(campaign=name, order=order, **fields), StatusReply)

    def wait_for(self, name: str, holds: Callable[[CampaignView], bool], what: str) -> CampaignView:
        views: list[CampaignView] = []

        def look() -> bool:
            views.append(client.ask(StatusRequest(campaign=name), StatusReply).campaign)
            return holds(views[-1])

        with operator_client(self.settings, self.processes.name) as client:
            self.processes.wait_until(look, what)
        return views[-1]

    def wait_for_phase(self, name: str, phase: CampaignPhase) -> CampaignView:
        return self.wait_for(name, lambda view: view.record.phase is phase, f"{name}: {phase}")

    def wait_for_devices(self, data: bytes, count: int) -> None:
        facts, settings = describe_bundle(data), build_settings()

        def are_there() -> bool:
            request = PlanRequest(bundle=facts, settings=settings)
            plan = client.ask(request, PlanReply).plan
            return sum(device.online for device in plan.devices) == count

        with operator_client(self.settings, self.processes.name) as client:
            self.processes.wait_until(are_there, f"{count} devices")

    def journal(self, name: str) -> Journal:
        return read_journal(self._bundles(name))

    def verified_in_use(self, name: str) -> str:
        """Digest of the bundle that an agent uses, after all checks on the file."""
        path = find_file_in_use(self._bundles(name))
        assert path is not None
        return Bundle.from_bytes(path.read_bytes(), trust=TrustedKeys((KEY.public,))).digest

    def _bundles(self, name: str) -> Path:
        return self.processes.directory / f"state-{name}" / "bundles"


@contextmanager
def turning(simulated: SimulatedFleet) -> Iterator[None]:
    """The simulated devices live in a thread of their own."""
    is_over = threading.Event()

    def turn() -> None:
        while not is_over.is_set():
            simulated.turn()

    thread = threading.Thread(target=turn, name="simulated devices")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        simulated.close()


def phases(view: CampaignView) -> dict[str, DevicePhase]:
    return {device.entry.device: device.entry.phase for device in view.devices}


def test_thirty_devices_stand_where_the_account_says(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str, export: Export
) -> None:
    """1. a good bundle in waves, coordinator and an agent killed 2. a pause outlives a kill
    3. unsigned: the canary stops it 4. wrong golden output: the same 5. rollback.
    """
    good = export(1)
    simulated = SimulatedFleet(
        SIMULATED, fleet=fleet, port=shared_mosquitto.port, sample_shape=SHAPE
    )
    simulated.connect()
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes, turning(simulated):
        lab = Lab(processes, shared_mosquitto, REAL)
        lab.wait_for_devices(good, 30)
        _take_through_kills(lab, good)
        assert {len(device.offers) for device in simulated.devices.values()} == {1}
        _assert_all_stand_on(lab, simulated, good)

        _stop_at_the_canary(lab, export(2, signed=False), "unsigned", DevicePhase.REFUSED)
        wrong = _with_wrong_golden(export(3))
        view = _stop_at_the_canary(lab, wrong, "wrong", DevicePhase.FAILED)
        assert "golden" in view.devices[0].entry.detail
        _assert_all_stand_on(lab, simulated, good)

        lab.order("good", Order.ROLLBACK)
        view = lab.wait_for_phase("good", CampaignPhase.ROLLED_BACK)
        assert set(phases(view).values()) == {DevicePhase.REVERTED}
        assert all(device.bundle is None for device in simulated.devices.values())
        assert all(lab.journal(name).in_use is None for name in REAL)


def _take_through_kills(lab: Lab, data: bytes) -> None:
    lab.start(data, "good", waves="1,20%,100%", selection={"first": list(REAL)}, max_failed=0.5)
    lab.wait_for("good", lambda view: view.record.wave >= 1, "the second wave")
    lab.agents[1].kill()
    lab.agents[1].start()
    lab.order("good", Order.PAUSE, reason="inventory")
    lab.kill_coordinator()
    view = lab.wait_for("good", lambda _: True, "the coordinator")
    assert (view.record.phase, view.record.reason) == (CampaignPhase.PAUSED, "inventory")
    assert view.record.wave == 1
    lab.order("good", Order.RESUME)
    view = lab.wait_for_phase("good", CampaignPhase.COMPLETED)
    assert set(phases(view).values()) == {DevicePhase.COMMITTED}, phases(view)


def _assert_all_stand_on(lab: Lab, simulated: SimulatedFleet, data: bytes) -> None:
    digest = bundle_digest(data)
    assert {device.bundle for device in simulated.devices.values()} == {digest}
    for name in REAL:
        assert lab.verified_in_use(name) == digest
        lab.processes.wait_until(lambda name=name: not lab.journal(name).owed, "acknowledgements")


def _stop_at_the_canary(lab: Lab, data: bytes, name: str, end: DevicePhase) -> CampaignView:
    lab.start(data, name, waves="1,100%", selection={"first": [REAL[0]]})
    view = lab.wait_for_phase(name, CampaignPhase.ABORTED)
    found = phases(view)
    assert found.pop(REAL[0]) is end
    assert set(found.values()) == {DevicePhase.CANCELLED}, "nobody else was offered anything"
    return view


def test_commands_work_from_another_host_and_end_with_their_codes(
    tmp_path: Path,
    shared_mosquitto: EmbeddedBroker,
    fleet: str,
    export: Export,
    run_coordinator: RunCommand,
) -> None:
    """All that a command knows is where the broker is and what the fleet is called."""
    bundle = tmp_path / "net.bundle"
    bundle.write_bytes(export(1))
    where = ("--port", shared_mosquitto.port, "--fleet", fleet)

    def run(*arguments: object, expected: int = ExitCode.OK) -> str:
        ended = run_coordinator("rollout", *arguments)
        assert ended.code == expected, ended
        return ended.out + ended.err

    simulated = SimulatedFleet(
        SIMULATED[:4], fleet=fleet, port=shared_mosquitto.port, sample_shape=SHAPE
    )
    simulated.connect()
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes, turning(simulated):
        lab = Lab(processes, shared_mosquitto)
        lab.wait_for_devices(bundle.read_bytes(), 4)
        assert "no campaign yet" in run("list", *where)
        planned = json.loads(run("plan", bundle, "--json", "--waves", "1,100%", *where))
        order = [device["device"] for device in planned["devices"]]
        options = ("--waves", "1,100%", "--soak", "0s", "--trial", "100ms", "--json", "--yes")
        view = json.loads(run("start", bundle, *options, "--wait", *where))
        assert view["phase"] == "completed"
        assert [device["device"] for device in view["devices"]] == order
        assert {device["phase"] for device in view["devices"]} == {"committed"}
        name = view["campaign"]
        assert name == planned["campaign"]
        assert "4 committed" in run("status", *where)
        assert name in run("list", *where)
        assert "is completed" in run("pause", name, *where, expected=ExitCode.CONFIG)
        assert f"{name} (completed)" in run("pause", *where, expected=ExitCode.CONFIG)
        assert name in run("abort", "nobody", *where, expected=ExitCode.CONFIG)
        assert "has this bundle" in run("start", bundle, "-y", *where, expected=ExitCode.CONFIG)
        run("rollback", "--yes", *where)  # there is just one
        rolled_back = run("status", name, "--watch", *where, expected=ExitCode.FAILED)
        assert "rolled-back" in rolled_back
        assert "4 reverted" in rolled_back
        lab.serve.signal(signal.SIGTERM)
        assert lab.serve.wait() == ExitCode.OK


def test_run_keeps_its_devices_unless_the_operator_takes_one(
    tmp_path: Path, shared_mosquitto: EmbeddedBroker, fleet: str, export: Export
) -> None:
    """1. a run is on 2. a rollout of another bundle plans without its devices 3. with
    --take-from-run one leaves after its step 4. the run goes on with the other and shows why.
    """
    other = export(9)
    rng = np.random.default_rng(2)
    with running_fleet(tmp_path, shared_mosquitto.port, fleet) as processes:
        for name in REAL[:2]:
            path = processes.write_data(name, rng.normal(size=(60, 5)), np.arange(60) % 3)
            data = {"npz": {"path": path}}
            processes.agent(name, data, bundle_keys=[KEY.public.text])
        key = tmp_path / "run.key"
        write_key_pair(KEY, key, tmp_path / "run.pub")
        coordinator = processes.local_coordinator(
            network={"name": "mlp", "cut": "block1", "input_shape": [5], "classes": 3},
            fleet_out=str(tmp_path / "fleet"),
            bundle_key=str(key),
            epochs=100_000,
            min_devices=2,
            global_batch=12,
            deadline={"return_grace_s": 0.5},  # at the end of the epoch that one has left
        )
        lab = Lab.of(processes, shared_mosquitto)
        lab.wait_for_run(both := set(REAL[:2]))
        facts = describe_bundle(other)
        with operator_client(lab.settings, fleet) as client:
            request = PlanRequest(bundle=facts, settings=build_settings())
            plan = client.ask(request, PlanReply).plan
        assert plan.left_out == dict.fromkeys(both, "takes part in a run of another bundle")
        lab.start(other, "taken", selection={"devices": [REAL[0]]}, take_from_run=True)
        view = lab.wait_for_phase("taken", CampaignPhase.COMPLETED)
        assert phases(view) == {REAL[0]: DevicePhase.COMMITTED}
        lab.wait_for_run({REAL[1]})
        problem = lab.device_records()[REAL[0]].problem
        assert problem.startswith("waits: rollout taken of net 9")
        step = lab.run_step()
        processes.wait_until(lambda: lab.run_step() > step + 3, "steps without the device")
        terminate(coordinator)
        assert coordinator.wait() == ExitCode.OK
        assert lab.verified_in_use(REAL[0]) == bundle_digest(other)
