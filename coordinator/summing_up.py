"""A run in words and numbers: the records that other processes read, and the summary."""

from __future__ import annotations

import msgspec

from coordinator.config import RunSettings
from coordinator.delays import DelayEstimator
from coordinator.journal import DeviceRecord, PhaseDelay, RunRecord
from coordinator.recorder import DeviceSummary, RunSummary
from coordinator.registry import Device, Registry
from coordinator.run import TrainingRun


def build_run_record(
    settings: RunSettings, run: TrainingRun | None, *, attempt: int, online: bool
) -> RunRecord:
    """Where the run is; before its network is known it waits for devices."""
    record = RunRecord(
        run=settings.run, fleet=settings.fleet, attempt=attempt, phase="devices", online=online
    )
    if run is None:
        return record
    progress = run.progress()
    return msgspec.structs.replace(
        record,
        phase=run.rounds.phase.value,
        epoch=progress.epoch,
        epochs=progress.epochs,
        step=progress.step,
        version=run.rounds.version,
        loss=progress.loss,
        test_accuracy=progress.test_accuracy,
        steps_per_s=progress.steps_per_s,
        waited_for=progress.waited_for,
        bundle=run.model.digest,
    )


def build_device_records(registry: Registry, run: TrainingRun | None) -> list[DeviceRecord]:
    """Every device that was heard of."""
    return [_device_record(device, run) for device in registry.devices.values()]


def _device_record(device: Device, run: TrainingRun | None) -> DeviceRecord:
    birth = device.birth
    fixed_s, per_sample_s = (None, None) if run is None else run.delay_of(device.name)
    return DeviceRecord(
        device=device.name,
        online=device.is_online,
        ready=run is not None and device.name in run.rounds.members,
        problem=device.problem,
        samples=birth.samples if birth else 0,
        label_counts=birth.label_counts if birth else (),
        max_batch=birth.max_batch if birth else None,
        samples_trained=run.rounds.trained[device.name] if run else 0,
        missed_deadlines=run.rounds.attendance.missed[device.name] if run else 0,
        fixed_s=fixed_s,
        per_sample_s=per_sample_s,
        contribution_s=_contribution_s(run, device.name),
        forward=_phase_delay(None if run is None else run.rounds.delays.forward(device.name)),
        backward=_phase_delay(None if run is None else run.rounds.delays.backward(device.name)),
        bytes_up=device.bytes_up,
        bytes_down=device.bytes_down,
        refused=dict(device.refused),
        backends=birth.capabilities.backward if birth else (),
        agent=birth.agent if birth else "",
        labels=birth.labels if birth else {},
    )


def _contribution_s(run: TrainingRun | None, name: str) -> float | None:
    """What a typical contribution takes; None while nothing is known."""
    if run is None:
        return None
    fixed_s, per_sample_s = run.delay_of(name)
    if fixed_s is None or per_sample_s is None:
        return None
    return fixed_s + per_sample_s * run.typical_count(name)


def _phase_delay(estimator: DelayEstimator | None) -> PhaseDelay | None:
    if estimator is None:
        return None
    return PhaseDelay(
        fixed_s=estimator.fixed_s,
        per_sample_s=estimator.per_sample_s,
        observations=estimator.n_observations,
        changes=estimator.changes,
    )


def build_summary(settings: RunSettings, run: TrainingRun, *, broker: str) -> RunSummary:
    """The run's result so far."""
    registry = run.registry
    devices = tuple(_sum_up_device(run, name) for name in sorted(registry.devices))
    last = run.epochs[-1] if run.epochs else None
    return RunSummary(
        run=settings.run,
        network=settings.network.name,
        cut_layer=run.model.split.cut_layer,
        policy=settings.policy.name.value,
        precision=settings.precision.value,
        seed=settings.seed,
        global_batch=settings.global_batch,
        epochs=len(run.epochs),
        steps=run.rounds.version,
        test_accuracy=last.test_accuracy if last else None,
        test_loss=last.test_loss if last else None,
        samples_held=last.samples if last else run.rounds.account.samples,
        samples_trained=sum(run.rounds.trained.values()),
        samples_missed=sum(run.rounds.missed.values()),
        train_s=run.train_s,
        steps_per_s=run.rounds.version / run.train_s if run.train_s else 0.0,
        bytes_up=sum(device.bytes_up for device in devices),
        bytes_down=sum(device.bytes_down for device in devices),
        mean_deviation=run.log.mean_deviation,
        refused=registry.refused_in_all(),
        broker=broker,
        completed=run.is_done,
        devices=devices,
        epoch_results=tuple(run.epochs),
    )


def _sum_up_device(run: TrainingRun, name: str) -> DeviceSummary:
    device = run.registry.devices[name]
    fixed_s, per_sample_s = run.delay_of(name)
    return DeviceSummary(
        device=name,
        samples_held=device.birth.samples if device.birth else 0,
        samples_trained=run.rounds.trained[name],
        samples_missed=run.rounds.missed[name],
        missed_deadlines=run.rounds.attendance.missed[name],
        delay_s=_contribution_s(run, name),
        bytes_up=device.bytes_up,
        bytes_down=device.bytes_down,
        refused=dict(device.refused),
        label_counts=device.birth.label_counts if device.birth else (),
        max_batch=device.birth.max_batch if device.birth else None,
        fixed_s=fixed_s,
        per_sample_s=per_sample_s,
    )
