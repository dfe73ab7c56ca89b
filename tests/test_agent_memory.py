"""Peak memory of a device's work on a large segment, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.export import export_bundle
from models.registry import build_network
from models.split import split_network
from wire.bundle import Bundle

MB = 1_000_000
SHAPE = (3, 32, 32)
BATCH = 128
DEFAULT_MAX_BATCH_BYTES = 256 << 20

# One step as the agent's daemon does it: weights, activations and gradients as messages, fp32.
STEP = f"""
import sys
import numpy as np
from edge_agent.daemon import AgentDaemon  # what an agent has loaded besides
from edge_agent.compute import build_backend
from edge_agent.datasets import LabelledData
from edge_agent.measuring.memory import peak_rss_bytes
from edge_agent.session import SendActivations, SendGradients
from edge_agent.worker import Worker
from wire.bundle import Bundle
from wire.codec import decode_tensors, encode_tensors, exact
from wire.messages import Allocation, Precision, Slot

bundle = Bundle.from_bytes(open(sys.argv[1], "rb").read())
rng = np.random.default_rng(0)
x = rng.standard_normal(({BATCH}, *{SHAPE}), np.float32)
y = np.arange({BATCH}) % 10
backend = build_backend("auto", "onnxruntime", 1, max_batch_bytes=int(sys.argv[2]))
worker = Worker(LabelledData(x=x, y=y, classes=10), backend)
worker.install(bundle)
weights = {{name: exact(array) for name, array in bundle.initial_weights().items()}}
worker.keep_weights(bundle.digest, bytes(encode_tensors(weights, {{}})))
slot = Slot(1, 0, {BATCH})
ranges = ((0, {BATCH}),)
fp32 = Precision.FP32
allocation = Allocation(
    run="run", epoch=0, seed=1, plan=1, bundle=bundle.digest, slots=(slot,), precision=fp32
)
worker.activations(SendActivations(allocation, slot, 0, ranges))
cut = rng.standard_normal(({BATCH}, *bundle.manifest.activation.shape), np.float32)
message = bytes(encode_tensors({{"gradient": exact(cut)}}, {{}}))
del cut
gradients = decode_tensors(worker.gradients(SendGradients(allocation, slot, 0, ranges), message))
assert np.abs(gradients.require("stem.conv.weight")).max() > 0
assert "torch" not in sys.modules
print(peak_rss_bytes(), backend.forward_pass_samples, backend.backward_pass_samples)
"""


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    split = split_network(
        build_network("resnet18", input_shape=SHAPE, classes=10, seed=0), "layer1", SHAPE
    )
    data = export_bundle(split, name="resnet", version="1", classes=10)
    path = tmp_path_factory.mktemp("resnet") / "client.bundle"
    path.write_bytes(data)
    return path, Bundle.from_bytes(data)


def step_peak_bytes(path: Path, max_batch_bytes: int) -> tuple[int, int, int]:
    """Peak of the whole process, and the samples of a forward and of a backward pass."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(path), str(max_batch_bytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, forward, backward = map(int, done.stdout.split())
    return peak, forward, backward


@pytest.mark.processes
def test_resnet_step_of_128_samples_stays_below_350_mb(resnet: tuple[Path, Bundle]) -> None:
    """The whole process, with samples, activations and messages: those are 180 MB of it.

    Unsplit, the intermediate values alone would take more than half a gigabyte.
    """
    path, bundle = resnet
    assert BATCH * bundle.manifest.onnx_backward_bytes_per_sample > 550 * MB
    peak, _, _ = step_peak_bytes(path, DEFAULT_MAX_BATCH_BYTES)
    assert peak <= 350 * MB
