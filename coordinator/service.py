"""The coordinator service with a run: start, loop, drain, stop. A thin shell round TrainingRun.

What every coordinator does, with or without a run, is in ``fleet_service``. When it is stopped
the run is written down and ends after the message in hand.
"""

from __future__ import annotations

import logging
import time

from coordinator.checkpoint import Checkpoint
from coordinator.config import RunSettings
from coordinator.fleet_service import IDLE_S, FleetService
from coordinator.journal import DeviceRecord, Journal, RunRecord
from coordinator.model import build_model, limit_threads
from coordinator.offers import BundleOffers
from coordinator.progress_text import format_status
from coordinator.recorder import RunSummary, write_summary
from coordinator.registry import Device
from coordinator.reporting import Reporter
from coordinator.run import TrainingRun
from coordinator.store import open_store
from coordinator.summing_up import build_device_records, build_run_record, build_summary
from edge_agent.datasets import LabelledData, load_data
from wire.errors import ConfigError, ModelError, PeerProtocolError, Refusal, TransportError
from wire.inbox import Received
from wire.messages import FleetState, RolloutStatus, encode_message
from wire.mqtt import BuildWill
from wire.notify import notify_status, notify_stopping
from wire.topics import Channel, build_topic

logger = logging.getLogger(__name__)

RECORD_EVERY_S = 1.0


class CoordinatorService(FleetService):
    """Trains one run. ``run`` returns its exit code; ``summary`` is there once it has ended."""

    def __init__(
        self,
        settings: RunSettings,
        *,
        source: str,
        reporter: Reporter,
        resume: bool = False,
        resume_required: bool = False,
        broker: str = "",
    ) -> None:
        limit_threads(settings.threads)
        self._reporter = reporter
        self._run: TrainingRun | None = None
        super().__init__(settings, source=source, broker=broker)
        self.summary: RunSummary | None = None
        self._test_data: LabelledData | None = None
        if settings.test_data is not None:
            self._test_data = load_data(settings.test_data, source=source, field="$.test_data")
        self._journal, self._attempt, self._checkpoint = self._open_journal(resume, resume_required)
        self._is_connected_once = False
        self._record_due_s = 0.0
        self._progress_due_s = 0.0
        if (shape := self._known_shape()) is not None:
            self._begin(*shape)

    @property
    def is_complete(self) -> bool:
        """All epochs were trained."""
        return self._run is not None and self._run.is_done

    @property
    def _title(self) -> str:
        return self._settings.run

    @property
    def _is_done(self) -> bool:
        return self.is_complete

    # Start

    def _open_journal(
        self, resume: bool, resume_required: bool
    ) -> tuple[Journal, int, Checkpoint | None]:
        settings = self._settings
        try:
            settings.directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"expected a writable directory at {settings.directory} ({exc.strerror})",
                source=self._source,
                field="$.out",
            ) from exc
        store = open_store(settings.state_url, source=self._source)
        journal = Journal(store, settings.run, settings.directory, keep=settings.checkpoint.keep)
        record = journal.run_record()
        if not resume:
            if record is not None and journal.latest_checkpoint() is not None:
                raise ConfigError(
                    f"run {settings.run!r} has a checkpoint at step {record.step}: go on with "
                    "--resume, or choose another run name or out directory",
                    source=self._source,
                    field="$.run",
                )
            return journal, (record.attempt + 1 if record else 1), None
        checkpoint = journal.latest_checkpoint()
        if checkpoint is None and resume_required:
            raise ConfigError(
                f"expected a checkpoint of run {settings.run!r} in {settings.state_url}: there is "
                "none to resume",
                source=self._source,
                field="$.state",
            )
        return journal, (record.attempt + 1 if record else 1), checkpoint

    def _next_boot(self) -> int:
        return self._attempt

    def _last_will(self) -> BuildWill:
        return self._build_will

    def _build_will(self, _boot: int) -> tuple[str, bytes]:
        topic = build_topic(self._settings.fleet, Channel.FLEET_STATE)
        if self._run is not None:
            return topic, self._run.build_last_will()
        return topic, encode_message(FleetState(online=False, run=self._settings.run))

    def _known_shape(self) -> tuple[tuple[int, ...], int] | None:
        """Input shape and classes from the settings or the test data, if both are known."""
        network = self._settings.network
        shape, classes = network.input_shape, network.classes
        if self._test_data is not None:
            shape = shape or self._test_data.sample_shape
            classes = classes or self._test_data.classes
        return None if shape is None or classes is None else (shape, classes)

    def _begin(self, input_shape: tuple[int, ...], classes: int) -> None:
        """Build network, bundle and run; go on from the checkpoint where there is one."""
        settings = self._settings
        self._check_test_data(input_shape, classes)
        model = build_model(
            settings,
            input_shape=input_shape,
            classes=classes,
            source=self._source,
            samples=None if self._test_data is None else self._test_data.x,
        )
        self._offers = BundleOffers(model, self._publish)
        self._run = TrainingRun(
            settings,
            model,
            self._test_data,
            registry=self._registry,
            attempt=self._attempt,
            publish=self._publish,
            reporter=self._reporter,
            max_payload_bytes=settings.mqtt.max_payload_bytes,
        )
        if self._checkpoint is not None:
            if self._checkpoint.document["bundle"] != model.digest:
                raise ModelError(
                    "the checkpoint was made with another client segment: the network's settings "
                    "or its code have changed since"
                )
            self._run.restore(self._checkpoint, time.monotonic())
            self._reporter.note(f"goes on after step {self._checkpoint.step}")
        else:
            self._run.log.cut_back(0)
        self._write_state(online=True)

    def _check_test_data(self, input_shape: tuple[int, ...], classes: int) -> None:
        data = self._test_data
        if data is None:
            return
        if data.sample_shape != input_shape:
            raise ConfigError(
                f"expected samples of shape {input_shape}, found {data.sample_shape}",
                source=self._source,
                field="$.test_data",
            )
        if data.classes > classes:
            raise ConfigError(
                f"expected labels of {classes} classes, found {data.classes}",
                source=self._source,
                field="$.test_data",
            )

    # Loop

    def _wait_s(self, now_s: float) -> float:
        run = self._run
        if run is None or run.rounds.deadline_s is None:
            return IDLE_S
        return max(0.0, min(IDLE_S, run.rounds.deadline_s - now_s))

    def _work(self) -> None:
        run = self._run
        if run is None:
            return
        if self._connection.is_connected:
            run.tick(time.monotonic())
        while run.checkpoint_due:
            self._write_checkpoint(run)
            run.checkpointed()

    def _connected(self) -> None:
        super()._connected()
        if self._is_connected_once:
            self._reporter.note("connected again")
        self._is_connected_once = True
        if self._run is not None:
            self._run.reconnected()

    def _disconnected(self, reason: str) -> None:
        super()._disconnected(reason)
        self._reporter.note(reason)

    def _receive_tensors(self, channel: Channel, name: str, message: Received) -> None:
        device = self._registry.known(name)
        device.bytes_up += len(message.payload)
        if self._run is None:
            raise PeerProtocolError(Refusal.FOREIGN_RUN, "no run is on")
        receive = (
            self._run.receive_activations
            if channel is Channel.ACTIVATIONS
            else self._run.receive_gradients
        )
        receive(device, message.payload, message.arrived_s)

    # Devices and bundles

    def _run_members(self) -> tuple[str, frozenset[str]]:
        run = self._run
        if run is None or run.is_done:
            return "", frozenset()
        return run.requirements.bundle, run.rounds.members

    def _device_changed(self, device: Device) -> None:
        if self._run is None:
            birth = device.birth
            if birth is None or not device.is_online:
                return
            network = self._settings.network
            self._begin(
                network.input_shape or birth.sample_shape,
                network.classes or len(birth.label_counts),
            )
        run = self._run
        assert run is not None
        run.device_changed(device, time.monotonic())
        if device.problem:
            logger.warning("%s: takes no part: %s", device.name, device.problem)
        elif device.is_online and not device.has_bundle(run.requirements):
            self._offer(device)

    def _answer(self, device: Device, status: RolloutStatus) -> None:
        super()._answer(device, status)
        run = self._run
        is_over = bool(status.campaign) and status.phase.is_final
        if is_over and run is not None and not device.has_bundle(run.requirements):
            self._device_changed(device)  # the rollout is done with it: the run may have it again

    def _offer(self, device: Device) -> None:
        """Hand the run's bundle to a device, unless a rollout has it in hand."""
        reason = self._rollouts.hold_on(device.name)
        if reason:
            device.problem = f"waits: {reason}"
            logger.info("%s: takes no part: %s", device.name, reason)
        elif self._offers is not None:
            self._offers.offer(device)

    # Writing down

    def _housekeep(self, now_s: float) -> None:
        super()._housekeep(now_s)
        if self._run is not None and now_s >= self._progress_due_s:
            self._progress_due_s = now_s + IDLE_S
            self._reporter.progress(self._run.progress())
        if now_s >= self._record_due_s:
            self._record_due_s = now_s + RECORD_EVERY_S
            self._write_state(online=True)
            if self._run is not None:
                self._run.say_state()
                if self._connection.is_connected:
                    line = format_status(self._run.progress())
                    notify_status(f"{self._settings.run}: {line}")

    def _write_state(self, *, online: bool) -> None:
        """Status for other processes; a store that fails now must not stop the training."""
        try:
            self._journal.write_state(*self._records(online=online))
        except TransportError as exc:
            logger.warning("status not written: %s", exc)

    def _write_checkpoint(self, run: TrainingRun) -> None:
        tensors, document = run.checkpoint()
        try:
            self._journal.write_checkpoint(*self._records(online=True), tensors, document)
        except (TransportError, ModelError) as exc:
            # The one before is still whole; the next one may find disk or store well again.
            logger.error("checkpoint of step %d not written: %s", run.rounds.step, exc)
            self._reporter.note(f"checkpoint not written: {exc}")

    def _records(self, *, online: bool) -> tuple[RunRecord, list[DeviceRecord]]:
        """Run and devices as other processes see them."""
        run = self._run
        record = build_run_record(self._settings, run, attempt=self._attempt, online=online)
        return record, build_device_records(self._registry, run)

    # End

    def _end(self) -> None:
        """Write the run down, say goodbye, sum up."""
        if self._is_taken_over:
            # Perhaps by one that goes on with this run: all is left as kill -9 would leave it.
            if self._run is not None:
                self._run.log.close()
            super()._end()
            self._journal.close()
            return
        notify_stopping(f"{self._settings.run}: writing the run down")
        run = self._run
        if run is not None:
            if not run.is_done:
                run.suspend()
                self._write_checkpoint(run)
            self.summary = build_summary(self._settings, run, broker=self._broker)
            write_summary(self._settings.directory, self.summary)
        self._write_state(online=False)
        if run is not None:
            run.say_offline()
            run.log.close()
        self._rollouts.close()
        self._connection.stop()
        self._journal.close()
        if self.summary is not None:
            self._reporter.finish(self.summary)
