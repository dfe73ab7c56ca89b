"""Max-pooling of a torch segment: another kernel than eager torch's, with its bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from edge_agent.compute.torch_backend import TorchSegment
from models.export import export_bundle
from models.split import split_network
from wire.bundle import Bundle

SHAPE = (3, 9, 12)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Pooled:
    """A convolution, so that something trains, then a pool; by eager torch and as devices run it.

    ``is_quick``: the device's runs on oneDNN.
    """

    client: nn.Module
    segment: TorchSegment
    is_quick: bool


POOLS = [
    (nn.MaxPool2d(2), True),
    (nn.MaxPool2d((3, 4)), True),
    (nn.MaxPool2d(3, stride=2), False),  # windows overlap: sums in another order
    (nn.MaxPool2d(2, padding=1), False),
    (nn.MaxPool2d(2, dilation=2), False),
    (nn.MaxPool2d(2, ceil_mode=True), False),
]


@pytest.fixture(scope="module", params=POOLS, ids=lambda pool: str(pool[0]))
def pooled(request: pytest.FixtureRequest) -> Pooled:
    pool, is_quick = request.param
    torch.manual_seed(0)
    client = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool)
    features = client(torch.zeros(1, *SHAPE)).numel()
    network = nn.Sequential(*client, nn.Flatten(), nn.Linear(features, 2))
    split = split_network(network, "1", SHAPE)
    bundle = Bundle.from_bytes(export_bundle(split, name="r", version="1", classes=2))
    segment = TorchSegment(bundle, threads=1)
    segment.set_weights(bundle.initial_weights())
    return Pooled(split.client, segment, is_quick and torch.backends.mkldnn.is_available())


def values(kind: str) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(5, *SHAPE)
    match kind:
        case "ties":  # of equal values in a window the first has the gradient
            return torch.randint(-1, 2, x.shape).float()
        case "all below zero":
            return -x.abs() - 5
        case "not a number":
            x[2, 1, 4, 4] = torch.nan
        case "infinite":
            x[2, 1, 4, 4], x[1, 0, 0, 0] = torch.inf, -torch.inf
    return x


def test_windows_side_by_side_are_pooled_by_onednn(pooled: Pooled) -> None:
    x = values("random").numpy()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        pooled.segment.forward(x)
    names = {event.name for event in profiled.events()}
    assert ("aten::mkldnn_max_pool2d" in names) == pooled.is_quick


@pytest.mark.parametrize("kind", ["random", "ties", "all below zero", "not a number", "infinite"])
def test_pool_and_its_gradients_have_the_bits_of_eager_torch(pooled: Pooled, kind: str) -> None:
    client, segment = pooled.client, pooled.segment
    x = values(kind)
    expected = client(x)
    activations, kept = segment.forward_kept(x.numpy())
    assert torch.equal(torch.from_numpy(activations).nan_to_num(77), expected.nan_to_num(77))
    gradient = torch.randn_like(expected)
    eager = torch.autograd.grad(expected, list(client.parameters()), gradient)
    ours = segment.backward(x.numpy(), gradient.numpy(), kept)
    for array, tensor in zip(ours.values(), eager, strict=True):
        assert torch.equal(torch.from_numpy(array).nan_to_num(77), tensor.nan_to_num(77))
