"""Compute backends: gradients of the undivided network, within memory, without torch where not
needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edge_agent.compute import ComputeBackend, build_backend
from edge_agent.compute import segment as segment_module
from models.export import export_bundle
from models.registry import build_network
from models.split import SplitNetwork, split_network
from wire.bundle import CLIENT_FORWARD, CLIENT_TORCH, Bundle, build_bundle
from wire.errors import ConfigError, LocalProtocolError, ModelError

SHAPE = (1, 12, 12)
CLASSES = 4
FORWARDS = ("onnxruntime", "torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_network("cnn2d", input_shape=SHAPE, classes=CLASSES, seed=1)


@pytest.fixture(scope="module")
def split(network: nn.Module) -> SplitNetwork:
    return split_network(network, "block2", SHAPE)


@pytest.fixture(scope="module")
def bundle(split: SplitNetwork) -> Bundle:
    return Bundle.from_bytes(export_bundle(split, name="cnn", version="1", classes=CLASSES))


@pytest.fixture(scope="module")
def frozen_data() -> bytes:
    network = build_network("mlp", input_shape=(6,), classes=3, arguments={"hidden": [5]}, seed=0)
    split = split_network(network, "block1", (6,))
    return export_bundle(split, name="mlp", version="1", classes=3, frozen=True)


def loaded(bundle: Bundle, **options: Any) -> ComputeBackend:
    backend = build_backend(**options)
    backend.load(bundle)
    return backend


def samples(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def cut_gradients(bundle: Bundle, count: int, seed: int = 1) -> NDArray[np.float32]:
    shape = (count, *bundle.manifest.activation.shape)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("forward", FORWARDS)
def test_step_over_the_cut_has_the_gradients_of_the_undivided_network(
    network: nn.Module, split: SplitNetwork, bundle: Bundle, forward: str
) -> None:
    x = samples(9)
    labels = torch.arange(9) % CLASSES
    network.zero_grad()
    nn.functional.cross_entropy(network(torch.from_numpy(x)), labels).backward()
    backend = loaded(bundle, forward=forward)
    activations = torch.from_numpy(np.array(backend.forward(x, token=1))).requires_grad_()
    nn.functional.cross_entropy(split.server(activations), labels).backward()
    assert activations.grad is not None
    gradients = backend.backward(x, activations.grad.numpy(), token=1)
    expected = {name: network.get_parameter(name).grad for name in gradients}
    assert list(gradients) == [spec.name for spec in bundle.manifest.parameters]
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(gradient), expected[name], rtol=1e-4, atol=1e-6)


def test_torch_forward_equals_the_eager_segment_to_the_bit(
    split: SplitNetwork, bundle: Bundle
) -> None:
    backend = loaded(bundle, forward="torch")
    for count in (1, 2, 16):
        x = samples(count)
        expected = split.client(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_array_equal(backend.forward(x), expected)
        np.testing.assert_array_equal(backend.forward(x, token=count), expected)


def test_kept_graph_gives_what_a_recomputed_one_gives(bundle: Bundle) -> None:
    backend = loaded(bundle, forward="torch")
    x, grad = samples(6), cut_gradients(bundle, 6)
    backend.forward(x, token=(0, 1))
    kept = backend.backward(x, grad, token=(0, 1))
    again = backend.backward(x, grad, token=(0, 1))
    for name in kept:
        np.testing.assert_array_equal(kept[name], again[name])


def count_recomputations(backend: ComputeBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the batch size of each forward pass that a backward pass repeats."""
    calls: list[int] = []
    engine = backend._torch  # type: ignore[attr-defined]
    original = engine.backward

    def counted(
        x: NDArray[Any], grad: NDArray[Any], kept: object = None
    ) -> dict[str, NDArray[Any]]:
        if kept is None:
            calls.append(len(x))
        result: dict[str, NDArray[Any]] = original(x, grad, kept)
        return result

    monkeypatch.setattr(engine, "backward", counted)
    return calls


def test_graph_is_reused_once_and_only_for_its_own_token(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = loaded(bundle, forward="torch")
    calls = count_recomputations(backend, monkeypatch)
    x, grad = samples(3), cut_gradients(bundle, 3)
    backend.forward(x, token=1)
    backend.backward(x, grad, token=1)
    assert calls == []
    backend.backward(x, grad, token=1)
    assert calls == [3]
    backend.forward(x, token=2)
    backend.backward(x, grad, token=3)
    assert calls == [3, 3]
    backend.forward(x)
    backend.backward(x, grad)
    assert calls == [3, 3, 3]


def test_new_weights_make_a_kept_graph_void(bundle: Bundle) -> None:
    x, grad = samples(4), cut_gradients(bundle, 4)
    weights = {name: array * 0.5 for name, array in bundle.initial_weights().items()}
    backend, fresh = loaded(bundle, forward="torch"), loaded(bundle, forward="torch")
    backend.forward(x, token=1)
    backend.set_weights(weights)
    fresh.set_weights(weights)
    after, expected = backend.backward(x, grad, token=1), fresh.backward(x, grad)
    for name in expected:
        np.testing.assert_array_equal(after[name], expected[name])


@pytest.mark.parametrize("forward", FORWARDS)
def test_weights_that_are_set_are_the_ones_used(
    split: SplitNetwork, bundle: Bundle, forward: str
) -> None:
    weights = {name: array * 1.5 + 0.1 for name, array in bundle.initial_weights().items()}
    backend = loaded(bundle, forward=forward)
    backend.set_weights(weights)
    x = samples(3)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    expected = torch.func.functional_call(split.client, tensors, (torch.from_numpy(x),))
    np.testing.assert_allclose(backend.forward(x), expected.detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("samples_that_fit", [0, 1, 3, 7, 50])
def test_micro_batches_give_what_the_whole_batch_gives(
    bundle: Bundle, forward: str, samples_that_fit: int
) -> None:
    limit = max(1, samples_that_fit * bundle.manifest.backward_bytes_per_sample)
    whole = loaded(bundle, forward=forward)
    parts = loaded(bundle, forward=forward, max_batch_bytes=limit)
    x, grad = samples(20), cut_gradients(bundle, 20)
    np.testing.assert_allclose(
        parts.forward(x, token=1), whole.forward(x, token=1), rtol=1e-5, atol=1e-6
    )
    expected = whole.backward(x, grad, token=1)
    for name, gradient in parts.backward(x, grad, token=1).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_micro_batches_are_as_large_as_memory_allows_and_even(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 6 * bundle.manifest.backward_bytes_per_sample
    backend = loaded(bundle, forward="torch", max_batch_bytes=limit)
    calls = count_recomputations(backend, monkeypatch)
    x, grad = samples(20), cut_gradients(bundle, 20)
    backend.forward(x, token=1)
    backend.backward(x, grad, token=1)
    assert calls == [5, 5, 5, 5]
    backend.forward(x[:6], token=2)
    backend.backward(x[:6], grad[:6], token=2)
    assert calls == [5, 5, 5, 5]


@pytest.mark.parametrize("forward", FORWARDS)
def test_empty_batch_has_no_activations_and_zero_gradients(bundle: Bundle, forward: str) -> None:
    backend = loaded(bundle, forward=forward)
    x = samples(0)
    assert backend.forward(x, token=1).shape == (0, *bundle.manifest.activation.shape)
    gradients = backend.backward(x, cut_gradients(bundle, 0), token=1)
    shapes = {spec.name: spec.shape for spec in bundle.manifest.parameters}
    assert {name: gradient.shape for name, gradient in gradients.items()} == shapes
    assert not any(gradient.any() for gradient in gradients.values())


def test_read_only_and_strided_input_is_taken(bundle: Bundle) -> None:
    backend = loaded(bundle, forward="torch")
    x, grad = samples(8), cut_gradients(bundle, 8)
    expected = backend.backward(x[::2].copy(), grad[::2].copy())
    x.flags.writeable = False
    grad.flags.writeable = False
    for name, gradient in backend.backward(x[::2], grad[::2]).items():
        np.testing.assert_array_equal(gradient, expected[name])
    whole = backend.backward(x, grad)
    assert whole.keys() == expected.keys()


def test_wrong_shapes_are_refused_with_both_shapes(bundle: Bundle) -> None:
    backend = loaded(bundle)
    good = samples(2)
    with pytest.raises(ModelError, match=r"expected samples of shape .*12, 12.*received \(2, 9\)"):
        backend.forward(np.zeros((2, 9), np.float32))
    with pytest.raises(ModelError, match="expected cut gradients of shape"):
        backend.backward(good, np.zeros((2, 3), np.float32))
    with pytest.raises(ModelError, match="expected 2 cut gradients, received 3"):
        backend.backward(good, cut_gradients(bundle, 3))


def test_wrong_weights_are_refused_by_name_and_change_nothing(bundle: Bundle) -> None:
    backend = loaded(bundle)
    x = samples(2)
    before = backend.forward(x).copy()
    weights = {name: array * 2 for name, array in bundle.initial_weights().items()}
    first = next(iter(weights))
    with pytest.raises(ModelError, match=f"expected a tensor '{first}'"):
        backend.set_weights({k: v for k, v in weights.items() if k != first})
    with pytest.raises(ModelError, match="the segment has no tensor 'more'"):
        backend.set_weights({**weights, "more": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match=f"{first}: expected shape"):
        backend.set_weights({**weights, first: np.zeros(1, np.float32)})
    np.testing.assert_array_equal(backend.forward(x), before)


def test_backend_without_a_bundle_or_backward_pass_says_so(bundle: Bundle) -> None:
    empty = build_backend()
    with pytest.raises(LocalProtocolError, match="before a bundle was loaded"):
        empty.forward(samples(1))
    forward_only = loaded(bundle, backward="none")
    assert (forward_only.can_backward, forward_only.backward_name) == (False, "none")
    with pytest.raises(LocalProtocolError, match="backward pass"):
        forward_only.backward(samples(1), cut_gradients(bundle, 1))


def test_damaged_graphs_are_refused_by_file(bundle: Bundle) -> None:
    def with_file(name: str, data: bytes) -> Bundle:
        return Bundle.from_bytes(build_bundle(bundle.manifest, {**bundle.files, name: data}))

    with pytest.raises(ModelError, match=r"client_forward\.onnx"):
        loaded(with_file(CLIENT_FORWARD, b"no graph"), backward="none")
    graph = bundle.files[CLIENT_TORCH]
    missing = graph.replace(b"aten.relu.default", b"aten.relu.nothing")
    with pytest.raises(ModelError, match=r"has no aten\.relu\.nothing"):
        loaded(with_file(CLIENT_TORCH, missing))
    writing = graph.replace(b"aten.relu.default", b"aten.relu.out")
    with pytest.raises(ModelError, match=r"aten\.relu\.out writes to its arguments"):
        loaded(with_file(CLIENT_TORCH, writing))


def test_a_refused_bundle_leaves_the_loaded_one_in_use(bundle: Bundle) -> None:
    backend = loaded(bundle, forward="onnxruntime")
    x = samples(2)
    before = backend.forward(x).copy()
    files = {**bundle.files, CLIENT_FORWARD: b"no graph"}
    with pytest.raises(ModelError):
        backend.load(Bundle.from_bytes(build_bundle(bundle.manifest, files)))
    np.testing.assert_array_equal(backend.forward(x), before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"forward": "tensorflow"}, "forward: expected one of auto, onnxruntime, torch"),
        ({"backward": "onnx"}, "backward: expected one of auto, torch, onnxruntime, none"),
        ({"threads": 0}, "threads: expected a whole number above 0"),
        ({"max_batch_bytes": 0}, "max_batch_bytes: expected at least 1 byte"),
    ],
)
def test_bad_setting_is_refused_by_name(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_backend(**options)
    assert expected in str(caught.value)


def hide(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Make this process look as if ``library`` were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "edge_agent.compute.find_spec", lambda name: None if name == library else found(name)
    )
    monkeypatch.setitem(sys.modules, library, None)


def test_missing_library_is_named_with_what_to_install(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = build_backend(forward="onnxruntime", backward="torch")
    hide(monkeypatch, "torch")
    with pytest.raises(ConfigError, match=r"backward: torch: .*pip install 'splitfleet\[agent-to"):
        build_backend(backward="torch")
    with pytest.raises(ConfigError, match=r"pip install 'splitfleet\[agent-torch\]'"):
        early.load(bundle)
    hide(monkeypatch, "onnxruntime")
    with pytest.raises(
        ConfigError, match=r"forward: onnxruntime: .*pip install 'splitfleet\[agent"
    ):
        build_backend()


RUN_FROZEN = """
import sys
import numpy as np
from edge_agent.compute import build_backend
from wire.bundle import Bundle

backend = build_backend(forward="onnxruntime", backward="auto")
assert backend.can_backward
bundle = Bundle.from_bytes(open(sys.argv[1], "rb").read())
assert bundle.manifest.frozen
backend.load(bundle)
backend.set_weights(bundle.initial_weights())
assert backend.forward(np.ones((3, 6), np.float32)).shape == (3, 5)
assert "torch" not in sys.modules, "torch was imported"
print("ran without torch")
"""


def test_frozen_segment_on_onnxruntime_never_imports_torch(
    frozen_data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(frozen_data)
    command = [sys.executable, "-c", RUN_FROZEN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("ran without torch\n", "")


def test_frozen_segment_has_no_backward_pass(frozen_data: bytes) -> None:
    backend = loaded(Bundle.from_bytes(frozen_data))
    with pytest.raises(LocalProtocolError):
        backend.backward(np.ones((1, 6), np.float32), np.ones((1, 5), np.float32))


def test_sessions_are_not_created_again_for_new_weights(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    original = segment_module.OnnxForward

    def counted(*args: Any, **kwargs: Any) -> Any:
        opened.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(segment_module, "OnnxForward", counted)
    backend = loaded(bundle, forward="onnxruntime")
    for step in range(3):
        backend.set_weights(bundle.initial_weights())
        backend.forward(samples(2), token=step)
    assert opened == [1]


def test_auto_runs_a_segment_forward_on_what_trains_it(bundle: Bundle, frozen_data: bytes) -> None:
    """Torch keeps its graph for the backward pass; a frozen segment has none to keep it for."""
    trained, frozen = loaded(bundle), loaded(Bundle.from_bytes(frozen_data))
    alone = loaded(Bundle.from_bytes(frozen_data), backward="none")
    assert (trained.forward_name, frozen.forward_name) == ("torch", "onnxruntime")
    assert alone.forward_name == "onnxruntime"
