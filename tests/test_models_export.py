"""Export: what a device gets computes what the network does, or is refused by layer name."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_agent.compute import build_backend
from models.export import export_bundle
from models.registry import build_network
from models.split import SplitNetwork, split_network
from models.verify import verify_bundle
from tests import user_networks as user
from wire.bundle import CLIENT_FORWARD, CLIENT_TORCH, WEIGHTS, Bundle, build_bundle
from wire.errors import ModelError

# At least one cut of each network inside and outside of its first block; ResNet once, it is slow.
CASES: list[tuple[str, tuple[int, ...], str, dict[str, Any]]] = [
    ("mlp", (8, 8), "block1", {}),
    ("cnn2d", (1, 12, 12), "hidden", {}),
    ("cnn1d", (3, 32), "block2", {}),
    ("resnet18", (3, 16, 16), "layer2.0", {"width": 16}),
]


def export(split: SplitNetwork, classes: int = 3, **options: Any) -> Bundle:
    data = export_bundle(split, name="test", version="1", classes=classes, **options)
    return Bundle.from_bytes(data)


@pytest.fixture(scope="module")
def mlp_bundle() -> Bundle:
    """Linear 4 to 8 and ReLU."""
    network = build_network("mlp", input_shape=(4,), classes=3, arguments={"hidden": [8]}, seed=0)
    return export(split_network(network, "block1", (4,)))


@pytest.fixture(scope="module")
def cnn_bundle() -> Bundle:
    """The first block of the 2-D CNN on 8x8 images."""
    network = build_network("cnn2d", input_shape=(1, 8, 8), classes=3, seed=0)
    return export(split_network(network, "block1", (1, 8, 8)))


@pytest.mark.parametrize(("name", "shape", "cut", "arguments"), CASES)
def test_exported_segment_agrees_with_the_network(
    name: str, shape: tuple[int, ...], cut: str, arguments: dict[str, Any]
) -> None:
    network = build_network(name, input_shape=shape, classes=3, arguments=arguments, seed=0)
    split = split_network(network, cut, shape, network=name)
    bundle = export(split)
    manifest = bundle.manifest
    assert (manifest.network, manifest.cut_layer) == (name, cut)
    assert manifest.activation.shape == split.activation_shape
    weights = dict(split.client.named_parameters())
    assert [spec.name for spec in manifest.parameters] == list(weights)
    for array_name, array in bundle.initial_weights().items():
        np.testing.assert_array_equal(array, weights[array_name].detach().numpy())
    assert manifest.backward_bytes_per_sample >= manifest.forward_bytes_per_sample > 0
    x = torch.randn(7, *shape)
    expected = split.client(x).detach().numpy()
    for forward, tolerance in (("onnxruntime", 1e-4), ("torch", 1e-6)):
        backend = build_backend(forward=forward, backward="none")  # type: ignore[arg-type]
        backend.load(bundle)
        np.testing.assert_allclose(
            backend.forward(x.numpy()), expected, rtol=tolerance, atol=tolerance
        )


def test_manifest_records_what_was_checked(mlp_bundle: Bundle) -> None:
    checks = mlp_bundle.manifest.checks
    done = {(check.what, check.batch) for check in checks}
    assert done == {
        (what, batch)
        for kind in ("onnx-{}", "onnx-{}-kept", "torch-{}")
        for what in (kind.format("forward"), kind.format("backward"))
        for batch in (1, 3, 5)
    }
    assert all(check.difference <= check.tolerance for check in checks)
    assert all(check.difference == 0.0 for check in checks if check.what == "torch-forward")


def test_onnx_graph_is_plain_and_takes_weights_as_inputs(cnn_bundle: Bundle) -> None:
    model = onnx.load_from_string(cnn_bundle.files[CLIENT_FORWARD])
    names = [spec.name for spec in cnn_bundle.manifest.parameters]
    assert [entry.name for entry in model.graph.input] == [*names, "x"]
    assert [entry.name for entry in model.graph.output] == ["activations"]
    assert [entry.version for entry in model.opset_import] == [cnn_bundle.manifest.opset]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    batch = model.graph.input[-1].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


def test_bundle_says_nothing_about_the_machine_that_made_it() -> None:
    split = split_network(user.Residual(5, 8, 3), "body", (5,))
    data = export_bundle(split, name="test", version="1", classes=3)
    for trace in (b"site-packages", b".py", b"File ", str(sys.prefix).encode()):
        assert trace not in data


def test_same_network_gives_the_same_bundle() -> None:
    def build() -> bytes:
        network = build_network("mlp", input_shape=(4,), classes=3, seed=0)
        split = split_network(network, "block1", (4,))
        return export_bundle(split, name="test", version="1", classes=3, created="2025-01-01")

    assert build() == build()


def test_users_network_travels_with_its_literal_tensor_and_optional_argument() -> None:
    network = build_network("tests.user_networks:residual", input_shape=(5,), classes=3, seed=0)
    split = split_network(network, "body", (5,))
    bundle = export(split)
    assert [spec.name for spec in bundle.manifest.buffers] == ["body.lifted_tensor_0"]
    backend = build_backend(forward="torch", backward="none")
    backend.load(bundle)
    x = torch.randn(1, 5)
    assert np.array_equal(backend.forward(x.numpy()), split.client(x).detach().numpy())


def test_batch_norm_is_refused_by_layer_unless_frozen() -> None:
    split = split_network(user.batch_norm_network(), "0", (3, 8, 8))
    with pytest.raises(ModelError, match=r"layer 0\.1: BatchNorm2d .* use GroupNorm or LayerNorm"):
        export(split)
    bundle = export(split, frozen=True)
    assert [spec.name for spec in bundle.manifest.buffers] == [
        "0.1.running_mean",
        "0.1.running_var",
    ]
    backend = build_backend(backward="none")
    backend.load(bundle)
    x = torch.randn(4, 3, 8, 8)
    expected = split.client(x).detach().numpy()
    np.testing.assert_allclose(backend.forward(x.numpy()), expected, rtol=1e-4, atol=1e-5)


class FunctionalBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(self.linear(x), self.mean, self.var)  # type: ignore[arg-type]


def test_batch_norm_as_a_function_is_refused_too() -> None:
    split = split_network(user.TwoLayers(FunctionalBatchNorm(), 6), "body", (6,))
    with pytest.raises(ModelError, match=r"cut layer body: .*: batch_norm .* use GroupNorm"):
        export(split)


class UnusualOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(torch.tanh(self.linear(x)) / 2)


def test_operator_that_devices_may_not_call_is_refused_by_layer() -> None:
    split = split_network(user.TwoLayers(UnusualOperator(), 6), "body", (6,))
    with pytest.raises(ModelError, match=r"layer .*devices cannot run its operator aten\.erfinv"):
        export(split)


def test_control_flow_on_data_in_the_client_is_refused_quietly(
    capfd: pytest.CaptureFixture[str],
) -> None:
    split = split_network(user.TwoLayers(user.LooksAtData(), 6), "body", (6,))
    with pytest.raises(ModelError, match="cut layer body: the client segment cannot be exported"):
        export(split)
    assert capfd.readouterr() == ("", "")


def test_export_prints_nothing() -> None:
    code = (
        "from models.registry import build_network\n"
        "from models.split import split_network\n"
        "from models.export import export_bundle\n"
        "n = build_network('mlp', input_shape=(4,), classes=3, seed=0)\n"
        "export_bundle(split_network(n, 'block1', (4,)), name='a', version='1', classes=3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_network_with_other_outputs_than_classes_is_refused() -> None:
    split = split_network(user.SkipAcross(), "first", (6,))
    with pytest.raises(ModelError, match=r"expected logits of shape \(10,\) for 10 classes"):
        export(split, classes=10)


def test_segment_without_anything_to_train_must_be_frozen() -> None:
    split = split_network(user.SkipAcross(), "first", (6,))
    split.client.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of it trains: freeze it"):
        export(split)
    frozen = export(split, frozen=True).manifest
    assert [spec.name for spec in frozen.buffers] == ["first.weight", "first.bias"]


def test_dropout_is_noted_in_the_manifest() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 3))
    manifest = export(split_network(network, "2", (6,))).manifest
    assert manifest.notes == ("dropout layer 1 is off in the client segment",)


@pytest.mark.parametrize("file", [CLIENT_TORCH, WEIGHTS])
def test_verification_notices_a_form_that_differs(file: str) -> None:
    split = split_network(
        user.TwoLayers(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), 6), "body", (6,)
    )
    bundle = export(split)
    files = dict(bundle.files)
    if file == CLIENT_TORCH:
        files[file] = files[file].replace(b"aten.relu.default", b"aten.gelu.default")
    else:
        files[file] = files[file][:-1] + bytes([files[file][-1] ^ 0x40])
    assert files[file] != bundle.files[file]
    altered = Bundle.from_bytes(build_bundle(bundle.manifest, files))
    with torch.no_grad(), pytest.raises(ModelError, match="differs from the network by"):
        verify_bundle(split, altered)


def test_memory_estimate_follows_the_shapes(mlp_bundle: Bundle) -> None:
    manifest = mlp_bundle.manifest
    # The segment makes two values of 8 floats, both alive at once, and works in two more.
    assert manifest.forward_bytes_per_sample == 4 * (8 + 8 + 2 * 8)
    assert manifest.backward_bytes_per_sample == 4 * (8 + 8 + 2 * 8)


def test_torch_form_is_json_that_names_layers(cnn_bundle: Bundle) -> None:
    graph = json.loads(cnn_bundle.files[CLIENT_TORCH])
    assert [node["layer"] for node in graph["nodes"]] == [
        "block1.conv",
        "block1.norm",
        "block1.pool",  # before ReLU, which gives the same sooner: models/reorder.py
        "block1.relu",
    ]


def operators_of(network: nn.Module, cut: str) -> list[str]:
    bundle = export(split_network(network, cut, (2, 8, 8)))
    nodes = json.loads(bundle.files[CLIENT_TORCH])["nodes"]
    return [node["op"].split(".")[1] for node in nodes]


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, 3)]


def test_relu_comes_behind_the_pool_that_takes_it_alone() -> None:
    pooled = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers = [*pooled, nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    assert operators_of(nn.Sequential(*layers, *head(16)), "5") == [
        *("conv2d", "max_pool2d", "relu"),
        *("conv2d", "max_pool2d", "relu"),
    ]


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Tanh()])
def test_other_activations_stay_before_the_pool(layer: nn.Module) -> None:
    layers = [nn.Conv2d(2, 4, 3, padding=1), layer, nn.MaxPool2d(2)]
    assert operators_of(nn.Sequential(*layers, *head(64)), "2")[-1] == "max_pool2d"


def test_relu_stays_where_its_values_are_taken_elsewhere_too() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.conv(x))
            return nn.functional.max_pool2d(h, 2) + nn.functional.avg_pool2d(h, 2)

    operators = operators_of(nn.Sequential(Cut(), *head(64)), "0")
    assert operators.index("relu") < operators.index("max_pool2d")
