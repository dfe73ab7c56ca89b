"""One training run: rounds, tensors, records and messages brought together.

Owned by one thread; ``service`` feeds it messages and time. It publishes through a callable, so
that tests can drive it without a broker.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from coordinator.actions import (
    AbandonStep,
    Action,
    ApplyStep,
    EndEpoch,
    OpenStep,
    Phase,
    ResendCutGradients,
    RunServer,
    SendAllocations,
)
from coordinator.allocation import batch_deviation
from coordinator.batch import StepBatch
from coordinator.checkpoint import Checkpoint
from coordinator.config import RunSettings
from coordinator.model import RunModel
from coordinator.outgoing import Outgoing, Publish
from coordinator.planning import PlannedSlot, PlannedStep
from coordinator.recorder import EpochRecord, StepLog, StepRecord
from coordinator.registry import Device, Registry, Requirements
from coordinator.reporting import Progress, Reporter
from coordinator.rounds import Rounds
from coordinator.trainer import ServerResult, SplitTrainer
from edge_agent.datasets import LabelledData
from wire.codec import decode_tensors
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.messages import (
    ActivationsHeader,
    GradientsHeader,
    parse_header,
)
from wire.precision import read_all_floats

HEADROOM_BYTES = 16_384  # header, labels' share aside, of one activation message
RATE_WINDOW_STEPS = 50


class TrainingError(ModelError):
    """The run cannot go on: the weights have diverged, and a restart would find them so again."""


class TrainingRun:
    """State of one run."""

    def __init__(
        self,
        settings: RunSettings,
        model: RunModel,
        test_data: LabelledData | None,
        *,
        registry: Registry,
        attempt: int,
        publish: Publish,
        reporter: Reporter,
        max_payload_bytes: int,
    ) -> None:
        self.settings = settings
        self.model = model
        self.registry = registry
        self.rounds = Rounds(settings.round_settings())
        self.trainer = SplitTrainer(
            model.split.client,
            model.split.server,
            settings.optimiser,
            client_optimiser=settings.client_optimiser,
            frozen=settings.network.frozen,
            eval_layers=model.split.eval_layers,
            seed=settings.seed,
        )
        self.log = StepLog(settings.directory)
        self.epochs: list[EpochRecord] = []
        self.train_s = 0.0
        self.last_step: StepRecord | None = None
        self.checkpoint_due = False
        self._test_data = test_data
        self._reporter = reporter
        self._batches: dict[int, StepBatch] = {}
        self._result: ServerResult | None = None
        self._result_slots: tuple[PlannedSlot, ...] = ()
        self._recent_s: deque[float] = deque(maxlen=RATE_WINDOW_STEPS)
        self._training_since_s: float | None = None
        manifest = model.bundle.manifest
        self._classes = manifest.classes
        self._activation_shape = manifest.activation.shape
        self._parameter_shapes = self.trainer.parameter_shapes
        self.requirements = Requirements(
            bundle=model.digest,
            input_shape=manifest.input.shape,
            classes=manifest.classes,
            trainable=not settings.network.frozen,
            precision=settings.precision,
            by_class=settings.policy.name.is_by_class,
        )
        self._largest_batch = self._messages_fit(max_payload_bytes)
        self._out = Outgoing(settings, registry, publish, attempt=attempt, bundle=model.digest)
        self._pooled: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    # What the owner may ask

    @property
    def is_done(self) -> bool:
        return self.rounds.phase is Phase.DONE

    @property
    def steps_per_s(self) -> float:
        """Over the last steps, waiting included."""
        if len(self._recent_s) < 2:
            return 0.0
        return (len(self._recent_s) - 1) / max(1e-9, self._recent_s[-1] - self._recent_s[0])

    def progress(self) -> Progress:
        """Where the run is now."""
        last = self.last_step
        return Progress(
            epoch=self.rounds.epoch,
            epochs=self.settings.epochs,
            step=self.rounds.step,
            trained=self.rounds.account.trained,
            samples=self.rounds.account.samples,
            steps_per_s=self.steps_per_s,
            loss=last.loss if last else None,
            test_accuracy=self.epochs[-1].test_accuracy if self.epochs else None,
            deviation=last.deviation if last else None,
            waited_for=self.rounds.waited_for,
            ready=len(self.rounds.members),
            wanted=self.settings.min_devices,
        )

    def delay_of(self, name: str) -> tuple[float | None, float | None]:
        """(fixed_s, per_sample_s) of both phases together as measured; None while unknown."""
        delays = self.rounds.delays
        known = [e for e in (delays.forward(name), delays.backward(name)) if e is not None]
        if not known:
            return None, None
        return sum(e.fixed_s for e in known), sum(e.per_sample_s for e in known)

    def typical_count(self, name: str) -> int:
        """Samples that a device contributes to a step in proportion to what it holds."""
        account = self.rounds.account
        held = account.devices[name].samples if name in account.devices else 0
        return max(1, round(self.settings.global_batch * held / max(1, account.samples)))

    # Devices

    def device_changed(self, device: Device, now_s: float) -> None:
        """A birth or state came: take the device in, or do without it."""
        device.problem = device.shortcoming(self.requirements)
        ready = device.is_online and not device.problem and device.has_bundle(self.requirements)
        if ready:
            member = device.member(self._classes, self._largest_batch)
            self.perform(self.rounds.device_ready(member, now_s))
        else:
            self.perform(self.rounds.device_gone(device.name, now_s))

    # Messages

    def receive_activations(self, device: Device, payload: bytes, now_s: float) -> None:
        """Take activations in; raises PeerProtocolError for what cannot be used."""
        tensors = decode_tensors(payload)
        header = parse_header(tensors.metadata, ActivationsHeader)
        self._check_run(header.run)
        if header.bundle != self.requirements.bundle:
            raise PeerProtocolError(
                Refusal.FOREIGN_BUNDLE, f"activations of bundle {header.bundle[:12]}"
            )
        try:
            slot = self.rounds.find_activations(device.name, header, header.weights_version)
        except PeerProtocolError as refusal:
            if refusal.reason is Refusal.LATE:
                self.perform(self.rounds.observe_late(device.name, header, now_s))
            raise
        self._batch(header.step).read_activations(slot, tensors)
        self.perform(self.rounds.accept_activations(header.step, slot, now_s))

    def receive_gradients(self, device: Device, payload: bytes, now_s: float) -> None:
        """Take parameter gradients in; raises PeerProtocolError for what cannot be used."""
        tensors = decode_tensors(payload)
        header = parse_header(tensors.metadata, GradientsHeader)
        self._check_run(header.run)
        slot = self.rounds.find_gradients(device.name, header, header.weights_version)
        gradients = read_all_floats(tensors, self._parameter_shapes)
        self._batches[header.step].add_gradients(slot, gradients)
        self.perform(self.rounds.accept_gradients(slot, now_s))

    def reconnected(self) -> None:
        """The broker is back: say again what still holds."""
        self.say_state()
        self._send_allocations(self.rounds.members)
        if self.rounds.phase is Phase.FORWARD:
            self._out.repeat_weights()
        if self.rounds.phase is Phase.BACKWARD:
            for device in self.rounds.waited_for:
                self._send_cut_gradients(device)

    def tick(self, now_s: float) -> None:
        """Act on deadlines."""
        deadline_s = self.rounds.deadline_s
        if deadline_s is not None and now_s >= deadline_s:
            self.perform(self.rounds.tick(now_s))

    # Actions

    def perform(self, actions: Iterable[Action]) -> None:
        """Perform actions, and those that follow from them, in order."""
        queue = deque(actions)
        while queue:
            queue.extendleft(reversed(self._perform(queue.popleft())))

    def _perform(self, action: Action) -> list[Action]:
        match action:
            case SendAllocations(devices=devices):
                self._send_allocations(devices)
            case OpenStep(step=plan):
                self._open_step(plan)
            case RunServer(step=step, slots=slots):
                return self._run_server(step, slots)
            case ResendCutGradients(device=device):
                self._send_cut_gradients(device)
            case ApplyStep() as apply:
                return self._apply(apply)
            case AbandonStep(step=step):
                self.trainer.discard()
                self._close_batches(step)
                self._reporter.note(f"step {step}: nobody contributed")
            case EndEpoch() as end:
                return self._end_epoch(end)
        return []

    def _open_step(self, plan: PlannedStep) -> None:
        if self._training_since_s is None:
            self._training_since_s = time.monotonic()
        self._batch(plan.step)
        if self.settings.network.frozen:
            self.say_state()
            return
        self._out.send_weights(
            self.trainer.client_weights(),
            epoch=self.rounds.epoch,
            step=plan.step,
            version=self.rounds.version,
            devices=self.rounds.members,
        )

    def _send_allocations(self, devices: Iterable[str]) -> None:
        slots = self.rounds.slots_by_device()
        present = set(devices) & self.rounds.members
        self._out.send_allocations(
            {name: slots.get(name, []) for name in sorted(present)}, epoch=self.rounds.epoch
        )

    def _run_server(self, step: int, slots: tuple[PlannedSlot, ...]) -> list[Action]:
        batch = self._batches[step]
        result = self.trainer.run_server(*batch.rows(slots))
        if not result.is_finite:
            return self._refuse_poison(step, slots)
        self._result, self._result_slots = result, slots
        actions = self.rounds.server_done(time.monotonic())
        if not self.settings.network.frozen:
            for slot in slots:
                self._send_cut_gradient(step, slot)
        return actions

    def _refuse_poison(self, step: int, slots: tuple[PlannedSlot, ...]) -> list[Action]:
        """The loss is not finite: find the devices whose activations do that on their own."""
        batch = self._batches[step]
        bad = [
            slot for slot in slots if not self.trainer.run_server(*batch.rows((slot,))).is_finite
        ]
        self.trainer.discard()
        for name in {slot.device for slot in bad}:
            self.registry.count_refusal(name, Refusal.NON_FINITE)
            self._reporter.note(f"{name}: its activations of step {step} make the loss infinite")
        # Without a single culprit all of them are to blame.
        actions = self.rounds.refuse_contributions(bad or slots, time.monotonic())
        if self.rounds.attendance.excludes_all(self.rounds.members):
            raise TrainingError(
                f"step {step}: the loss is not finite for any device; the run has diverged "
                "(a smaller optimiser.lr may help)"
            )
        return actions

    def _send_cut_gradients(self, device: str) -> None:
        for slot in self._result_slots:
            if slot.device == device:
                self._send_cut_gradient(self.rounds.step, slot)

    def _send_cut_gradient(self, step: int, slot: PlannedSlot) -> None:
        result = self._result
        assert result is not None
        assert result.cut_gradient is not None
        start = 0
        for other in self._result_slots:
            if other == slot:
                break
            start += other.count
        rows = result.cut_gradient[start : start + slot.count]
        self._out.send_cut_gradient(rows, slot, epoch=self.rounds.epoch, step=step)

    def _apply(self, action: ApplyStep) -> list[Action]:
        batch, result = self._batches[action.step], self._result
        assert result is not None
        x, y = batch.rows(action.slots)
        scale = 1.0
        if action.lost:
            # The others' gradients are means over the batch that was; the server pass is redone
            # on the rows that are left, and the client gradients are rescaled to their number.
            scale = sum(slot.count for slot in self._result_slots) / len(y)
            result = self.trainer.run_server(x, y)
        delta = self.rounds.last_delta
        if self.settings.network.frozen:
            actions = self._applied()
        else:
            self.trainer.apply_client(batch.sum_gradients(action.slots, scale))
            actions = self._give_the_next_go(self._applied())
        self.trainer.apply_server()
        self._record(action, result, batch, delta)
        self._close_batches(action.step)
        return actions

    def _applied(self) -> list[Action]:
        """What follows a step; nothing yet, where a checkpoint of it is due."""
        if self.rounds.version % self.settings.checkpoint.every_steps == 0:
            self.checkpoint_due = True
        return [] if self.checkpoint_due else self.rounds.applied(time.monotonic())

    def _give_the_next_go(self, actions: list[Action]) -> list[Action]:
        """Open the next step if that is all that follows; the devices are at work while the rest of
        this one is done. What is left to do is returned."""
        if all(isinstance(action, SendAllocations | OpenStep) for action in actions):
            self.perform(actions)
            return []
        return actions

    def checkpointed(self) -> None:
        """The owner has written the checkpoint that was due: go on."""
        self.checkpoint_due = False
        match self.rounds.phase:
            case Phase.APPLYING:
                self.perform(self.rounds.applied(time.monotonic()))
            case Phase.EPOCH_END:
                self._next_epoch()
            case _:
                pass

    def _record(
        self, action: ApplyStep, result: ServerResult, batch: StepBatch, delta: float | None
    ) -> None:
        now_s = time.monotonic()
        counts = batch.class_counts(action.slots)
        samples = int(counts.sum())
        record = StepRecord(
            step=action.step,
            epoch=self.rounds.epoch,
            samples=samples,
            loss=result.loss,
            accuracy=result.correct / samples,
            deviation=batch_deviation(counts, self._pooled_counts()),
            duration_s=action.duration_s,
            slowest=action.slowest,
            slots=tuple((slot.device, *span) for slot in action.slots for span in slot.spans),
            delta=delta,
        )
        self.last_step = record
        self._recent_s.append(now_s)
        self.log.add(record)
        self._reporter.step(record)

    def _pooled_counts(self) -> NDArray[np.int64]:
        """Samples per class over all devices that take part in this epoch."""
        names = self.rounds.account.devices
        key = (self.rounds.epoch, len(names))
        if self._pooled is None or self._pooled[0] != key:
            pooled = np.zeros(self._classes, np.int64)
            for name in names:
                birth = self.registry.device(name).birth
                if birth is not None:
                    pooled[: len(birth.label_counts)] += birth.label_counts
            self._pooled = (key, pooled)
        return self._pooled[1]

    def _end_epoch(self, end: EndEpoch) -> list[Action]:
        self._pause_clock()
        self._add_epoch(end.epoch, end.samples, end.trained, end.missed)
        for name, count in end.missed.items():
            self._reporter.note(f"epoch {end.epoch + 1}: {count} samples of {name} were missed")
        self.checkpoint_due = True
        return []

    def _add_epoch(self, epoch: int, samples: int, trained: int, missed: dict[str, int]) -> None:
        evaluation = None
        if self._test_data is not None:
            evaluation = self.trainer.evaluate(self._test_data.x, self._test_data.y)
        record = EpochRecord(
            epoch=epoch,
            step=self.rounds.step,
            samples=samples,
            trained=trained,
            missed=missed,
            test_loss=evaluation.loss if evaluation else None,
            test_accuracy=evaluation.accuracy if evaluation else None,
        )
        self.epochs.append(record)
        self._reporter.epoch(record)

    def _next_epoch(self) -> None:
        """Begin the next epoch, or end the run, once the checkpoint of this one is written."""
        self.perform(self.rounds.evaluated(time.monotonic()))
        self.say_state()

    # Time and checkpoints

    def _pause_clock(self) -> None:
        if self._training_since_s is not None:
            self.train_s += time.monotonic() - self._training_since_s
            self._training_since_s = None

    def suspend(self) -> None:
        """Put the step under way back, so that the state can be written down."""
        self._pause_clock()
        self.trainer.discard()
        self.rounds.abandon_open_step()
        self._batches.clear()

    def checkpoint(self) -> tuple[dict[str, object], dict[str, object]]:
        """(tensors, document) of the state between two steps."""
        running_s = 0.0
        if self._training_since_s is not None:
            running_s = time.monotonic() - self._training_since_s
        tensors, optimisers = self.trainer.checkpoint()
        document: dict[str, object] = {
            "rounds": self.rounds.document(),
            "optimisers": optimisers,
            "plan_number": self._out.plan_number,
            "train_s": self.train_s + running_s,
            "epochs": [_to_builtins(record) for record in self.epochs],
            "bundle": self.requirements.bundle,
        }
        return dict(tensors), document

    def restore(self, checkpoint: Checkpoint, now_s: float) -> None:
        """Go on from a checkpoint of this run."""
        document = checkpoint.document
        self.trainer.restore(checkpoint.tensors, document["optimisers"])
        self.rounds.restore(document["rounds"], now_s=now_s)
        self._out.plan_number = document["plan_number"]
        self.train_s = document["train_s"]
        self.epochs = [_epoch_record(record) for record in document["epochs"]]
        self.log.cut_back(self.rounds.step)
        if self.rounds.phase is Phase.EPOCH_END:
            self._next_epoch()

    # Inside

    def _check_run(self, run: str) -> None:
        if run != self._out.run:
            raise PeerProtocolError(
                Refusal.FOREIGN_RUN, f"run {self._out.run!r} is on, not {run!r}"
            )

    def _batch(self, step: int) -> StepBatch:
        plan = self.rounds.planned(step)
        held = self._batches.get(step)
        if held is None or held.plan != plan:  # a frozen run's early batch may have been replanned
            self._batches[step] = StepBatch(
                plan, activation_shape=self._activation_shape, classes=self._classes
            )
        return self._batches[step]

    def _close_batches(self, step: int) -> None:
        self._batches = {number: b for number, b in self._batches.items() if number > step}
        self._result = None
        self._result_slots = ()

    def build_last_will(self) -> bytes:
        """What devices read when the coordinator is lost."""
        return self._out.build_state(epoch=self.rounds.epoch, step=self.rounds.step, online=False)

    def say_state(self) -> None:
        """Tell devices, and whoever listens, where the run is."""
        self._out.send_state(epoch=self.rounds.epoch, step=self.rounds.step, online=True)

    def say_offline(self) -> None:
        """Tell devices that the coordinator leaves."""
        self._out.send_state(epoch=self.rounds.epoch, step=self.rounds.step, online=False)

    def _messages_fit(self, max_payload_bytes: int) -> int:
        """Samples whose fp32 activations, or cut gradients, fit one message."""
        sample_bytes = 4 * math.prod(self._activation_shape) + 8
        return max(1, (max_payload_bytes - HEADROOM_BYTES) // sample_bytes)


def _to_builtins(record: EpochRecord) -> object:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _epoch_record(document: dict[str, object]) -> EpochRecord:
    return EpochRecord(**document)  # type: ignore[arg-type]
