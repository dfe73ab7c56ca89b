"""A training run and its devices in one process, feeding each other's bytes; no broker, no clock.

Messages wait in one queue per device and channel, as MQTT orders them; which queue is next is the
test's choice.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.actions import Phase
from coordinator.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from coordinator.config import RunSettings
from coordinator.model import RunModel, build_split
from coordinator.planning import permutation_seed
from coordinator.recorder import EpochRecord, StepRecord
from coordinator.registry import Registry
from coordinator.reporting import NullReporter
from coordinator.run import TrainingRun
from edge_agent.compute import build_backend
from edge_agent.datasets import LabelledData
from edge_agent.session import Session
from edge_agent.worker import Worker, order_samples
from models.export import export_bundle
from models.registry import build_network
from wire.bundle import Bundle
from wire.codec import decode_metadata
from wire.errors import PeerProtocolError
from wire.messages import (
    Allocation,
    Birth,
    Capabilities,
    CutGradientHeader,
    DeviceState,
    FleetState,
    SampleOrder,
    WeightsHeader,
    decode_message,
    parse_header,
)
from wire.topics import Channel, Direction

INPUT_SHAPE = (5,)
CLASSES = 3
SEED = 11

Samples = Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]


def make_samples(**sizes: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Learnable samples for each device, another class mix on each."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(CLASSES, *INPUT_SHAPE)).astype(np.float32)
    samples = {}
    for number, (name, size) in enumerate(sizes.items()):
        shares = np.roll([0.7, 0.2, 0.1], number)
        y = rng.choice(CLASSES, size=size, p=shares).astype(np.int64)
        x = centres[y] + 0.5 * rng.normal(size=(size, *INPUT_SHAPE)).astype(np.float32)
        samples[name] = (x.astype(np.float32), y)
    return samples


NETWORK = {"name": "mlp", "cut": "block1", "arguments": {"hidden": [8, 6]}}


@cache
def _exported(network: bytes, seed: int, input_shape: tuple[int, ...], classes: int) -> RunModel:
    """The model of a network, given as JSON: exported once for all tests."""
    settings = msgspec.convert({"network": msgspec.json.decode(network), "seed": seed}, RunSettings)
    split = build_split(settings, input_shape=input_shape, classes=classes, source="test")
    frozen = settings.network.frozen
    data = export_bundle(split, name="test", version="1", classes=classes, frozen=frozen)
    return RunModel(split=split, bundle=Bundle.from_bytes(data), bundle_bytes=data)


class Notes(NullReporter):
    """Keeps what a person would have seen."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)


class Agent:
    """A device's session and worker, fed as its daemon does it."""

    def __init__(self, name: str, data: LabelledData, bundle: Bundle):
        self.name = name
        self.boot = 1
        self.orders = tuple(order.value for order in SampleOrder)
        self.refused: Counter[str] = Counter()
        self._data = data
        self._bundle = bundle
        self.restart()

    def restart(self) -> None:
        """A new process: nothing is remembered."""
        frozen = self._bundle.manifest.frozen
        backend = build_backend("torch", "none" if frozen else "torch")
        self.worker = Worker(self._data, backend)
        self.worker.install(self._bundle)
        self.session = Session(samples=len(self._data.y), bundle=self._bundle.digest)

    def birth(self) -> Birth:
        return Birth(
            boot=self.boot,
            samples=len(self._data.y),
            label_counts=tuple(int(count) for count in self._data.label_counts),
            sample_shape=self._data.sample_shape,
            capabilities=Capabilities(backward=("torch",), orders=self.orders),
            bundle=self.session.bundle,
        )

    def receive(self, channel: Channel, payload: bytes) -> list[tuple[Channel, bytes]]:
        """Take a message; what the device publishes then."""
        try:
            return self._receive(channel, payload)
        except PeerProtocolError as refusal:
            self.refused[refusal.reason.value] += 1
            return []

    def _receive(self, channel: Channel, payload: bytes) -> list[tuple[Channel, bytes]]:
        out: list[tuple[Channel, bytes]] = []
        if channel is Channel.ALLOCATION:
            self.session.on_allocation(decode_message(payload, Allocation))
        elif channel is Channel.FLEET_STATE:
            self.session.on_fleet_state(decode_message(payload, FleetState))
        elif channel is Channel.WEIGHTS:
            header = parse_header(decode_metadata(payload), WeightsHeader)
            self.session.on_weights(header)
            self.worker.keep_weights(header.bundle, payload)
        elif channel is Channel.CUT_GRADIENT:
            cut = parse_header(decode_metadata(payload), CutGradientHeader)
            work = self.session.on_cut_gradient(cut)
            out.append((Channel.GRADIENTS, bytes(self.worker.gradients(work, payload))))
            self.session.mark_sent(work)
        while (due := self.session.next_work()) is not None:
            out.append((Channel.ACTIVATIONS, bytes(self.worker.activations(due))))
            self.session.mark_sent(due)
        return out


Queues = dict[tuple[str, Channel], deque[bytes]]


@dataclass
class Pair:
    """A coordinator's run and its agents."""

    directory: Path
    samples: Samples
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    attempt: int = 1
    network: Mapping[str, Any] = field(default_factory=lambda: NETWORK)
    classes: int = CLASSES
    test_data: LabelledData | None = None

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.queues: Queues = {}
        self.retained: dict[Channel, bytes] = {}
        self.reporter = Notes()
        self.registry = Registry()
        model = self._model()
        self.agents = {
            name: Agent(name, LabelledData(x=x, y=y, classes=self.classes), model.bundle)
            for name, (x, y) in self.samples.items()
        }
        self.run = self._build_run(model)

    def _model(self) -> RunModel:
        x, _ = next(iter(self.samples.values()))
        network = msgspec.json.encode({**self.network, "frozen": self.frozen})
        return _exported(network, self.settings.get("seed", SEED), x.shape[1:], self.classes)

    def _build_run(self, model: RunModel) -> TrainingRun:
        document = {
            "out": str(self.directory),
            "network": {**self.network, "frozen": self.frozen},
            "global_batch": 12,
            "epochs": 2,
            "min_devices": len(self.samples),
            "policy": {"name": "ugs"},
            "optimiser": {"name": "sgd", "lr": 0.1},
            "precision": "fp32",
            "seed": SEED,
        }
        return TrainingRun(
            msgspec.convert(document | self.settings, RunSettings),
            RunModel(copy.deepcopy(model.split), model.bundle, model.bundle_bytes),
            self.test_data,
            registry=self.registry,
            attempt=self.attempt,
            publish=self._publish,
            reporter=self.reporter,
            max_payload_bytes=1 << 20,
        )

    # The broker

    def _publish(
        self,
        channel: Channel,
        payload: bytes | bytearray,
        *,
        device: str | None = None,
        expiry_s: float | None = None,
    ) -> None:
        if channel.retain:
            self.retained[channel] = bytes(payload)
        names = self.agents if channel.direction is Direction.FLEET else [device]
        for name in names:
            assert name is not None
            queue = self.queues.setdefault((name, channel), deque())
            if channel is Channel.WEIGHTS:
                queue.clear()  # the inbox keeps only the newest
            queue.append(bytes(payload))

    def deliver(self, name: str, channel: Channel) -> None:
        """Hand over the oldest message of this queue."""
        payload = self.queues[name, channel].popleft()
        if channel.direction is Direction.UP:
            self.send_up(name, channel, payload)
            return
        for answer, data in self.agents[name].receive(channel, payload):
            self._publish(answer, data, device=name)

    def send_up(self, name: str, channel: Channel, payload: bytes) -> str | None:
        """A message from a device; the reason if it was refused, counted as the service does."""
        device = self.registry.device(name)
        activations = channel is Channel.ACTIVATIONS
        receive = self.run.receive_activations if activations else self.run.receive_gradients
        try:
            receive(device, payload, time.monotonic())
        except PeerProtocolError as refusal:
            self.registry.count_refusal(name, refusal.reason)
            return refusal.reason.value
        finally:
            self._checkpoint_if_due()
        return None

    def _checkpoint_if_due(self) -> None:
        while self.run.checkpoint_due:
            self.run.checkpointed()

    # Devices

    def connect(self, name: str) -> None:
        """A device subscribes, gets what the broker has retained, and announces itself."""
        agent = self.agents[name]
        for channel, payload in self.retained.items():
            agent.receive(channel, payload)
        self.run.device_changed(self.registry.on_birth(name, agent.birth()), time.monotonic())
        self._checkpoint_if_due()

    def disconnect(self, name: str) -> None:
        """A device is lost, with all that was on its way to it and from it."""
        agent = self.agents[name]
        self.queues = {key: queue for key, queue in self.queues.items() if key[0] != name}
        will = DeviceState(boot=agent.boot, online=False)
        agent.boot += 1
        self.run.device_changed(self.registry.on_state(name, will), time.monotonic())
        self._checkpoint_if_due()

    def restart(self, name: str) -> None:
        """A device's process ends and another one begins."""
        self.disconnect(name)
        self.agents[name].restart()
        self.connect(name)

    # The whole

    @property
    def waiting(self) -> list[tuple[str, Channel]]:
        return sorted((k for k, queue in self.queues.items() if queue), key=str)

    def train(
        self, *, shuffle: int | None = None, until: Phase = Phase.DONE, step: int = 0
    ) -> Pair:
        """Deliver messages until the run is in this phase, of this step at the earliest."""
        chance = random.Random(shuffle)
        while not (self.run.rounds.phase is until and self.run.rounds.step >= step):
            waiting = self.waiting
            if waiting:
                key = waiting[0] if shuffle is None else chance.choice(waiting)
                self.deliver(*key)
            else:
                self._pass_deadline()
        return self

    def _pass_deadline(self) -> None:
        deadline_s = self.run.rounds.deadline_s
        assert deadline_s is not None, "nothing is under way and nothing will ever happen"
        self.run.tick(deadline_s)
        self._checkpoint_if_due()

    def begin(self) -> Pair:
        for name in self.agents:
            self.connect(name)
        return self

    def checkpoint(self) -> Checkpoint:
        """The state as it stands in the file of a checkpoint."""
        tensors, document = self.run.checkpoint()
        folder = self.directory / "checkpoints"
        pointer = write_checkpoint(folder, self.run.rounds.step, tensors, document)  # type: ignore[arg-type]
        return read_checkpoint(pointer.path_in(folder), pointer.sha256)

    def weights(self) -> dict[str, torch.Tensor]:
        trainer = self.run.trainer
        state = trainer.client.state_dict() | trainer.server.state_dict()
        return {name: tensor.clone() for name, tensor in state.items()}

    def refused(self) -> dict[str, int]:
        """By anybody, for any reason."""
        total = Counter(self.registry.refused_in_all())
        for agent in self.agents.values():
            total.update(agent.refused)
        return dict(total)


def train_undivided(pair: Pair, *, frozen: bool = False) -> tuple[list[float], dict[str, Any]]:
    """Losses and weights of the undivided network on the batches that the run wrote down."""
    network = build_network(
        "mlp",
        input_shape=INPUT_SHAPE,
        classes=CLASSES,
        arguments={"hidden": [8, 6]},
        seed=SEED,
    )
    settings = pair.run.settings.optimiser
    trained = [p for n, p in network.named_parameters() if not (frozen and n.startswith("block1"))]
    optimiser: torch.optim.Optimizer = torch.optim.Adam(trained, lr=settings.lr)
    if settings.name.value == "sgd":
        optimiser = torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum)
    losses = []
    for record in pair.reporter.steps:
        x, y = _batch_of(pair, record)
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses, dict(network.state_dict())


def _batch_of(pair: Pair, record: StepRecord) -> tuple[torch.Tensor, torch.Tensor]:
    by_class = pair.run.settings.policy.name.is_by_class
    kind = SampleOrder.BY_CLASS if by_class else SampleOrder.SHUFFLED
    xs, ys = [], []
    for device, offset, count in record.slots:
        x, y = pair.samples[device]
        order = order_samples(permutation_seed(SEED, record.epoch, device), y, kind)
        rows = order[offset : offset + count]
        xs.append(x[rows])
        ys.append(y[rows])
    return torch.from_numpy(np.concatenate(xs)), torch.from_numpy(np.concatenate(ys))


def largest_difference(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """The largest relative difference of a weight tensor, by norm."""
    assert set(ours) == set(reference)
    return max(
        float((ours[name] - reference[name]).norm() / reference[name].norm()) for name in reference
    )
