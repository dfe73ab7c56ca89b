"""A run in the state store: what it is, where it is, its devices and its checkpoints.

Torch comes only with the checkpoints: the commands that look at a run do without it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.store import StateStore, encode_records, get_record, get_records

if TYPE_CHECKING:
    from coordinator.checkpoint import Checkpoint, CheckpointPointer


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is. ``phase`` says what it waits for; ``updated_s`` is Unix time."""

    run: str
    fleet: str
    attempt: int
    phase: str
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    version: int = 0
    loss: float | None = None
    test_accuracy: float | None = None
    steps_per_s: float = 0.0
    waited_for: tuple[str, ...] = ()
    bundle: str = ""
    online: bool = True
    updated_s: float = 0.0


class PhaseDelay(msgspec.Struct, frozen=True, kw_only=True):
    """What is believed of one phase of a device, from how many measurements.

    ``changes`` is how often its speed has changed for good.
    """

    fixed_s: float
    per_sample_s: float
    observations: int
    changes: int = 0


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the run sees it.

    ``fixed_s`` and ``per_sample_s`` are of both phases together, ``contribution_s`` what they make
    of a typical contribution; ``forward`` and ``backward`` are the phases by themselves.
    ``backends`` are what runs the backward pass, by the birth's words; empty for none.
    """

    device: str
    online: bool
    ready: bool
    problem: str = ""
    samples: int = 0
    label_counts: tuple[int, ...] = ()
    max_batch: int | None = None
    samples_trained: int = 0
    missed_deadlines: int = 0
    fixed_s: float | None = None
    per_sample_s: float | None = None
    contribution_s: float | None = None
    forward: PhaseDelay | None = None
    backward: PhaseDelay | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    refused: dict[str, int] = {}
    backends: tuple[str, ...] = ()
    agent: str = ""
    labels: dict[str, str] = {}


class Journal:
    """The store's keys for one run: ``run/{run}``, ``run/{run}/device/{id}``, ``…/checkpoint``."""

    def __init__(self, store: StateStore, run: str, directory: Path, *, keep: int) -> None:
        self._store = store
        self._key = f"run/{run}"
        self._directory = directory / "checkpoints"
        self._keep = keep

    def run_record(self) -> RunRecord | None:
        return get_record(self._store, self._key, RunRecord)

    def device_records(self) -> dict[str, DeviceRecord]:
        records = get_records(self._store, f"{self._key}/device/", DeviceRecord)
        return {record.device: record for record in records.values()}

    def write_state(self, run: RunRecord, devices: list[DeviceRecord]) -> None:
        """Write where the run is, in one transaction."""
        self._store.put_many(encode_records(self._state_records(run, devices)))

    def write_checkpoint(
        self,
        run: RunRecord,
        devices: list[DeviceRecord],
        tensors: Any,
        document: dict[str, Any],
    ) -> CheckpointPointer:
        """Write a checkpoint file, then point to it together with the run's state."""
        from coordinator.checkpoint import prune_checkpoints, write_checkpoint  # noqa: PLC0415

        pointer = write_checkpoint(self._directory, run.step, tensors, document)
        records: dict[str, msgspec.Struct | None] = dict(self._state_records(run, devices))
        records[f"{self._key}/checkpoint"] = pointer
        self._store.put_many(encode_records(records))
        prune_checkpoints(self._directory, keep=self._keep, pointed_at={pointer.name})
        return pointer

    def latest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the store points to; raises CheckpointError if it is damaged."""
        from coordinator.checkpoint import CheckpointPointer, read_checkpoint  # noqa: PLC0415

        pointer = get_record(self._store, f"{self._key}/checkpoint", CheckpointPointer)
        if pointer is None:
            return None
        return read_checkpoint(pointer.path_in(self._directory), pointer.sha256)

    def forget(self) -> None:
        """Remove all that the store holds of this run, for a fresh start under the same name."""
        keys = [self._key, *self._store.keys(f"{self._key}/")]
        self._store.put_many(dict.fromkeys(keys))

    def close(self) -> None:
        self._store.close()

    def _state_records(
        self, run: RunRecord, devices: list[DeviceRecord]
    ) -> dict[str, msgspec.Struct]:
        stamped = msgspec.structs.replace(run, updated_s=time.time())
        records: dict[str, msgspec.Struct] = {self._key: stamped}
        records |= {f"{self._key}/device/{record.device}": record for record in devices}
        return records
