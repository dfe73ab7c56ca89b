"""Topics, messages, tensor payloads and precision: what both sides must agree on."""

from __future__ import annotations

import contextlib
import json

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire.codec import decode_metadata, decode_tensors, encode_tensors, exact, exact_block
from wire.errors import PeerProtocolError, Refusal
from wire.halves import NumpyHalves, TorchHalves
from wire.messages import (
    ActivationsHeader,
    Allocation,
    Birth,
    DeviceState,
    Mode,
    Precision,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    Slot,
    build_metadata,
    decode_message,
    decode_rollout,
    encode_message,
    parse_header,
)
from wire.precision import (
    EXPONENTS,
    activation_parts,
    fp16_exponent,
    gradient_parts,
    read_all_floats,
    read_floats,
    read_labels,
)
from wire.topics import Address, Channel, Direction, build_topic, is_valid_name, parse_topic

GOLDEN_ALLOCATION = (
    b'{"run":"digits.1","epoch":2,"seed":12345,"plan":7,"bundle":"ab12","slots":[[40,0,8],'
    b'[42,8,3]],"precision":"fp16","mode":"lockstep","ahead":0,"rank":0,'
    b'"order":"shuffled","ranges":[]}'
)
GOLDEN_TENSORS = (
    b"X\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"step":"4"},"labels":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}'
)


class TestTopics:
    @pytest.mark.parametrize("channel", list(Channel))
    def test_every_topic_parses_back(self, channel: Channel) -> None:
        is_common = channel.direction in {Direction.FLEET, Direction.COORDINATOR}
        device = None if is_common else "pi-7"
        bundle = "0123456789abcdef" if channel is Channel.SHARED_BUNDLE else None
        topic = build_topic("lab", channel, device, bundle=bundle)
        assert parse_topic(topic) == Address("lab", channel, device, bundle)

    def test_shared_chunks_lie_below_what_every_device_listens_to(self) -> None:
        digest = "0123456789abcdef" * 4
        topic = build_topic("lab", Channel.SHARED_BUNDLE, bundle=digest)
        assert topic == "splitfleet/v1/lab/fleet/bundle/0123456789abcdef"

    @pytest.mark.parametrize(
        "topic",
        [
            "splitfleet/v1/lab/dev/pi-7/up/nonsense",
            "splitfleet/v1/lab/dev/pi-7/sideways/state",
            "splitfleet/v1/lab/dev//up/birth",
            "splitfleet/v2/lab/dev/pi-7/up/birth",
            "splitfleet/v1/lab/dev/a b/up/birth",
            "splitfleet/v1/lab/fleet/birth",
            "splitfleet/v1/lab/fleet/bundle",
            "splitfleet/v1/lab/fleet/bundle/0123456789ABCDEF",
            "splitfleet/v1/lab/fleet/bundle/0123456789abcdef/0",
            "other",
            "",
        ],
    )
    def test_a_foreign_topic_is_refused(self, topic: str) -> None:
        with pytest.raises(PeerProtocolError) as caught:
            parse_topic(topic)
        assert caught.value.reason is Refusal.UNKNOWN_TOPIC

    @pytest.mark.parametrize("name", ["+", "#", "a/b", "", "-x", "x" * 65, "ü"])
    def test_names_that_a_broker_would_misread_are_invalid(self, name: str) -> None:
        assert not is_valid_name(name)


class TestMessages:
    def test_golden_allocation(self) -> None:
        message = Allocation(
            run="digits.1",
            epoch=2,
            seed=12345,
            plan=7,
            bundle="ab12",
            slots=(Slot(40, 0, 8), Slot(42, 8, 3)),
            precision=Precision.FP16,
            mode=Mode.LOCKSTEP,
        )
        assert encode_message(message) == GOLDEN_ALLOCATION
        assert decode_message(GOLDEN_ALLOCATION, Allocation) == message

    def test_golden_rollout_messages(self) -> None:
        digest = "1" * 64
        cancel = RolloutCancel(digest=digest, campaign="c", revert=True, attempt=1)
        raw = b'{"kind":"cancel","digest":"%s","campaign":"c","revert":true,"attempt":1}'
        raw %= digest.encode()
        assert encode_message(cancel) == raw
        assert decode_rollout(raw) == cancel
        before_attempts = decode_rollout(raw.replace(b',"attempt":1', b""))
        assert before_attempts == RolloutCancel(digest=digest, campaign="c", revert=True)
        raw = b'{"kind":"acknowledge","digest":"%s","campaign":"c","sequence":3}' % digest.encode()
        message = RolloutAcknowledge(digest=digest, campaign="c", sequence=3)
        assert encode_message(message) == raw
        assert decode_rollout(raw) == message
        raw = b'{"kind":"offer","digest":"%s","size_bytes":9,"chunk_bytes":4}' % digest.encode()
        offer = RolloutOffer(digest=digest, size_bytes=9, chunk_bytes=4)
        assert decode_rollout(raw) == offer
        assert decode_rollout(encode_message(offer)) == offer

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "later"},
            {"kind": None},
            {"digest": "../../etc/passwd"},
            {"digest": "A" * 64},
            {"size_bytes": 0},
            {"chunk_bytes": 0},
            {"download_limit_s": 0},
            {"soak_s": -1},
            {"soak_s": 1e300},
        ],
    )
    def test_malformed_offer_is_refused(self, change: dict[str, object]) -> None:
        offer = {"kind": "offer", "digest": "1" * 64, "size_bytes": 9, "chunk_bytes": 4}
        with pytest.raises(PeerProtocolError) as caught:
            decode_rollout(json.dumps(offer | change).encode())
        assert caught.value.reason is Refusal.MALFORMED

    def test_unknown_fields_are_skipped(self) -> None:
        state = decode_message(b'{"boot":3,"online":true,"later":[1]}', DeviceState)
        assert state == DeviceState(boot=3, online=True)

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'"text"',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"boot":-1,"samples":1,"label_counts":[1],"sample_shape":[1]}',
            b'{"boot":1,"samples":0,"label_counts":[1],"sample_shape":[1]}',
            b'{"boot":1.5,"samples":1,"label_counts":[1],"sample_shape":[1]}',
            b'{"boot":1e300,"samples":1,"label_counts":[1],"sample_shape":[1]}',
            b'{"samples":1,"label_counts":[1],"sample_shape":[1]}',
        ],
    )
    def test_a_malformed_birth_is_refused(self, payload: bytes) -> None:
        with pytest.raises(PeerProtocolError) as caught:
            decode_message(payload, Birth)
        assert caught.value.reason is Refusal.MALFORMED

    def test_a_header_survives_text_metadata(self) -> None:
        header = ActivationsHeader(
            run="r", epoch=1, step=2, offset=3, count=4, weights_version=5, bundle="b"
        )
        assert parse_header(build_metadata(header), ActivationsHeader) == header

    @pytest.mark.parametrize("field", ["run", "epoch", "step", "offset", "count", "bundle"])
    def test_a_header_without_a_field_is_refused_by_name(self, field: str) -> None:
        header = ActivationsHeader(
            run="r", epoch=1, step=2, offset=3, count=4, weights_version=5, bundle="b"
        )
        metadata = build_metadata(header)
        del metadata[field]
        with pytest.raises(PeerProtocolError, match=field):
            parse_header(metadata, ActivationsHeader)


class TestCodec:
    def test_golden_bytes(self) -> None:
        payload = encode_tensors({"labels": exact(np.array([1, 2], np.int64))}, {"step": "4"})
        expected = GOLDEN_TENSORS + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
        assert decode_tensors(bytes(payload)).metadata == {"step": "4"}
        header = int.from_bytes(payload[:8], "little")
        assert json.loads(payload[8 : 8 + header]) == {
            "__metadata__": {"step": "4"},
            "labels": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        }
        assert payload == expected

    @given(
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int64, np.int8, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
            elements=st.integers(0, 100),
        )
    )
    def test_agrees_with_the_safetensors_library(self, array: np.ndarray) -> None:
        other = np.arange(3, dtype=np.uint8)
        ours = encode_tensors({"a": exact(array), "b": exact(other)}, {"k": "v"})
        theirs = safetensors.numpy.load(bytes(ours))
        np.testing.assert_array_equal(theirs["a"], array)
        written = safetensors.numpy.save({"a": array, "b": other}, {"k": "v"})
        read = decode_tensors(written)
        np.testing.assert_array_equal(read.arrays["a"], array)
        assert read.arrays["a"].dtype == array.dtype
        assert read.metadata == decode_metadata(written) == {"k": "v"}

    def test_decoding_copies_nothing(self) -> None:
        payload = encode_tensors({"a": exact(np.arange(1000, dtype=np.float32))}, {})
        view = decode_tensors(payload).arrays["a"]
        assert np.shares_memory(view, np.frombuffer(payload, np.uint8))
        assert not view.flags.writeable

    def test_block_has_the_bytes_of_its_tensors_alone(self) -> None:
        arrays = {
            "b": np.arange(6, dtype=np.float32).reshape(2, 3),
            "a": np.float32(7.0).reshape(()),
            "c": np.zeros((0, 2), np.float32),
        }
        labels = exact(np.array([3], np.int64))
        alone = encode_tensors({n: exact(a) for n, a in arrays.items()} | {"y": labels}, {"k": "v"})
        block = encode_tensors({"floats": exact_block(arrays), "y": labels}, {"k": "v"})
        assert block == alone
        theirs = safetensors.numpy.load(bytes(block))
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs[name], array)

    @given(st.binary(max_size=200))
    def test_arbitrary_bytes_never_do_worse_than_a_refusal(self, payload: bytes) -> None:
        with pytest.raises(PeerProtocolError):
            decode_tensors(payload)

    @given(st.data())
    def test_flipped_bytes_never_do_worse_than_a_refusal(self, data: st.DataObject) -> None:
        payload = encode_tensors({"a": exact(np.arange(6, dtype=np.float32))}, {"run": "x"})
        position = data.draw(st.integers(0, len(payload) - 1))
        payload[position] ^= data.draw(st.integers(1, 255))
        with contextlib.suppress(PeerProtocolError):
            decode_tensors(payload)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
            {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            {"dtype": "F32"},
            [],
        ],
    )
    def test_a_lying_header_is_refused(self, entry: object) -> None:
        head = json.dumps({"a": entry}).encode()
        payload = len(head).to_bytes(8, "little") + head + bytes(8)
        with pytest.raises(PeerProtocolError):
            decode_tensors(payload)

    def test_a_huge_header_length_costs_no_memory(self) -> None:
        with pytest.raises(PeerProtocolError, match="header length"):
            decode_tensors((2**60).to_bytes(8, "little") + b"{}")


def _through_wire(parts: dict, metadata: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return read_floats(decode_tensors(encode_tensors(parts, metadata)), name, shape)


SHAPES = {"w": (3, 4), "b": (3,), "s": (), "none": (0, 2)}


def _gradients(scale: float) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        name: (draw.standard_normal(shape) * scale * (10.0 if name == "b" else 1.0)).astype("f4")
        for name, shape in SHAPES.items()
    }


class TestBlocks:
    """Many tensors of one type, written, converted and checked at once."""

    @pytest.mark.parametrize("precision", list(Precision))
    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3])
    def test_all_at_once_gives_what_one_by_one_gives(
        self, precision: Precision, scale: float
    ) -> None:
        parts, metadata = gradient_parts(_gradients(scale), precision)
        tensors = decode_tensors(encode_tensors(parts, metadata))
        together = read_all_floats(tensors, SHAPES)
        assert together.keys() == SHAPES.keys()
        for name, shape in SHAPES.items():
            np.testing.assert_array_equal(together[name], read_floats(tensors, name, shape))
            error = np.abs(together[name] - _gradients(scale)[name])
            assert (error <= 1e-3 * np.abs(_gradients(scale)[name]).max(initial=0)).all()

    @pytest.mark.parametrize("precision", list(Precision))
    def test_what_is_read_has_memory_of_its_own(self, precision: Precision) -> None:
        parts, metadata = gradient_parts(_gradients(1.0), precision)
        payload = encode_tensors(parts, metadata)
        before = bytes(payload)
        for array in read_all_floats(decode_tensors(payload), SHAPES).values():
            np.add(array, 1.0, out=array)
        assert payload == before

    def test_mixed_types_and_further_tensors_are_read_as_well(self) -> None:
        arrays = _gradients(1.0)
        parts = {n: exact(a.astype("f2") if n == "w" else a) for n, a in arrays.items()}
        parts["more"] = exact(np.zeros(2, np.int64))
        found = read_all_floats(decode_tensors(encode_tensors(parts, {})), SHAPES)
        np.testing.assert_array_equal(found["w"], arrays["w"].astype("f2"))
        np.testing.assert_array_equal(found["b"], arrays["b"])

    def test_fp32_with_exponents_is_scaled_back(self) -> None:
        arrays = _gradients(1.0)
        payload = encode_tensors({"x": exact_block(arrays)}, {EXPONENTS: '{"b": 3}'})
        before = bytes(payload)
        found = read_all_floats(decode_tensors(payload), SHAPES)
        np.testing.assert_array_equal(found["b"], arrays["b"] / 8)
        np.testing.assert_array_equal(found["w"], arrays["w"])
        assert payload == before

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (np.nan, Refusal.NON_FINITE),
            (np.inf, Refusal.NON_FINITE),
            (-np.inf, Refusal.NON_FINITE),
            (2e6, Refusal.RANGE),
            (-2e6, Refusal.RANGE),
        ],
    )
    def test_bad_value_anywhere_is_refused_by_name(self, value: float, reason: Refusal) -> None:
        arrays = _gradients(1.0)
        arrays["b"][1] = value
        tensors = decode_tensors(encode_tensors({"x": exact_block(arrays)}, {}))
        with pytest.raises(PeerProtocolError, match="'b'") as caught:
            read_all_floats(tensors, SHAPES)
        assert caught.value.reason is reason
        if reason is Refusal.RANGE:
            assert read_all_floats(tensors, SHAPES, limited=False)["b"][1] == value

    def test_wrong_shape_and_missing_tensor_are_refused(self) -> None:
        arrays = _gradients(1.0)
        tensors = decode_tensors(encode_tensors({"x": exact_block(arrays)}, {}))
        with pytest.raises(PeerProtocolError, match=r"'w' of shape \(4, 3\)"):
            read_all_floats(tensors, SHAPES | {"w": (4, 3)})
        with pytest.raises(PeerProtocolError, match="expected a tensor 'x'"):
            read_all_floats(tensors, SHAPES | {"x": (1,)})


class TestPrecision:
    rng = np.random.default_rng(0)

    def test_fp32_is_exact(self) -> None:
        x = self.rng.standard_normal((5, 3, 2)).astype(np.float32)
        parts, metadata = activation_parts("a", x, Precision.FP32)
        np.testing.assert_array_equal(_through_wire(parts, metadata, "a", x.shape), x)

    @pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 3e4, 1e6, 1e30])
    def test_scaled_fp16_gradients_keep_three_digits_at_any_magnitude(
        self, magnitude: float
    ) -> None:
        g = (self.rng.standard_normal((64, 32)) * magnitude).astype(np.float32)
        parts, metadata = gradient_parts({"g": g}, Precision.FP16)
        tensors = decode_tensors(encode_tensors(parts, metadata))
        back = read_floats(tensors, "g", g.shape, limited=False)
        assert np.linalg.norm(back / magnitude - g / magnitude) <= 1e-3 * np.linalg.norm(
            g / magnitude
        )

    def test_plain_fp16_would_lose_small_gradients(self) -> None:
        g = np.full((4,), 1e-8, np.float32)
        assert np.all(g.astype(np.float16) == 0)
        parts, metadata = gradient_parts({"g": g}, Precision.FP16)
        np.testing.assert_allclose(_through_wire(parts, metadata, "g", (4,)), g, rtol=1e-3)

    def test_fp16_activations_beyond_its_range_are_scaled_instead_of_overflowing(self) -> None:
        x = np.array([[1e6, -2e6]], np.float32)
        parts, metadata = activation_parts("a", x, Precision.FP16)
        tensors = decode_tensors(encode_tensors(parts, metadata))
        back = read_floats(tensors, "a", (1, 2), limited=False)
        np.testing.assert_allclose(back, x, rtol=1e-3)

    @pytest.mark.parametrize("value", [1.1e6, -1e30])
    def test_values_that_would_wreck_the_weights_are_refused(self, value: float) -> None:
        x = np.array([[1.0, value]], np.float32)
        with pytest.raises(PeerProtocolError) as caught:
            _through_wire({"a": exact(x)}, {}, "a", (1, 2))
        assert caught.value.reason is Refusal.RANGE

    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6),
            elements=st.floats(-1000, 1000, width=32),
        )
    )
    def test_int8_error_is_within_half_a_level_of_each_channel(self, x: np.ndarray) -> None:
        parts, metadata = activation_parts("a", x, Precision.INT8)
        back = _through_wire(parts, metadata, "a", x.shape)
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        level_C = (
            np.maximum(x.max(axis=axes), 0).astype(np.float64) - np.minimum(x.min(axis=axes), 0)
        ) / 255
        error_C = np.abs(back.astype(np.float64) - x).max(axis=axes)
        assert np.all(error_C <= level_C * 1.01 + 1e-6)
        assert np.all(back[x == 0] == 0)

    def test_exponent_brings_the_largest_value_below_the_fp16_limit(self) -> None:
        for magnitude in (1e-20, 0.1, 1.0, 2.0, 65504.0, 1e10):
            scaled = magnitude * 2.0 ** fp16_exponent(magnitude)
            assert 2**14 <= scaled <= 2**15
        assert fp16_exponent(0.0) == fp16_exponent(float("nan")) == 0

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
    def test_values_that_are_not_finite_are_refused(self, bad: float, precision: Precision) -> None:
        x = np.zeros((2, 3), np.float32)
        x[1, 1] = bad
        for parts, metadata in (
            activation_parts("a", x, precision),
            gradient_parts({"a": x}, precision),
        ):
            with pytest.raises(PeerProtocolError) as caught:
                _through_wire(parts, metadata, "a", x.shape)
            assert caught.value.reason is Refusal.NON_FINITE

    def test_a_wrong_shape_names_both(self) -> None:
        with pytest.raises(PeerProtocolError, match=r"\(3, 2\), received \(2, 3\)") as caught:
            _through_wire({"a": exact(np.zeros((2, 3), np.float32))}, {}, "a", (3, 2))
        assert caught.value.reason is Refusal.SHAPE

    def test_a_wrong_type_is_refused(self) -> None:
        with pytest.raises(PeerProtocolError) as caught:
            _through_wire({"a": exact(np.zeros((2, 3), np.float64))}, {}, "a", (2, 3))
        assert caught.value.reason is Refusal.DTYPE

    @pytest.mark.parametrize("text", ["{", "[1]", '{"a":"x"}', '{"a":1000}', '{"a":-121}'])
    def test_nonsense_exponents_are_refused(self, text: str) -> None:
        with pytest.raises(PeerProtocolError) as caught:
            _through_wire({"a": exact(np.zeros(2, np.float16))}, {EXPONENTS: text}, "a", (2,))
        assert caught.value.reason is Refusal.MALFORMED

    @pytest.mark.parametrize("side", [np.zeros(2, np.float32), np.zeros(3, np.float16)])
    def test_int8_with_a_wrong_scale_is_refused(self, side: np.ndarray) -> None:
        parts = {
            "a": exact(np.zeros((2, 3), np.int8)),
            "a.scale": exact(side),
            "a.zero_point": exact(np.zeros(3, np.int8)),
        }
        with pytest.raises(PeerProtocolError) as caught:
            _through_wire(parts, {}, "a", (2, 3))
        assert caught.value.reason in (Refusal.SHAPE, Refusal.DTYPE)

    @pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
    def test_labels_of_any_integer_type(self, dtype: type) -> None:
        tensors = decode_tensors(encode_tensors({"y": exact(np.array([0, 2], dtype))}, {}))
        np.testing.assert_array_equal(read_labels(tensors, "y", 2, 3), [0, 2])

    @pytest.mark.parametrize(
        ("labels", "reason"),
        [
            (np.array([0, 3]), Refusal.LABEL_RANGE),
            (np.array([-1, 0]), Refusal.LABEL_RANGE),
            (np.array([0.0, 1.0]), Refusal.DTYPE),
            (np.array([0, 1, 2]), Refusal.SHAPE),
            (np.array([2**63], np.uint64).repeat(2), Refusal.LABEL_RANGE),
        ],
    )
    def test_wrong_labels_are_refused(self, labels: np.ndarray, reason: Refusal) -> None:
        tensors = decode_tensors(encode_tensors({"y": exact(labels)}, {}))
        with pytest.raises(PeerProtocolError) as caught:
            read_labels(tensors, "y", 2, 3)
        assert caught.value.reason is reason


def test_schema_1_birth_written_by_a_minimal_device_is_understood() -> None:
    birth = decode_message(
        msgspec.json.encode({"boot": 1, "samples": 3, "label_counts": [1, 2], "sample_shape": [4]}),
        Birth,
    )
    assert birth.capabilities.forward == ("onnxruntime",)
    assert birth.max_batch is None


@given(
    hnp.arrays(np.float32, 64, elements=st.floats(-1e6, 1e6, width=32)),
    st.integers(-20, 20),
)
def test_half_converters_give_the_same_bits(x: np.ndarray, exponent: int) -> None:
    outs = []
    for converter in (NumpyHalves(), TorchHalves(torch)):
        half, back = np.empty(64, np.float16), np.empty(64, np.float32)
        converter.to_half(x, 2.0**exponent, half)
        converter.from_half(half, 2.0**-exponent, back)
        outs.append((half.tobytes(), back.tobytes()))
    assert outs[0] == outs[1]
