"""The agent daemon: a thin shell round Session, Worker and the MQTT connection.

One thread owns all state and takes events from the inbox; the network thread only fills it.
Signals set a flag. A lost broker is waited for; a dead network thread ends the process, so that
the service manager starts a whole one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from datetime import UTC, datetime

from edge_agent.boot import BootCounter
from edge_agent.config import AgentSettings
from edge_agent.datasets import LabelledData
from edge_agent.measuring.memory import peak_rss_bytes
from edge_agent.session import SendActivations, SendGradients, Session
from edge_agent.slots import SlotStore
from edge_agent.update_host import Policy
from edge_agent.updater import Updater
from edge_agent.worker import Worker
from wire import __version__
from wire.bundle import Bundle, Manifest, Trust
from wire.codec import decode_metadata, decode_tensors
from wire.errors import ConfigError, ModelError, PeerProtocolError, Refusal
from wire.exit_codes import ExitCode
from wire.inbox import Connected, Disconnected, Event, Inbox, Received
from wire.messages import (
    SCHEMA,
    Allocation,
    Birth,
    Capabilities,
    ChunkHeader,
    CutGradientHeader,
    DeviceState,
    FleetState,
    Mode,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutStatus,
    Telemetry,
    WeightsHeader,
    decode_message,
    decode_rollout,
    encode_message,
    parse_header,
)
from wire.mqtt import MqttConnection, PayloadTooLargeError
from wire.notify import notify_ready, notify_status, notify_stopping, notify_watchdog
from wire.notify import watchdog_interval_s as read_watchdog_interval_s
from wire.topics import (
    Channel,
    build_client_id,
    build_topic,
    device_subscriptions,
    parse_topic,
)

logger = logging.getLogger(__name__)

IDLE_S = 1.0  # longest wait for an event: telemetry and the watchdog are looked after this often


class AgentDaemon:
    """One device. ``run`` returns when stopped, with the process's exit code."""

    def __init__(
        self,
        settings: AgentSettings,
        data: LabelledData,
        worker: Worker,
        capabilities: Capabilities,
        *,
        trust: Trust | None = None,
    ) -> None:
        self._settings = settings
        self._data = data
        self._worker = worker
        self._capabilities = capabilities
        self._session = Session(samples=len(data.y))
        state_dir = settings.state_directory
        try:
            boots = BootCounter(state_dir)
            store = SlotStore(state_dir / "bundles")
        except OSError as exc:
            raise ConfigError(
                f"expected a writable directory for {state_dir} ({exc.strerror})",
                field="$.state_dir",
            ) from exc
        self._inbox = Inbox()
        self._connection = MqttConnection(
            settings.mqtt,
            client_id=build_client_id(settings.fleet, settings.device),
            fleet=settings.fleet,
            subscriptions=device_subscriptions(settings.fleet, settings.device),
            inbox=self._inbox,
            next_boot=boots.next,
            build_will=self._build_will,
        )
        self._stop = threading.Event()
        self._boot = 0
        self._updater = Updater(store, self._build_policy(trust), _UpdateHost(self))
        self._refused: Counter[str] = Counter()
        self._answers = 0
        self._telemetry_due_s = 0.0
        self._watchdog_interval_s = read_watchdog_interval_s()
        self._watchdog_due_s = 0.0

    def stop(self) -> None:
        """Ask the daemon to end; safe in a signal handler."""
        self._stop.set()
        self._inbox.wake()

    def run(self) -> ExitCode:
        """Serve until ``stop``; the broker may come and go meanwhile."""
        device = self._settings.device
        self._updater.start(time.monotonic())
        self._connection.start()
        notify_ready(f"{device}: {len(self._data.y)} samples")
        logger.info("%s: %d samples, waiting for the broker", device, len(self._data.y))
        code = ExitCode.OK
        while not self._stop.is_set():
            if not self._connection.is_thread_alive:
                logger.error("%s: the network thread has ended", device)
                code = ExitCode.SOFTWARE
                break
            self._turn()
        notify_stopping(f"{device}: leaving")
        self._updater.stop()
        self._say_offline()
        self._connection.stop()
        return code

    def _turn(self) -> None:
        """One turn of the loop: all events first, so that stale work is never begun."""
        self._updater.tick(time.monotonic(), mid_step=self._session.is_mid_step)
        work = self._session.next_work() if self._connection.is_connected else None
        event = self._inbox.get(0.0 if work is not None else IDLE_S)
        if event is not None:
            self._handle(event)
        elif work is not None:
            try:
                self._send_activations(work)
            except PeerProtocolError as refusal:  # of the weights, which are read only now
                self._session.drop_weights()
                self._count_refusal(refusal, Channel.WEIGHTS.level)
            except ModelError as exc:
                if not self._updater.bad_step(exc):
                    raise
        self._housekeep(time.monotonic())

    # Events

    def _handle(self, event: Event) -> None:
        match event:
            case Connected(boot=boot):
                self._boot = boot
                logger.info("%s: connected (boot %d)", self._settings.device, boot)
                notify_status(f"{self._settings.device}: connected")
                self._publish_birth()
                self._updater.connected(time.monotonic())
            case Disconnected(reason=reason):
                self._updater.disconnected(time.monotonic())
                notify_status(f"{self._settings.device}: offline ({reason})")
            case Received() as message:
                try:
                    self._receive(message)
                except PeerProtocolError as refusal:
                    self._count_refusal(refusal, message.topic)
                except ModelError as exc:
                    if not self._updater.bad_step(exc):
                        raise

    def _receive(self, message: Received) -> None:
        payload = message.payload
        if len(payload) > self._settings.mqtt.max_payload_bytes:
            raise PeerProtocolError(Refusal.OVERSIZED, f"{len(payload)} bytes")
        if message.schema is not None and message.schema != SCHEMA:
            raise PeerProtocolError(
                Refusal.SCHEMA, f"expected schema {SCHEMA}, received {message.schema[:20]!r}"
            )
        match parse_topic(message.topic).channel:
            case Channel.ALLOCATION:
                self._session.on_allocation(decode_message(payload, Allocation))
            case Channel.WEIGHTS:
                self._receive_weights(payload)
            case Channel.CUT_GRADIENT:
                self._receive_cut_gradient(payload)
            case Channel.FLEET_STATE:
                self._session.on_fleet_state(decode_message(payload, FleetState))
            case Channel.ROLLOUT:
                self._receive_rollout(payload)
            case Channel.BUNDLE | Channel.SHARED_BUNDLE as channel:
                self._receive_chunk(payload, shared=channel is Channel.SHARED_BUNDLE)
            case other:
                raise PeerProtocolError(Refusal.UNKNOWN_TOPIC, f"{other.level} is not for devices")

    def _receive_weights(self, payload: bytes) -> None:
        header = parse_header(decode_metadata(payload), WeightsHeader)
        self._session.on_weights(header)
        self._worker.keep_weights(header.bundle, payload)

    def _receive_cut_gradient(self, payload: bytes) -> None:
        header = parse_header(decode_metadata(payload), CutGradientHeader)
        work = self._session.on_cut_gradient(header)
        gradients = self._worker.gradients(work, payload)
        if self._publish(Channel.GRADIENTS, gradients):
            self._session.mark_sent(work)
            self._answers += 1
            self._updater.good_step(time.monotonic())

    # Work

    def _send_activations(self, work: SendActivations) -> None:
        payload = self._worker.activations(work)
        self._delay(work)
        if self._publish(Channel.ACTIVATIONS, payload):
            self._session.mark_sent(work)
            if work.allocation.mode is Mode.FROZEN:
                self._updater.good_step(time.monotonic())

    def _delay(self, work: SendActivations | SendGradients) -> None:
        seconds = self._settings.trial_delay.seconds(work.slot.count)
        if seconds > 0:
            self._stop.wait(seconds)

    # Bundles

    def _receive_rollout(self, payload: bytes) -> None:
        now_s = time.monotonic()
        match decode_rollout(payload):
            case RolloutOffer() as offer:
                self._updater.offer(offer, now_s)
            case RolloutCancel() as cancel:
                self._updater.cancel(cancel, now_s)
            case RolloutAcknowledge() as acknowledge:
                self._updater.acknowledge(acknowledge)

    def _receive_chunk(self, payload: bytes, *, shared: bool) -> None:
        tensors = decode_tensors(payload)
        header = parse_header(tensors.metadata, ChunkHeader)
        data = tensors.require("data").tobytes()
        self._updater.chunk(header, data, shared=shared, now_s=time.monotonic())

    def _build_policy(self, trust: Trust | None) -> Policy:
        settings = self._settings
        return Policy(
            device=settings.device,
            agent_version=__version__,
            max_bundle_bytes=settings.max_bundle_bytes,
            self_test_max_bytes=settings.self_test_max_bytes,
            compute=settings.compute,
            trust=trust,
            clock=lambda: datetime.now(UTC),
        )

    def _use_bundle(self, bundle: Bundle | None) -> None:
        if bundle is not None:
            self._worker.install(bundle)
            notify_status(
                f"{self._settings.device}: {bundle.manifest.name} {bundle.manifest.version}"
            )
        self._session.bundle = None if bundle is None else bundle.digest

    # Presence

    def _build_will(self, boot: int) -> tuple[str, bytes]:
        topic = build_topic(self._settings.fleet, Channel.STATE, self._settings.device)
        return topic, encode_message(DeviceState(boot=boot, online=False, detail="lost"))

    def _publish_birth(self) -> None:
        birth = Birth(
            boot=self._boot,
            samples=len(self._data.y),
            label_counts=tuple(int(count) for count in self._data.label_counts),
            sample_shape=self._data.x.shape[1:],
            capabilities=self._capabilities,
            max_batch=self._settings.compute.max_batch,
            bundle=self._session.bundle,
            committed=self._updater.committed,
            agent=f"splitfleet-agent/{__version__}",
            labels=self._settings.labels,
        )
        self._publish(Channel.BIRTH, encode_message(birth))
        online = DeviceState(boot=self._boot, online=True)
        self._publish(Channel.STATE, encode_message(online))

    def _say_offline(self) -> None:
        leaving = DeviceState(boot=self._boot, online=False, detail="stopped")
        self._publish(Channel.STATE, encode_message(leaving))

    # Shell

    def _publish(self, channel: Channel, payload: bytes | bytearray) -> bool:
        try:
            return self._connection.publish(channel, payload, device=self._settings.device)
        except PayloadTooLargeError as exc:
            # Asking again would give the same: the coordinator's deadline takes the range back.
            self._count_refusal(
                PeerProtocolError(Refusal.OVERSIZED, str(exc)), f"own {channel.level}"
            )
            return True

    def _count_refusal(self, refusal: PeerProtocolError, topic: str) -> None:
        self._refused[refusal.reason.value] += 1
        first = self._refused[refusal.reason.value] == 1
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "%s: dropped a message on %s: %s",
            self._settings.device,
            topic,
            refusal,
        )

    def _housekeep(self, now_s: float) -> None:
        for _ in self._inbox.take_dropped_topics():
            self._refused[Refusal.QUEUE_FULL.value] += 1
        if now_s >= self._telemetry_due_s:
            self._telemetry_due_s = now_s + self._settings.telemetry_every_s
            self._publish(Channel.TELEMETRY, encode_message(self._telemetry()))
        if self._watchdog_interval_s is not None and now_s >= self._watchdog_due_s:
            # This loop turns and the network thread lives: that is what progress means here.
            self._watchdog_due_s = now_s + self._watchdog_interval_s
            notify_watchdog()

    def _telemetry(self) -> Telemetry:
        return Telemetry(
            boot=self._boot,
            refused=dict(self._refused),
            steps=self._answers,
            bytes_up=self._connection.bytes_sent,
            bytes_down=self._connection.bytes_received,
            rss_bytes=peak_rss_bytes(),
        )


class _UpdateHost:
    """What the updater may do with the daemon."""

    def __init__(self, daemon: AgentDaemon) -> None:
        self._daemon = daemon

    def say(self, status: RolloutStatus) -> None:
        self._daemon._publish(Channel.ROLLOUT_STATUS, encode_message(status))

    def listen(self, digest: str) -> None:
        self._daemon._connection.subscribe(self._topic(digest))

    def unlisten(self, digest: str) -> None:
        self._daemon._connection.unsubscribe(self._topic(digest))

    def check(self, manifest: Manifest) -> None:
        self._daemon._worker.check(manifest)

    def prepare(self, manifest: Manifest) -> None:
        self._daemon._worker.backend.prepare(manifest)

    def use(self, bundle: Bundle | None) -> None:
        self._daemon._use_bundle(bundle)

    def announce(self) -> None:
        self._daemon._publish_birth()

    def wake(self) -> None:
        self._daemon._inbox.wake()

    def _topic(self, digest: str) -> str:
        fleet = self._daemon._settings.fleet
        return build_topic(fleet, Channel.SHARED_BUNDLE, bundle=digest)
