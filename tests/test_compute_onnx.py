"""The backward pass on ONNX Runtime: right gradients, no torch, and refusals by name.

The backward graph of ``bundle`` is written by hand, so that what is tested is the device alone.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_agent.compute import ComputeBackend, build_backend, choose_backward
from edge_agent.compute import segment as segment_module
from edge_agent.compute.segment import SegmentBackend
from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from wire.bundle import Bundle, build_bundle
from wire.errors import ConfigError, ModelError

FEATURES, HIDDEN, CLASSES = 6, 5, 3
WEIGHT, BIAS = "block1.linear.weight", "block1.linear.bias"

Float32 = NDArray[np.float32]


def linear_backward(
    *, weight_out: str = f"grad.{WEIGHT}", extra_input: str | None = None, hidden: int = HIDDEN
) -> bytes:
    """dW = gᵀ x and db = Σ g of relu(x Wᵀ + b), with g the cut gradient where the ReLU is open."""
    nodes = [
        helper.make_node("Gemm", ["x", WEIGHT, BIAS], ["z"], transB=1),
        helper.make_node("Relu", ["z"], ["y"]),
        helper.make_node("Sign", ["y"], ["open"]),
        helper.make_node("Mul", ["grad_out", "open"], ["g"]),
        helper.make_node("Gemm", ["g", "x"], [weight_out], transA=1),
        helper.make_node("ReduceSum", ["g", "axis"], [f"grad.{BIAS}"], keepdims=0),
    ]
    float32 = TensorProto.FLOAT

    def value(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, float32, shape)

    inputs = [
        value("x", "batch", FEATURES),
        value(WEIGHT, hidden, FEATURES),
        value(BIAS, hidden),
        value("grad_out", "batch", hidden),
        *([value(extra_input, 1)] if extra_input else []),
    ]
    outputs = [value(weight_out, hidden, FEATURES), value(f"grad.{BIAS}", hidden)]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(nodes, "client_backward", inputs, outputs, [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def with_files(bundle: Bundle, **changes: bytes | None) -> Bundle:
    """With other contents of files, named without ``.onnx``, or without those that are None."""
    changed = {f"{name}.onnx": data for name, data in changes.items()}
    files = {**bundle.files, **changed}
    kept = {name: data for name, data in files.items() if data is not None}
    return Bundle.from_bytes(build_bundle(bundle.manifest, kept))


def with_backward(bundle: Bundle, graph: bytes | None) -> Bundle:
    """As exported before there were halves, with this backward graph."""
    return with_files(
        bundle, client_backward=graph, client_forward_kept=None, client_backward_kept=None
    )


@pytest.fixture(scope="module")
def exported() -> Bundle:
    network = build_network(
        "mlp", input_shape=(FEATURES,), classes=CLASSES, arguments={"hidden": [HIDDEN]}, seed=0
    )
    split = split_network(network, "block1", (FEATURES,))
    return Bundle.from_bytes(export_bundle(split, name="mlp", version="1", classes=CLASSES))


@pytest.fixture(scope="module")
def bundle(exported: Bundle) -> Bundle:
    return with_backward(exported, linear_backward())


def loaded(bundle: Bundle, **options: Any) -> ComputeBackend:
    backend = build_backend(**{"backward": "onnxruntime", **options})
    backend.load(bundle)
    return backend


def batch(count: int, seed: int = 0) -> tuple[Float32, Float32]:
    """Samples and cut gradients."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, FEATURES), np.float32)
    return x, rng.standard_normal((count, HIDDEN), np.float32)


def expected_gradients(
    weights: Mapping[str, NDArray[Any]], x: Float32, grad: Float32
) -> dict[str, Float32]:
    g = grad * (x @ weights[WEIGHT].T + weights[BIAS] > 0)
    return {WEIGHT: g.T @ x, BIAS: g.sum(axis=0)}


def assert_gradients(
    received: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> None:
    assert received.keys() == expected.keys()
    for name, gradient in received.items():
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forward", ["auto", "onnxruntime", "torch"])
def test_gradients_are_those_of_the_formula_whatever_runs_forward(
    bundle: Bundle, forward: str
) -> None:
    backend = loaded(bundle, forward=forward)
    x, grad = batch(7)
    backend.forward(x, token=1)
    weights = bundle.initial_weights()
    assert_gradients(backend.backward(x, grad, token=1), expected_gradients(weights, x, grad))


def test_weights_that_are_set_are_the_ones_used_in_both_passes(bundle: Bundle) -> None:
    backend = loaded(bundle)
    weights = {name: array * -1.5 + 0.1 for name, array in bundle.initial_weights().items()}
    backend.set_weights(weights)
    x, grad = batch(4)
    activations = np.maximum(x @ weights[WEIGHT].T + weights[BIAS], 0)
    np.testing.assert_allclose(backend.forward(x), activations, rtol=1e-5, atol=1e-5)
    assert_gradients(backend.backward(x, grad), expected_gradients(weights, x, grad))


def test_weights_at_an_odd_address_of_a_message_are_taken(bundle: Bundle) -> None:
    backend = loaded(bundle)
    weights = dict(bundle.initial_weights())
    raw = weights[WEIGHT].tobytes()
    view = np.frombuffer(b"." + raw, np.uint8)[1:].view(np.float32).reshape(HIDDEN, FEATURES)
    assert not view.flags.aligned
    backend.set_weights({**weights, WEIGHT: view})
    x, grad = batch(3)
    assert_gradients(backend.backward(x, grad), expected_gradients(weights, x, grad))


@pytest.mark.parametrize("samples_that_fit", [1, 3, 7, 50])
def test_micro_batches_give_what_the_whole_batch_gives(
    bundle: Bundle, samples_that_fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = samples_that_fit * bundle.manifest.onnx_backward_bytes_per_sample
    backend = loaded(bundle, max_batch_bytes=limit)
    sizes = watch_passes(backend, monkeypatch).whole
    x, grad = batch(20)
    weights = bundle.initial_weights()
    assert_gradients(backend.backward(x, grad), expected_gradients(weights, x, grad))
    assert sum(sizes) == 20
    assert max(sizes) <= samples_that_fit


@pytest.mark.parametrize(
    ("samples_of_a_pass", "expected"),
    [
        (40, [33, 33, 34]),
        (1, [25, 25, 25, 25]),  # four times the parameters' size: 28 samples
    ],
)
def test_passes_stay_small_even_where_memory_allows_more(
    bundle: Bundle,
    samples_of_a_pass: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_sample = bundle.manifest.onnx_backward_bytes_per_sample
    assert per_sample == 20
    monkeypatch.setattr(segment_module, "_ONNX_PASS_BYTES", samples_of_a_pass * per_sample)
    backend = loaded(bundle, max_batch_bytes=1 << 30)
    sizes = watch_passes(backend, monkeypatch).whole
    backend.backward(*batch(100))
    assert sizes == expected


def test_bundle_that_does_not_say_what_its_backward_graph_takes_is_cut_by_torch_s_estimate(
    bundle: Bundle,
) -> None:
    manifest = msgspec.structs.replace(bundle.manifest, onnx_backward_bytes_per_sample=0)
    old = dataclasses.replace(bundle, manifest=manifest)
    backend = loaded(old, max_batch_bytes=9 * manifest.backward_bytes_per_sample)
    assert backend.backward_pass_samples == 9


@dataclass
class Passes:
    """Samples of each backward pass, by whether it found what its forward pass had kept."""

    kept: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)


def watch_passes(backend: ComputeBackend, monkeypatch: pytest.MonkeyPatch) -> Passes:
    engine = backend._onnx_trainer  # type: ignore[attr-defined]
    passes, original = Passes(), engine.backward

    def watched(x: Float32, grad: Float32, kept: object = None) -> dict[str, Float32]:
        (passes.whole if kept is None else passes.kept).append(len(x))
        result: dict[str, Float32] = original(x, grad, kept)
        return result

    monkeypatch.setattr(engine, "backward", watched)
    return passes


def test_backward_pass_takes_what_the_forward_pass_of_its_token_kept(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = loaded(exported)
    passes = watch_passes(backend, monkeypatch)
    x, grad = batch(7)
    expected = expected_gradients(exported.initial_weights(), x, grad)
    activations = backend.forward(x, token=1)
    assert np.allclose(activations, backend.forward(x), atol=1e-6)
    backend.forward(x, token=1)
    assert_gradients(backend.backward(x, grad, token=1), expected)
    assert passes == Passes(kept=[7])
    assert_gradients(backend.backward(x, grad, token=1), expected)  # asked again
    assert passes == Passes(kept=[7], whole=[7])


def test_what_was_kept_is_not_taken_for_another_token_or_other_weights(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = loaded(exported)
    passes = watch_passes(backend, monkeypatch)
    x, grad = batch(7)
    weights = dict(exported.initial_weights())
    backend.forward(x + 1, token=1)
    assert_gradients(backend.backward(x, grad, token=2), expected_gradients(weights, x, grad))
    weights = {name: -array for name, array in weights.items()}
    backend.forward(x, token=1)
    backend.set_weights(weights)
    assert_gradients(backend.backward(x, grad, token=1), expected_gradients(weights, x, grad))
    assert passes.kept == []


@pytest.mark.parametrize(("samples_that_are_kept", "kept"), [(4, [4]), (11, [4, 4]), (2, [])])
def test_as_much_is_kept_as_the_limit_leaves_and_the_rest_is_computed_again(
    exported: Bundle, samples_that_are_kept: int, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = exported.manifest
    assert manifest.onnx_kept_bytes_per_sample == 4 * HIDDEN
    per_pass = 4 * manifest.onnx_backward_bytes_per_sample
    monkeypatch.setattr(SegmentBackend, "_onnx_pass_bytes", per_pass)
    limit_bytes = per_pass + samples_that_are_kept * manifest.onnx_kept_bytes_per_sample
    backend = loaded(exported, max_batch_bytes=limit_bytes)
    passes = watch_passes(backend, monkeypatch)
    x, grad = batch(16)
    backend.forward(x, token=1)
    expected = expected_gradients(exported.initial_weights(), x, grad)
    assert_gradients(backend.backward(x, grad, token=1), expected)
    assert passes.kept == kept
    assert sum(passes.kept + passes.whole) == 16


def test_without_a_limit_of_its_own_what_is_kept_is_limited(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_sample = exported.manifest.onnx_kept_bytes_per_sample
    monkeypatch.setattr(segment_module, "_ONNX_KEPT_BYTES", 9 * per_sample)
    backend = loaded(exported)
    passes = watch_passes(backend, monkeypatch)
    for count in (9, 10):
        x, grad = batch(count)
        backend.forward(x, token=count)
        backend.backward(x, grad, token=count)
    assert passes == Passes(kept=[9], whole=[10])


def test_bundle_from_before_there_were_halves_computes_the_forward_pass_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = loaded(bundle)
    passes = watch_passes(backend, monkeypatch)
    x, grad = batch(5)
    backend.forward(x, token=1)
    expected = expected_gradients(bundle.initial_weights(), x, grad)
    assert_gradients(backend.backward(x, grad, token=1), expected)
    assert passes == Passes(whole=[5])


@pytest.mark.parametrize(
    ("file", "graph", "words"),
    [
        ("client_forward_kept", b"no graph", r"client_forward_kept\.onnx: "),
        ("client_forward_kept", linear_backward(), "expected an output 'activations'"),
        ("client_backward_kept", linear_backward(extra_input="seed"), "input 'seed': expected x"),
        ("client_backward_kept", linear_backward(weight_out="dW"), rf"output 'grad\.{WEIGHT}'"),
    ],
)
def test_damaged_half_is_refused_by_name(
    exported: Bundle, file: str, graph: bytes, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        loaded(with_files(exported, **{file: graph}))


def test_empty_batch_has_zero_gradients(bundle: Bundle) -> None:
    backend = loaded(bundle)
    gradients = backend.backward(*batch(0))
    assert {name: g.shape for name, g in gradients.items()} == {
        WEIGHT: (HIDDEN, FEATURES),
        BIAS: (HIDDEN,),
    }
    assert not any(gradient.any() for gradient in gradients.values())


def test_bundle_without_a_backward_graph_is_refused_with_what_to_do(
    exported: Bundle, bundle: Bundle
) -> None:
    backend = loaded(bundle)
    x, grad = batch(2)
    before = backend.backward(x, grad)
    with pytest.raises(ModelError, match=r"client_backward\.onnx: expected this file .*export"):
        backend.load(with_backward(exported, None))
    assert_gradients(backend.backward(x, grad), before)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (b"no graph", r"client_backward\.onnx: "),
        (linear_backward(weight_out="dW"), rf"output 'grad\.{WEIGHT}' of shape .*found none"),
        (linear_backward(extra_input="seed"), "input 'seed': expected x, grad_out, parameters"),
        (linear_backward(hidden=4), rf"grad\.{WEIGHT}' of shape \(5, 6\), found \(4, 6\)"),
    ],
)
def test_damaged_backward_graph_is_refused_by_name(
    exported: Bundle, graph: bytes, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        loaded(with_backward(exported, graph))


def test_graph_that_fails_while_it_runs_costs_that_message_only(bundle: Bundle) -> None:
    backend = loaded(bundle)
    engine = backend._onnx_trainer  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"client_backward\.onnx: .*grad_out"):
        engine.backward(batch(2)[0], np.zeros((2, HIDDEN + 1), np.float32))
    x, grad = batch(2)
    weights = bundle.initial_weights()
    assert_gradients(backend.backward(x, grad), expected_gradients(weights, x, grad))


def test_frozen_bundle_needs_no_backward_graph(tmp_path: Path) -> None:
    network = build_network("mlp", input_shape=(FEATURES,), classes=CLASSES, seed=0)
    split = split_network(network, "block1", (FEATURES,))
    data = export_bundle(split, name="mlp", version="1", classes=CLASSES, frozen=True)
    backend = loaded(with_backward(Bundle.from_bytes(data), None))
    assert backend.forward(batch(2)[0]).shape[0] == 2


def without(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    monkeypatch.setattr(
        "edge_agent.compute.find_spec", lambda name: None if name in libraries else object()
    )


def test_auto_takes_torch_where_it_is_installed_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch)
    assert choose_backward("auto").name == "torch"
    assert choose_backward("auto").why == "PyTorch is installed"
    assert build_backend().backward_name == "torch"
    without(monkeypatch, "torch")
    assert choose_backward("auto").name == "onnxruntime"
    assert choose_backward("auto").why == "PyTorch is not installed"
    backend = build_backend()
    assert (backend.forward_name, backend.backward_name) == ("onnxruntime", "onnxruntime")
    assert backend.can_backward


def test_set_backend_is_taken_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    for name in ("torch", "onnxruntime", "none"):
        choice = choose_backward(name)  # type: ignore[arg-type]
        assert (choice.name, choice.why) == (name, f"backward is set to {name}")
    without(monkeypatch, "torch", "onnxruntime")
    assert choose_backward("auto").name == "none"


def test_missing_onnxruntime_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "onnxruntime")
    with pytest.raises(ConfigError, match=r"backward: onnxruntime: .*pip install 'splitfleet\[ag"):
        build_backend(forward="torch", backward="onnxruntime")


RUN_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import edge_agent.compute as compute
compute.find_spec = lambda name: None if name == "torch" else object()
import numpy as np
from wire.bundle import Bundle

backend = compute.build_backend()
backend.load(Bundle.from_bytes(open(sys.argv[1], "rb").read()))
x = np.ones((4, 6), np.float32)
backend.forward(x, token=1)
gradients = backend.backward(x, np.ones((4, 5), np.float32), token=1)
assert any(gradient.any() for gradient in gradients.values())
assert not [name for name in sys.modules if name.startswith("torch.")]
print("trained on", backend.backward_name)
"""


def test_segment_trains_in_a_process_without_torch(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(build_bundle(bundle.manifest, bundle.files))
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("trained on onnxruntime\n", "")


def test_backend_without_the_shared_arena_computes_the_same(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of ONNX Runtime that cannot share one: each session then has its own."""
    x, grad = batch(5)
    expected = loaded(bundle).backward(x, grad)
    monkeypatch.setattr("edge_agent.compute.onnx_session._share_arena", lambda: False)
    assert_gradients(loaded(bundle).backward(x, grad), expected)


def test_backend_is_what_the_agent_asks_for(bundle: Bundle) -> None:
    backend = loaded(bundle)
    assert isinstance(backend, SegmentBackend)
    assert (backend.forward_name, backend.backward_name) == ("onnxruntime", "onnxruntime")
