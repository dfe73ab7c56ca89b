"""What a run tells of itself, made up for tests of how it is shown."""

from __future__ import annotations

from coordinator.recorder import DeviceSummary, EpochRecord, RunSummary, StepRecord
from coordinator.reporting import Progress


def progress(**changes: object) -> Progress:
    values: dict[str, object] = {
        "epoch": 0,
        "epochs": 3,
        "step": 7,
        "trained": 448,
        "samples": 1344,
        "steps_per_s": 45.3,
        "loss": 0.3124,
        "test_accuracy": 0.912,
        "deviation": 0.41,
        "waited_for": ("gw-1",),
        "ready": 8,
        "wanted": 8,
    }
    return Progress(**(values | changes))  # type: ignore[arg-type]


def step(**changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": 1,
        "epoch": 0,
        "samples": 64,
        "loss": 0.5,
        "accuracy": 0.75,
        "deviation": 0.4,
        "duration_s": 0.02,
        "slowest": None,
        "slots": (),
    }
    return StepRecord(**(values | changes))  # type: ignore[arg-type]


def epoch(number: int, **changes: object) -> EpochRecord:
    values: dict[str, object] = {
        "epoch": number,
        "step": 21 * (number + 1),
        "samples": 1344,
        "trained": 1344,
        "missed": {},
        "test_loss": 0.1,
        "test_accuracy": 0.95,
    }
    return EpochRecord(**(values | changes))  # type: ignore[arg-type]


def device(name: str, **changes: object) -> DeviceSummary:
    values: dict[str, object] = {
        "device": name,
        "samples_held": 168,
        "samples_trained": 504,
        "samples_missed": 0,
        "missed_deadlines": 0,
        "delay_s": 0.031,
        "bytes_up": 1_500_000,
        "bytes_down": 250_000,
        "refused": {},
    }
    return DeviceSummary(**(values | changes))  # type: ignore[arg-type]


def summary(**changes: object) -> RunSummary:
    devices = tuple(device(f"gw-{number}") for number in range(8))
    values: dict[str, object] = {
        "run": "digits",
        "network": "mlp",
        "cut_layer": "hidden",
        "policy": "lds",
        "precision": "fp16",
        "seed": 0,
        "global_batch": 64,
        "epochs": 3,
        "steps": 63,
        "test_accuracy": 0.9712,
        "test_loss": 0.12,
        "samples_held": 1344,
        "samples_trained": 4032,
        "samples_missed": 0,
        "train_s": 12.3,
        "steps_per_s": 5.12,
        "bytes_up": 12_000_000,
        "bytes_down": 2_000_000,
        "mean_deviation": 0.41,
        "refused": {},
        "broker": "127.0.0.1:1883",
        "completed": True,
        "devices": devices,
        "epoch_results": tuple(epoch(number) for number in range(3)),
    }
    return RunSummary(**(values | changes))  # type: ignore[arg-type]
