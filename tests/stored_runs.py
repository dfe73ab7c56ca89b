"""A run and its devices in a state store, as a coordinator writes them down."""

from __future__ import annotations

from pathlib import Path

from coordinator.journal import DeviceRecord, Journal, PhaseDelay, RunRecord
from coordinator.store import open_store


def run_record(**changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run": "lab-1",
        "fleet": "lab",
        "attempt": 2,
        "phase": "activations",
        "epoch": 1,
        "epochs": 10,
        "step": 230,
        "version": 228,
        "loss": 0.1234,
        "test_accuracy": 0.912,
        "steps_per_s": 45.3,
        "waited_for": ("gw-2",),
        "bundle": "f" * 64,
    }
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


DEVICES = [
    DeviceRecord(
        device="gw-1",
        online=True,
        ready=True,
        samples=1200,
        samples_trained=2400,
        fixed_s=0.012,
        per_sample_s=0.0005,
        contribution_s=0.020,
        forward=PhaseDelay(fixed_s=0.01, per_sample_s=0.0003, observations=212, changes=1),
        backward=PhaseDelay(fixed_s=0.002, per_sample_s=0.0002, observations=210),
        bytes_up=1_500_000,
        bytes_down=250_000,
        refused={"late": 3, "shape": 1},
        missed_deadlines=2,
        backends=("onnxruntime",),
    ),
    DeviceRecord(device="gw-2", online=True, ready=False, backends=("\x1btorch",)),
    DeviceRecord(device="gw-3", online=False, ready=False),
    DeviceRecord(
        device="gw-4", online=True, ready=False, problem="refused the bundle: \x1b[31mno room"
    ),
]


def write_run(
    directory: Path, record: RunRecord | None = None, devices: list[DeviceRecord] = DEVICES
) -> str:
    """Write a run into the folder's store; returns the store's URL."""
    url = f"sqlite:///{directory}/state.sqlite"
    record = record or run_record()
    journal = Journal(open_store(url), record.run, directory, keep=1)
    journal.write_state(record, devices)
    journal.close()
    return url
