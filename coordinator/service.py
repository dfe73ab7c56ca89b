"""The coordinator service: start, loop, drain, stop. A thin shell round TrainingRun.

One thread owns all state and takes events from the inbox; the network thread only fills it.
Signals set a flag: the run is then written down and ends after the message in hand.
"""

from __future__ import annotations

import logging
import threading
import time

from coordinator.checkpoint import Checkpoint
from coordinator.config import RunSettings
from coordinator.journal import DeviceRecord, Journal, RunRecord
from coordinator.model import build_model, limit_threads
from coordinator.offers import BundleOffers
from coordinator.progress_text import format_status
from coordinator.recorder import RunSummary, write_summary
from coordinator.registry import Device, Registry
from coordinator.reporting import Reporter
from coordinator.run import TrainingRun
from coordinator.store import open_store
from coordinator.summing_up import build_device_records, build_run_record, build_summary
from edge_agent.datasets import LabelledData, load_data
from wire.errors import ConfigError, ModelError, PeerProtocolError, Refusal, TransportError
from wire.exit_codes import ExitCode
from wire.inbox import Connected, Disconnected, Event, Inbox, Received
from wire.messages import (
    SCHEMA,
    Birth,
    DeviceState,
    FleetState,
    RolloutStatus,
    Telemetry,
    decode_message,
    encode_message,
)
from wire.mqtt import MqttConnection, PayloadTooLargeError
from wire.notify import notify_ready, notify_status, notify_stopping, notify_watchdog
from wire.notify import watchdog_interval_s as read_watchdog_interval_s
from wire.topics import (
    Channel,
    build_client_id,
    build_topic,
    coordinator_subscriptions,
    parse_topic,
)

logger = logging.getLogger(__name__)

IDLE_S = 0.25  # longest wait for an event: progress, deadlines and the watchdog are looked after
RECORD_EVERY_S = 1.0
DATA_EXPIRY_S = 300.0  # a tensor message older than this is of no use to anybody


class CoordinatorService:
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
        self._settings = settings
        self._source = source
        self._reporter = reporter
        self._broker = broker or f"{settings.mqtt.host}:{settings.mqtt.port}"
        self.summary: RunSummary | None = None
        self._test_data: LabelledData | None = None
        if settings.test_data is not None:
            self._test_data = load_data(settings.test_data, source=source, field="$.test_data")
        self._journal, self._attempt, self._checkpoint = self._open_journal(resume, resume_required)
        self._registry = Registry()
        self._run: TrainingRun | None = None
        self._offers: BundleOffers | None = None
        self._inbox = Inbox()
        self._connection = self._build_connection()
        self._stop = threading.Event()
        self._is_connected_once = False
        self._record_due_s = 0.0
        self._progress_due_s = 0.0
        self._watchdog_interval_s = read_watchdog_interval_s()
        self._watchdog_due_s = 0.0
        if (shape := self._known_shape()) is not None:
            self._begin(*shape)

    def stop(self) -> None:
        """Ask the service to write the run down and end; safe in a signal handler."""
        self._stop.set()
        self._inbox.wake()

    def run(self) -> ExitCode:
        """Train to the end, or until stopped."""
        self._connection.start()
        notify_ready(f"{self._settings.run}: waiting for devices")
        code = ExitCode.OK
        try:
            while not self._stop.is_set():
                if not self._connection.is_thread_alive:
                    logger.error("the network thread has ended")
                    code = ExitCode.SOFTWARE
                    break
                if self._run is not None and self._run.is_done:
                    break
                self._turn()
        finally:
            self._end()
        return code

    @property
    def is_complete(self) -> bool:
        """All epochs were trained."""
        return self._run is not None and self._run.is_done

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

    def _build_connection(self) -> MqttConnection:
        settings = self._settings
        return MqttConnection(
            settings.mqtt,
            client_id=build_client_id(settings.fleet),
            fleet=settings.fleet,
            subscriptions=coordinator_subscriptions(settings.fleet),
            inbox=self._inbox,
            next_boot=lambda: self._attempt,
            build_will=self._build_will,
        )

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

    def _turn(self) -> None:
        now_s = time.monotonic()
        timeout_s = IDLE_S
        run = self._run
        if run is not None and run.rounds.deadline_s is not None:
            timeout_s = max(0.0, min(timeout_s, run.rounds.deadline_s - now_s))
        event = self._inbox.get(timeout_s)
        if event is not None:
            self._handle(event)
        run = self._run
        if run is not None:
            if self._connection.is_connected:
                run.tick(time.monotonic())
            while run.checkpoint_due:
                self._write_checkpoint(run)
                run.checkpointed()
        self._housekeep(time.monotonic())

    def _handle(self, event: Event) -> None:
        match event:
            case Connected():
                self._connected()
            case Disconnected(reason=reason):
                notify_status(f"{self._settings.run}: offline ({reason})")
                self._reporter.note(reason)
            case Received() as message:
                self._receive(message)

    def _connected(self) -> None:
        if self._is_connected_once:
            self._reporter.note("connected again")
        self._is_connected_once = True
        notify_status(f"{self._settings.run}: connected to {self._broker}")
        if self._run is not None:
            self._run.reconnected()

    def _receive(self, message: Received) -> None:
        name: str | None = None
        try:
            address = parse_topic(message.topic)
            name = address.device
            if name is None:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, message.topic)
            self._check(message)
            self._dispatch(address.channel, name, message)
        except PeerProtocolError as refusal:
            number = self._registry.count_refusal(name, refusal.reason)
            level = logging.WARNING if number == 1 else logging.DEBUG
            logger.log(level, "%s: dropped a message on %s: %s", name, message.topic, refusal)

    def _check(self, message: Received) -> None:
        if len(message.payload) > self._settings.mqtt.max_payload_bytes:
            raise PeerProtocolError(
                Refusal.OVERSIZED,
                f"expected at most {self._settings.mqtt.max_payload_bytes} bytes, received "
                f"{len(message.payload)}",
            )
        if message.schema is not None and message.schema != SCHEMA:
            raise PeerProtocolError(
                Refusal.SCHEMA, f"expected schema {SCHEMA}, received {message.schema[:20]!r}"
            )

    def _dispatch(self, channel: Channel, name: str, message: Received) -> None:
        payload = message.payload
        match channel:
            case Channel.BIRTH:
                birth = decode_message(payload, Birth)
                self._device_changed(self._registry.on_birth(name, birth))
            case Channel.STATE:
                state = decode_message(payload, DeviceState)
                self._device_changed(self._registry.on_state(name, state))
            case Channel.ACTIVATIONS | Channel.GRADIENTS:
                device = self._registry.known(name)
                device.bytes_up += len(payload)
                if self._run is None:
                    raise PeerProtocolError(Refusal.FOREIGN_RUN, "no run is on")
                receive = (
                    self._run.receive_activations
                    if channel is Channel.ACTIVATIONS
                    else self._run.receive_gradients
                )
                receive(device, payload, message.arrived_s)
            case Channel.ROLLOUT_STATUS:
                self._answer(self._registry.known(name), decode_message(payload, RolloutStatus))
            case Channel.TELEMETRY:
                self._registry.known(name).telemetry = decode_message(payload, Telemetry)
            case _:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, f"{message.topic} is not for us")

    # Devices and bundles

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
        elif self._offers and device.is_online and not device.has_bundle(run.requirements):
            self._offers.offer(device)

    def _answer(self, device: Device, status: RolloutStatus) -> None:
        if self._offers is None:
            raise PeerProtocolError(Refusal.FOREIGN_BUNDLE, "no bundle was offered")
        self._offers.answer(device, status)

    # Writing down

    def _housekeep(self, now_s: float) -> None:
        for topic in self._inbox.take_dropped_topics():
            self._registry.count_refusal(parse_topic(topic).device, Refusal.QUEUE_FULL)
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
        if self._watchdog_interval_s is not None and now_s >= self._watchdog_due_s:
            # This loop turns and the network thread lives: that is what progress means here.
            self._watchdog_due_s = now_s + self._watchdog_interval_s
            notify_watchdog()

    def _write_state(self, *, online: bool) -> None:
        """Status for other processes; a store that fails now must not stop the training."""
        try:
            self._journal.write_state(*self._records(online=online))
            if self._run is not None:
                self._run.log.flush()
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
        self._connection.stop()
        self._journal.close()
        if self.summary is not None:
            self._reporter.finish(self.summary)

    def _publish(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        expiry_s: float | None = None,
    ) -> None:
        if expiry_s is None and channel is Channel.CUT_GRADIENT:
            expiry_s = DATA_EXPIRY_S
        try:
            self._connection.publish(channel, payload, device=device, expiry_s=expiry_s)
        except PayloadTooLargeError as exc:
            raise ModelError(
                f"{exc}: raise mqtt.max_payload_bytes and the broker's max_packet_size"
            ) from exc
