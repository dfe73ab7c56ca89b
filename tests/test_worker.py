"""The device's tensor work: the samples of a range, weights as they are needed, payloads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.config import RunSettings
from coordinator.model import build_model
from edge_agent.compute import build_backend
from edge_agent.config import AgentSettings
from edge_agent.daemon import AgentDaemon
from edge_agent.datasets import LabelledData
from edge_agent.session import SendActivations, SendGradients
from edge_agent.worker import Worker, order_samples
from wire.bundle import Bundle
from wire.codec import Tensors, decode_tensors, encode_tensors, exact
from wire.errors import ModelError, PeerProtocolError, Refusal
from wire.inbox import Received
from wire.messages import (
    ActivationsHeader,
    Allocation,
    Capabilities,
    GradientsHeader,
    Precision,
    SampleOrder,
    Slot,
    WeightsHeader,
    build_metadata,
    parse_header,
)
from wire.precision import read_floats, read_labels
from wire.topics import Channel, build_topic

INPUT_SHAPE, CLASSES, SAMPLES, SEED = (5,), 3, 20, 99
SLOT, RANGES = Slot(4, 3, 6), ((3, 6),)


@cache
def _bundle(frozen: bool = False, folder: str = "") -> Bundle:
    network = {"name": "mlp", "cut": "block1", "arguments": {"hidden": [8]}, "frozen": frozen}
    settings = msgspec.convert({"network": network, "out": folder}, RunSettings)
    return build_model(settings, input_shape=INPUT_SHAPE, classes=CLASSES, source="test").bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(folder=str(tmp_path_factory.mktemp("bundle")))


def _data() -> LabelledData:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, *INPUT_SHAPE)).astype(np.float32)
    return LabelledData(x=x, y=rng.integers(0, CLASSES, SAMPLES), classes=CLASSES)


def _worker(bundle: Bundle) -> Worker:
    worker = Worker(_data(), build_backend("torch", "torch"))
    worker.install(bundle)
    return worker


def _allocation(bundle: Bundle, precision: Precision = Precision.FP32, seed: int = SEED) -> Any:
    return Allocation(
        run="run.1",
        epoch=2,
        seed=seed,
        plan=1,
        bundle=bundle.digest,
        slots=(SLOT,),
        precision=precision,
    )


def _send(bundle: Bundle, version: int = 0, **kwargs: Any) -> SendActivations:
    return SendActivations(_allocation(bundle, **kwargs), SLOT, version, RANGES)


def _answer(bundle: Bundle, version: int = 0, **kwargs: Any) -> SendGradients:
    return SendGradients(_allocation(bundle, **kwargs), SLOT, version, RANGES)


def _rows(seed: int = SEED) -> Any:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(SAMPLES)
    return order[SLOT.offset : SLOT.offset + SLOT.count]


def _expected(weights: dict[str, Any], seed: int = SEED) -> Any:
    """Linear and ReLU, by hand."""
    x = _data().x[_rows(seed)].astype(np.float64)
    weight, bias = weights["block1.linear.weight"], weights["block1.linear.bias"]
    return np.maximum(x @ weight.T.astype(np.float64) + bias, 0.0)


def _floats(tensors: Tensors) -> Any:
    return read_floats(tensors, "activations", (SLOT.count, 8))


def _weights_payload(weights: dict[str, Any]) -> bytes:
    return bytes(encode_tensors({name: exact(array) for name, array in weights.items()}, {}))


def _new_weights(bundle: Bundle) -> dict[str, Any]:
    return {
        name: (array * 2 + 0.25).astype(np.float32)
        for name, array in bundle.initial_weights().items()
    }


def _cut_gradient(value: float = 0.5, shape: tuple[int, ...] = (SLOT.count, 8)) -> bytes:
    return bytes(encode_tensors({"gradient": exact(np.full(shape, value, np.float32))}, {}))


def test_range_means_the_samples_of_the_permutation_of_its_seed(bundle: Bundle) -> None:
    tensors = decode_tensors(_worker(bundle).activations(_send(bundle)))
    labels = read_labels(tensors, "labels", SLOT.count, CLASSES)
    assert np.array_equal(labels, _data().y[_rows()])
    np.testing.assert_allclose(_floats(tensors), _expected(bundle.initial_weights()), atol=1e-6)


def test_header_says_what_the_activations_belong_to(bundle: Bundle) -> None:
    tensors = decode_tensors(_worker(bundle).activations(_send(bundle, 7)))
    assert parse_header(tensors.metadata, ActivationsHeader) == ActivationsHeader(
        run="run.1",
        epoch=2,
        step=4,
        offset=3,
        count=6,
        weights_version=7,
        bundle=bundle.digest,
    )


def test_new_epoch_has_another_permutation_and_the_old_one_can_return(bundle: Bundle) -> None:
    worker = _worker(bundle)
    first = worker.activations(_send(bundle))
    other = decode_tensors(worker.activations(_send(bundle, seed=SEED + 1)))
    np.testing.assert_allclose(
        _floats(other), _expected(bundle.initial_weights(), SEED + 1), atol=1e-6
    )
    assert worker.activations(_send(bundle)) == first


def test_restarted_device_gives_the_same_bytes(bundle: Bundle) -> None:
    assert _worker(bundle).activations(_send(bundle)) == _worker(bundle).activations(_send(bundle))


def test_weights_are_used_from_the_next_range_on(bundle: Bundle) -> None:
    worker = _worker(bundle)
    worker.activations(_send(bundle))
    weights = _new_weights(bundle)
    worker.keep_weights(bundle.digest, _weights_payload(weights))
    tensors = decode_tensors(worker.activations(_send(bundle, 1)))
    np.testing.assert_allclose(_floats(tensors), _expected(weights), rtol=1e-5, atol=1e-5)


def test_weights_of_another_bundle_are_not_used(bundle: Bundle) -> None:
    worker = _worker(bundle)
    worker.keep_weights("0" * 64, _weights_payload(_new_weights(bundle)))
    tensors = decode_tensors(worker.activations(_send(bundle)))
    np.testing.assert_allclose(_floats(tensors), _expected(bundle.initial_weights()), atol=1e-6)


def test_weights_that_no_range_needs_are_not_even_decoded(bundle: Bundle) -> None:
    worker = _worker(bundle)
    worker.keep_weights(bundle.digest, b"nonsense")
    worker.keep_weights(bundle.digest, _weights_payload(bundle.initial_weights()))
    assert worker.activations(_send(bundle))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"nonsense", Refusal.MALFORMED),
        (bytes(encode_tensors({"x": exact(np.zeros(1, np.float32))}, {})), Refusal.MALFORMED),
    ],
)
def test_broken_weights_are_refused(bundle: Bundle, payload: bytes, reason: Refusal) -> None:
    worker = _worker(bundle)
    worker.keep_weights(bundle.digest, payload)
    for _ in range(2):  # older weights never take their place under the newer version
        with pytest.raises(PeerProtocolError) as caught:
            worker.activations(_send(bundle, 1))
        assert caught.value.reason is reason
        with pytest.raises(PeerProtocolError):
            worker.gradients(_answer(bundle, 1), _cut_gradient())
    worker.keep_weights(bundle.digest, _weights_payload(_new_weights(bundle)))
    assert worker.activations(_send(bundle, 2))


def test_gradients_are_summed_over_the_range(bundle: Bundle) -> None:
    worker = _worker(bundle)
    worker.activations(_send(bundle))
    tensors = decode_tensors(worker.gradients(_answer(bundle), _cut_gradient()))
    weights = bundle.initial_weights()
    x = _data().x[_rows()].astype(np.float64)
    passed = 0.5 * (_expected(weights) > 0)
    weight = read_floats(tensors, "block1.linear.weight", (8, 5))
    bias = read_floats(tensors, "block1.linear.bias", (8,))
    np.testing.assert_allclose(weight, passed.T @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, passed.sum(axis=0), rtol=1e-5, atol=1e-6)
    header = parse_header(tensors.metadata, GradientsHeader)
    assert (header.step, header.offset, header.count, header.weights_version) == (4, 3, 6, 0)


def test_restarted_device_gives_the_same_gradients_without_a_forward_pass(bundle: Bundle) -> None:
    first = _worker(bundle)
    first.activations(_send(bundle))
    expected = decode_tensors(first.gradients(_answer(bundle), _cut_gradient()))
    again = decode_tensors(_worker(bundle).gradients(_answer(bundle), _cut_gradient()))
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(again.arrays[name], array, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", Refusal.MALFORMED),
        (_cut_gradient(shape=(5, 8)), Refusal.SHAPE),
        (_cut_gradient(np.nan), Refusal.NON_FINITE),
        (bytes(encode_tensors({"gradient": exact(np.zeros((6, 8)))}, {})), Refusal.DTYPE),
    ],
)
def test_broken_cut_gradient_is_refused_and_a_good_one_is_answered_after_it(
    bundle: Bundle, payload: bytes, reason: Refusal
) -> None:
    worker = _worker(bundle)
    worker.activations(_send(bundle))
    with pytest.raises(PeerProtocolError) as caught:
        worker.gradients(_answer(bundle), payload)
    assert caught.value.reason is reason
    assert worker.gradients(_answer(bundle), _cut_gradient())


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(Precision.FP16, 2e-3), (Precision.INT8, 2e-2)]
)
def test_payloads_have_the_precision_that_the_allocation_asks_for(
    bundle: Bundle, precision: Precision, tolerance: float
) -> None:
    worker = _worker(bundle)
    work = _send(bundle, precision=precision)
    tensors = decode_tensors(worker.activations(work))
    dtype = {Precision.FP16: np.float16, Precision.INT8: np.int8}[precision]
    assert tensors.require("activations").dtype == dtype
    expected = _expected(bundle.initial_weights())
    assert np.abs(_floats(tensors) - expected).max() <= tolerance * np.abs(expected).max()
    answer = worker.gradients(_answer(bundle, precision=precision), _cut_gradient())
    assert decode_tensors(answer).require("block1.linear.weight").dtype == np.float16


def test_bundle_for_other_samples_is_refused_with_both_shapes(bundle: Bundle) -> None:
    data = LabelledData(x=np.zeros((4, 2, 3), np.float32), y=np.zeros(4, np.int64), classes=3)
    worker = Worker(data, build_backend("torch", "torch"))
    with pytest.raises(ModelError, match=r"shape \(5,\), this device holds \(2, 3\)"):
        worker.install(bundle)


def test_bundle_with_fewer_classes_is_refused(bundle: Bundle) -> None:
    data = LabelledData(x=np.zeros((4, 5), np.float32), y=np.full(4, 3, np.int64), classes=4)
    worker = Worker(data, build_backend("torch", "torch"))
    with pytest.raises(ModelError, match="labels of 3 classes, this device holds 4"):
        worker.install(bundle)


def test_device_without_a_backward_pass_takes_only_frozen_bundles(
    bundle: Bundle, tmp_path: Path
) -> None:
    worker = Worker(_data(), build_backend("onnxruntime", "none"))
    with pytest.raises(ModelError, match=r"expected compute\.backward other than none"):
        worker.install(bundle)
    frozen = _bundle(frozen=True, folder=str(tmp_path))
    worker.install(frozen)
    worker.keep_weights(frozen.digest, b"nonsense")  # a frozen segment keeps its own
    tensors = decode_tensors(worker.activations(_send(frozen)))
    np.testing.assert_allclose(_floats(tensors), _expected(frozen.initial_weights()), atol=1e-5)


class _Broker:
    """In the place of the agent's connection: always there, keeps what is published."""

    is_connected = True
    bytes_sent = bytes_received = 0

    def __init__(self) -> None:
        self.published: list[Channel] = []

    def publish(self, channel: Channel, payload: bytes | bytearray, *, device: str) -> bool:
        self.published.append(channel)
        return True


def _weights_message(bundle: Bundle, step: int, weights: dict[str, Any]) -> bytes:
    header = WeightsHeader(run="run.1", epoch=2, step=step, version=step - 1, bundle=bundle.digest)
    parts = {name: exact(array) for name, array in weights.items()}
    return bytes(encode_tensors(parts, build_metadata(header)))


def test_agent_drops_weights_that_it_cannot_use_and_goes_on_with_the_next(
    bundle: Bundle, tmp_path: Path
) -> None:
    data = {"npz": {"path": "unused"}}
    settings = msgspec.convert(
        {"device": "d", "data": data, "state_dir": str(tmp_path)}, AgentSettings
    )
    daemon = AgentDaemon(settings, _data(), _worker(bundle), Capabilities(backward=("torch",)))
    broker = _Broker()
    daemon._connection = broker  # type: ignore[assignment]
    daemon._session.bundle = bundle.digest
    daemon._session.on_allocation(_allocation(bundle))
    weights = bundle.initial_weights()
    broken = weights | {"block1.linear.bias": np.full(8, np.nan, np.float32)}
    for message in (
        _weights_message(bundle, SLOT.step, broken),
        _weights_message(bundle, SLOT.step, {}),
        _weights_message(bundle, SLOT.step, weights),
    ):
        topic = build_topic("lab", Channel.WEIGHTS)
        daemon._inbox.put(Received(topic, message, False, None, 0.0))
        assert Channel.ACTIVATIONS not in broker.published
        daemon._turn()  # takes the message
        daemon._inbox.wake()
        daemon._turn()  # does what is due
    assert broker.published.count(Channel.ACTIVATIONS) == 1
    assert daemon._telemetry().refused == {"non-finite": 1, "malformed": 1}


def test_order_by_class_is_the_permutation_sorted_by_label() -> None:
    labels = np.array([2, 0, 1, 0, 2, 2, 0, 1])
    shuffled = order_samples(7, labels, SampleOrder.SHUFFLED)
    by_class = order_samples(7, labels, SampleOrder.BY_CLASS)
    assert sorted(by_class.tolist()) == list(range(8))
    assert labels[by_class].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    for label in range(3):
        own = [i for i in shuffled.tolist() if labels[i] == label]
        assert [i for i in by_class.tolist() if labels[i] == label] == own
    assert any(
        order_samples(seed, labels, SampleOrder.BY_CLASS).tolist() != by_class.tolist()
        for seed in range(5)
    )


def test_ranges_by_class_are_sent_in_their_order_with_their_labels(bundle: Bundle) -> None:
    allocation = msgspec.structs.replace(_allocation(bundle), order=SampleOrder.BY_CLASS)
    labels = _data().y
    order = order_samples(SEED, labels, SampleOrder.BY_CLASS)
    work = SendActivations(allocation, SLOT, 0, ((3, 2), (14, 4)))
    tensors = decode_tensors(_worker(bundle).activations(work))
    expected = labels[np.concatenate([order[3:5], order[14:18]])]
    assert tensors.require("labels").tolist() == expected.tolist()
