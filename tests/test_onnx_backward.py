"""The backward graph: autograd's gradients for every layer of the set, refusal of all others."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

from edge_agent.compute import build_backend
from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from models.verify import verify_bundle
from tests import user_networks as user
from tests.segments import Concatenation, Residual, assert_same_gradients, derive, split_body
from wire.bundle import CLIENT_BACKWARD, Bundle, build_bundle
from wire.errors import ModelError

IMAGE, SIGNAL = (4, 11, 9), (4, 13)


def frozen_batch_norm(channels: int, *, affine: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(channels, affine=affine).eval()
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return norm


class Beside(nn.Module):
    """Layers side by side, each with weights on both sides, so that gradients pass through it."""

    def __init__(self, layers: dict[str, nn.Module], conv: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, layer in layers.items():
            # The input of a convolution is as large for all of them.
            self.layers[name] = nn.Sequential(conv(4, 4, 3), layer, nn.Flatten())
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.tensor(1.5)))

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x) * getattr(self, f"{name}_scale") for name, layer in self.layers.items()]
        return torch.cat(parts, dim=1)


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), layer, nn.Conv2d(4, 5, 1))


CONVOLUTIONS: dict[str, nn.Module] = {
    "stride": nn.Conv2d(4, 6, 3, stride=2),
    "uneven": nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "dilation": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "wide_padding": nn.Conv2d(4, 6, 1, padding=2),
    "left_over_rows": nn.Conv2d(4, 6, 2, stride=3, bias=False),
    "same": nn.Conv2d(4, 6, (4, 3), padding="same"),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "strided_groups": nn.Conv2d(4, 8, 3, groups=2, stride=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "depthwise_two_each": nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1),
    "pointwise": nn.Conv2d(4, 6, 1),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed_strided": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed_groups": nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=2, bias=False),
}
NORMS: dict[str, nn.Module] = {
    "group": nn.GroupNorm(2, 4),
    "group_plain": nn.GroupNorm(4, 4, affine=False, eps=0.1),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "layer": nn.LayerNorm((9, 7)),
    "layer_plain": nn.LayerNorm(7, elementwise_affine=False),
    "batch_frozen": frozen_batch_norm(4),
    "batch_frozen_plain": frozen_batch_norm(4, affine=False),
}
ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "relu6": nn.ReLU6(),
    "dropout": nn.Dropout(0.5),
}
POOLS: dict[str, nn.Module] = {
    "max": nn.MaxPool2d(2),
    "max_ceil": nn.MaxPool2d(2, ceil_mode=True),
    "max_overlap": nn.MaxPool2d(3, stride=2, padding=1),
    "max_dilated": nn.MaxPool2d((2, 3), stride=1, dilation=2),
    "max_gaps": nn.MaxPool2d(2, stride=3),
    "average": nn.AvgPool2d(2),
    "average_ceil": nn.AvgPool2d(2, ceil_mode=True),
    "average_overlap": nn.AvgPool2d(3, stride=2, padding=1),
    "average_own_count": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average_ceil_and_own_count": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average_divisor": nn.AvgPool2d((3, 2), stride=1, divisor_override=5),
    "adaptive": nn.AdaptiveAvgPool2d(1),
}
LAYERS_1D: dict[str, nn.Module] = {
    "stride": nn.Conv1d(4, 4, 3, stride=2, padding=1, dilation=2),
    "same": nn.Conv1d(4, 4, 4, padding="same"),
    "depthwise": nn.Conv1d(4, 4, 5, groups=4, padding=2),
    "group": nn.GroupNorm(2, 4),
    "max": nn.MaxPool1d(2),
    "max_overlap": nn.MaxPool1d(3, stride=2, padding=1, ceil_mode=True),
    "average": nn.AvgPool1d(2),
    "average_overlap": nn.AvgPool1d(4, stride=3, padding=2, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool1d(1),
}


@pytest.mark.parametrize("layers", [CONVOLUTIONS, NORMS, ACTIVATIONS, POOLS])
def test_layers_have_the_gradients_of_autograd(layers: dict[str, nn.Module]) -> None:
    assert_same_gradients(split_body(Beside(layers, nn.Conv2d), IMAGE))


TALL: dict[str, nn.Module] = {  # little padding for their rows: the gradient is moved over them
    "three": nn.Conv2d(4, 4, 3, padding=1),
    "uneven": nn.Conv2d(4, 5, (2, 3), padding=(1, 0), stride=(1, 2), bias=False),
    "dilation": nn.Conv2d(4, 3, (3, 2), padding=(2, 1), dilation=(2, 1)),
    "no_padding": nn.Conv2d(4, 12, (3, 4)),
}


def test_convolutions_over_tall_images_have_the_gradients_of_autograd() -> None:
    derived = assert_same_gradients(split_body(Beside(TALL, nn.Conv2d), (4, 40, 7)))
    graph = onnx.load_from_string(derived.graph).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    axes = [list(constants[node.input[3]]) for node in graph.node if node.op_type == "Pad"]
    assert axes.count([1]) == (3 + 2 + 3 + 3) + 4 * 3  # rows of kernels: of these, of those before


def test_layers_over_time_have_the_gradients_of_autograd() -> None:
    assert_same_gradients(split_body(Beside(LAYERS_1D, nn.Conv1d), SIGNAL))


def test_equal_values_in_a_window_leave_the_gradient_to_the_first() -> None:
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)]
    steps = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Hardtanh(-0.1, 0.1))
    for pool in pools:
        assert_same_gradients(split_body(nn.Sequential(steps, pool, nn.Conv2d(4, 3, 1)), IMAGE))


class Shapes(nn.Module):
    """Moves values about in the ways that modules in use do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.rand(4))
        self.held = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).reshape(x.shape[0], -1, 2, 4).transpose(1, 2)
        left, right = h.chunk(2, dim=3)
        h = torch.cat([left * 2, right - left / 3], dim=3)
        h = self.norm(h).permute(0, 3, 1, 2).flatten(1)
        h = nn.functional.pad(h, (1, 2))[:, 1:-2].unflatten(1, (-1, 4))
        return (h * self.scale * self.held.detach() + h.mean(dim=1, keepdim=True)).squeeze(1)


def test_values_moved_about_take_their_gradients_along() -> None:
    derived = assert_same_gradients(split_body(Shapes(), (5, 6)))
    x, grad = torch.randn(2, 5, 6), torch.randn(2, *derived.split.activation_shape)
    assert not derived.gradients(x, grad)["grad.body.held"].any()


def test_blocks_beside_and_round_each_other() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    body = nn.Sequential(
        Residual(block), Concatenation(nn.Conv2d(4, 3, 1), nn.MaxPool2d(3, 1, 1)), nn.GELU()
    )
    assert_same_gradients(split_body(body, IMAGE))


def test_parameters_that_do_not_train_have_no_gradient() -> None:
    body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    body[0].requires_grad_(False)
    derived = assert_same_gradients(split_body(body, (6,)))
    assert [entry.name for entry in derived.session.get_outputs()] == [
        "grad.body.2.weight",
        "grad.body.2.bias",
    ]


def test_shared_weights_get_the_sum_of_their_gradients() -> None:
    linear = nn.Linear(6, 6)
    assert_same_gradients(
        split_body(nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh(), linear), (6,))
    )


@pytest.mark.parametrize(
    ("name", "shape", "cut", "arguments"),
    [
        ("mlp", (8, 8), "block2", {}),
        ("cnn2d", (12, 12), "block1", {}),
        ("cnn2d", (12, 12), "hidden", {}),
        ("cnn1d", (3, 32), "hidden", {}),
        ("resnet18", (3, 16, 16), "layer2.0", {"width": 8}),
    ],
)
def test_built_in_networks_have_the_gradients_of_autograd(
    name: str, shape: tuple[int, ...], cut: str, arguments: dict[str, int]
) -> None:
    network = build_network(name, input_shape=shape, classes=3, arguments=arguments, seed=0)
    assert_same_gradients(split_network(network, cut, shape))


def test_graph_is_plain_small_and_takes_what_the_forward_graph_takes() -> None:
    network = build_network("cnn2d", input_shape=(1, 8, 8), classes=3, seed=0)
    derived = derive(split_network(network, "block2", (1, 8, 8)))
    model = onnx.load_from_string(derived.graph)
    names = list(derived.program.parameters)
    assert [entry.name for entry in model.graph.input] == [*names, "x", "grad_out"]
    assert [entry.name for entry in model.graph.output] == [f"grad.{name}" for name in names]
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.version for entry in model.opset_import] == [18]
    for entry in list(model.graph.input)[-2:]:
        assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len(derived.graph) < 20_000


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.PReLU(), r"layer body\.1: PReLU \(prelu\) .*use LeakyReLU"),
        (
            nn.Softmax(dim=1),
            r"layer body\.1: Softmax \(softmax\) .*use one of the layers that docs/networks",
        ),
        (nn.AdaptiveAvgPool2d(2), r"layer body\.1: AdaptiveAvgPool2d .*use AvgPool1d or AvgPo"),
        (
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            r"layer body\.1: Conv2d \(pad\) .*zeros",
        ),
    ],
)
def test_layer_without_a_backward_pass_is_refused_by_name(layer: nn.Module, expected: str) -> None:
    split = split_body(nn.Sequential(nn.Conv2d(4, 4, 3), layer), IMAGE)
    with pytest.raises(ModelError, match=expected) as caught:
        export_bundle(split, name="test", version="1", classes=3)
    assert "freeze the client segment, or choose backward torch" in str(caught.value)


def test_any_layer_may_be_frozen_or_left_to_devices_with_torch() -> None:
    split = split_body(nn.Sequential(nn.Linear(6, 6), nn.Softmax(dim=1)), (6,))
    for options in ({"frozen": True}, {"backward": "torch"}):
        data = export_bundle(split, name="test", version="1", classes=3, **options)  # type: ignore[arg-type]
        assert CLIENT_BACKWARD not in Bundle.from_bytes(data).files


def test_batch_norm_in_train_mode_is_refused_and_in_eval_mode_keeps_its_statistics() -> None:
    body = between(nn.Sequential(frozen_batch_norm(4), nn.ReLU()))
    bundle = Bundle.from_bytes(
        export_bundle(split_body(body, IMAGE), name="test", version="1", classes=3)
    )
    assert bundle.manifest.notes == ("BatchNorm2d layer body.1.0 keeps its statistics as they are",)
    body[1].train()  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"layer body\.1\.0: BatchNorm2d .*use GroupNorm .*eval"):
        export_bundle(split_body(body, IMAGE), name="test", version="1", classes=3)


def test_batch_norm_without_statistics_is_refused_in_eval_mode_too() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(ModelError, match=r"mixes the samples|layer body\.1: BatchNorm2d"):
        export_bundle(split_body(between(norm), IMAGE), name="test", version="1", classes=3)


def test_bundle_records_at_which_batches_and_on_what_samples_gradients_were_compared() -> None:
    split = split_body(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), (6,))
    samples = torch.rand(7, 6).numpy()
    data = export_bundle(
        split, name="test", version="1", classes=3, global_batch=16, samples=samples
    )
    checks = Bundle.from_bytes(data).manifest.checks
    compared = {(check.batch, check.data) for check in checks if check.what == "onnx-backward"}
    assert compared == {(batch, kind) for batch in (1, 3, 5, 16) for kind in ("random", "real")}
    assert all(check.difference <= check.tolerance for check in checks)


def test_global_batch_too_large_to_compare_is_cut_and_said_so() -> None:
    split = split_body(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), (6,))
    data = export_bundle(
        split, name="test", version="1", classes=3, global_batch=1000, check_bytes=2000
    )
    manifest = Bundle.from_bytes(data).manifest
    largest = max(check.batch for check in manifest.checks)
    assert 5 < largest < 1000
    assert f"compared at batches up to {largest}, not at the global batch 1000" in manifest.notes


def test_verification_notices_a_backward_graph_that_is_wrong() -> None:
    split = split_body(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), (6,))
    bundle = Bundle.from_bytes(export_bundle(split, name="test", version="1", classes=3))
    model = onnx.load_from_string(bundle.files[CLIENT_BACKWARD])
    (compared,) = (node for node in model.graph.node if node.op_type == "Greater")
    compared.op_type = "Less"
    files = {**bundle.files, CLIENT_BACKWARD: model.SerializeToString()}
    altered = Bundle.from_bytes(build_bundle(bundle.manifest, files))
    with torch.no_grad(), pytest.raises(ModelError, match="onnx-backward at batch 1 differs"):
        verify_bundle(split, altered)


def test_device_without_torch_gets_the_gradients_of_a_literal_tensor_in_the_way() -> None:
    network = build_network("tests.user_networks:residual", input_shape=(5,), classes=3, seed=0)
    split = split_network(network, "body", (5,))
    bundle = Bundle.from_bytes(export_bundle(split, name="test", version="1", classes=3))
    x, grad = torch.randn(6, 5), torch.randn(6, *split.activation_shape)
    results = []
    for backward in ("onnxruntime", "torch"):
        backend = build_backend(backward=backward)  # type: ignore[arg-type]
        backend.load(bundle)
        results.append(backend.backward(x.numpy(), grad.numpy()))
    for name, gradient in results[1].items():
        torch.testing.assert_close(torch.tensor(results[0][name]), torch.tensor(gradient))


def test_parameter_called_like_the_cut_gradient_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grad_out = nn.Parameter(torch.rand(6))
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(x * self.grad_out))
            return logits

    with pytest.raises(ModelError, match="grad_out: expected another name"):
        derive(split_network(Named(), "body", (6,)))


def test_parameter_called_like_a_kept_value_is_refused() -> None:
    class Listed(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.register_module(name, nn.ParameterList([torch.rand(6)]))
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(x * getattr(self, self.name)[0]))
            return logits

    with pytest.raises(ModelError, match=r"kept\.0: expected another name"):
        derive(split_network(Listed("kept"), "body", (6,)))
    assert "keeps.0" in derive(split_network(Listed("keeps"), "body", (6,))).program.parameters


def test_operator_outside_any_set_is_refused_before() -> None:
    body = nn.Sequential(nn.Linear(6, 6), user.LooksAtData())
    with pytest.raises(ModelError, match="client segment cannot be exported"):
        derive(split_body(body, (6,)))
