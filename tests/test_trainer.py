"""Both segments and their optimisers on the coordinator against the undivided network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coordinator.checkpoint import read_checkpoint, write_checkpoint
from coordinator.optimisers import OptimiserName, OptimiserSettings
from coordinator.trainer import SplitTrainer
from models.split import split_network

SETTINGS = {
    "sgd": OptimiserSettings(name=OptimiserName.SGD, lr=0.1),
    "momentum": OptimiserSettings(
        name=OptimiserName.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adam": OptimiserSettings(name=OptimiserName.ADAM, lr=0.01),
    "adamw": OptimiserSettings(name=OptimiserName.ADAMW, lr=0.01, weight_decay=0.1),
}


# What torch calls these settings.
REFERENCES: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "momentum": lambda weights: torch.optim.SGD(
        weights, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def one_thread_and_own_random_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def _network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        client = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        server = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return nn.Sequential(client, server)


def _trainer(name: str = "momentum", *, dropout: float = 0.0, frozen: bool = False) -> SplitTrainer:
    client, server = _network(dropout)
    return SplitTrainer(client, server, SETTINGS[name], frozen=frozen, seed=5)


def _batch(step: int, size: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def _client_pass(
    trainer: SplitTrainer, x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Activations with their graph, and the weights at its leaves, as a device would have them."""
    weights = {n: p.detach().requires_grad_() for n, p in trainer.client.named_parameters()}
    return torch.func.functional_call(trainer.client, weights, (x,)), weights


def _activations(trainer: SplitTrainer, x: torch.Tensor) -> np.ndarray:
    return _client_pass(trainer, x)[0].detach().numpy()


def _step(trainer: SplitTrainer, step: int) -> float:
    """One step, with the device's part done here."""
    x, y = _batch(step)
    activations, weights = _client_pass(trainer, x)
    result = trainer.run_server(activations.detach().numpy(), y.numpy())
    if result.cut_gradient is not None:
        cut = torch.from_numpy(result.cut_gradient)
        gradients = torch.autograd.grad(activations, list(weights.values()), cut)
        trainer.apply_client({n: g.numpy() for n, g in zip(weights, gradients, strict=True)})
    trainer.apply_server()
    return result.loss


def _weights(trainer: SplitTrainer) -> dict[str, torch.Tensor]:
    client = {f"0.{n}": t.clone() for n, t in trainer.client.state_dict().items()}
    return client | {f"1.{n}": t.clone() for n, t in trainer.server.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SETTINGS)
def test_split_training_equals_the_undivided_network(name: str) -> None:
    trainer, whole = _trainer(name), _network()
    optimiser = REFERENCES[name](whole.parameters())
    for step in range(30):
        x, y = _batch(step)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(whole(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        assert _step(trainer, step) == pytest.approx(float(loss.detach()), rel=1e-5)
    for key, tensor in whole.state_dict().items():
        difference = (_weights(trainer)[key] - tensor).norm() / tensor.norm()
        assert float(difference) <= 1e-5


def test_segments_may_have_optimisers_of_their_own() -> None:
    client, server = _network()
    still = OptimiserSettings(name=OptimiserName.SGD, lr=1e-30)
    trainer = SplitTrainer(client, server, SETTINGS["sgd"], client_optimiser=still)
    before = _weights(trainer)
    _step(trainer, 0)
    after = _weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("1.")}


def test_discarded_pass_leaves_no_trace() -> None:
    trainer, other = _trainer(), _trainer()
    x, y = _batch(99)
    result = trainer.run_server(_activations(trainer, x) * 100, y.numpy())
    assert result.cut_gradient is not None
    trainer.discard()
    for step in range(3):
        assert _step(trainer, step) == _step(other, step)
    assert _same(_weights(trainer), _weights(other))


def test_second_pass_takes_the_place_of_the_first() -> None:
    """A step whose devices were lost is run again on the rows that are left."""
    trainer, other = _trainer(), _trainer()
    x, y = _batch(1)
    trainer.run_server(_activations(trainer, x) * 3, y.numpy())
    _step(trainer, 2)
    _step(other, 2)
    assert _same(_weights(trainer), _weights(other))


def test_result_counts_right_answers_and_means_the_loss() -> None:
    trainer = _trainer()
    x, y = _batch(4, 25)
    activations = _activations(trainer, x)
    logits = trainer.server(torch.from_numpy(activations)).detach()
    result = trainer.run_server(activations, y.numpy())
    assert result.correct == int((logits.argmax(1) == y).sum())
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-6)


def test_frozen_client_needs_no_gradient_and_is_not_stepped() -> None:
    trainer = _trainer(frozen=True)
    before = _weights(trainer)
    x, y = _batch(0)
    assert trainer.run_server(_activations(trainer, x), y.numpy()).cut_gradient is None
    trainer.apply_server()
    after = _weights(trainer)
    assert all(torch.equal(before[name], after[name]) == name.startswith("0.") for name in before)
    assert trainer.checkpoint()[1].keys() == {"server"}


def test_segment_without_parameters_has_nothing_to_step() -> None:
    trainer = SplitTrainer(nn.Flatten(), nn.Linear(6, 3), SETTINGS["adam"])
    x, y = _batch(0)
    result = trainer.run_server(x.numpy(), y.numpy())
    assert result.cut_gradient is not None
    trainer.apply_client({})
    trainer.apply_server()
    assert trainer.parameter_shapes == {}
    assert trainer.client_weights() == {}


def test_client_weights_are_views_by_name() -> None:
    trainer = _trainer()
    before = {name: array.copy() for name, array in trainer.client_weights().items()}
    held = trainer.client_weights()
    _step(trainer, 0)
    assert {n: a.shape for n, a in held.items()} == trainer.parameter_shapes
    assert all(not np.array_equal(held[name], before[name]) for name in held)


def test_evaluation_is_the_same_in_any_batches_and_without_dropout() -> None:
    trainer = _trainer(dropout=0.5)
    x, y = _batch(3, 37)
    whole = trainer.evaluate(x.numpy(), y.numpy())
    parts = trainer.evaluate(x.numpy(), y.numpy(), batch=5)
    assert (whole.samples, parts.samples) == (37, 37)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_evaluation_does_not_disturb_training() -> None:
    trainer, other = _trainer(dropout=0.5), _trainer(dropout=0.5)
    x, y = _batch(3)
    losses = []
    for current in (trainer, other):
        torch.manual_seed(1)
        current_losses = []
        for step in range(4):
            current_losses.append(_step(current, step))
            if current is trainer:
                current.evaluate(x.numpy(), y.numpy())
        losses.append(current_losses)
    assert losses[0] == losses[1]
    assert _same(_weights(trainer), _weights(other))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_restored_trainer_goes_on_to_the_bit(tmp_path: Path, name: str, dropout: float) -> None:
    trainer = _trainer(name, dropout=dropout)
    for step in range(5):
        _step(trainer, step)
    tensors, document = trainer.checkpoint()
    pointer = write_checkpoint(tmp_path, 5, tensors, document)
    losses = [_step(trainer, step) for step in range(5, 9)]
    restored = _trainer(name, dropout=dropout)
    torch.manual_seed(12345)  # another process has another random state
    checkpoint = read_checkpoint(pointer.path_in(tmp_path), pointer.sha256)
    restored.restore(checkpoint.tensors, checkpoint.document)
    assert [_step(restored, step) for step in range(5, 9)] == losses
    assert _same(_weights(restored), _weights(trainer))


def test_dropout_starts_from_the_seed_of_the_run() -> None:
    def losses(seed: int) -> list[float]:
        client, server = _network(0.5)
        trainer = SplitTrainer(client, server, SETTINGS["sgd"], seed=seed)
        return [_step(trainer, step) for step in range(3)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def _normed_network() -> nn.Module:
    """Two BatchNorm layers in the server segment, the first of which keeps its statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept, moving = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        kept.running_mean = torch.randn(8)
        kept.eval()
        server = nn.Sequential(nn.Linear(8, 8), kept, nn.Linear(8, 8), moving, nn.Linear(8, 3))
        return nn.Sequential(OrderedDict(client=nn.Linear(6, 8), server=server))


def test_layers_that_the_user_put_into_eval_mode_train_as_in_the_undivided_network() -> None:
    split = split_network(_normed_network(), "client", (6,))
    trainer = SplitTrainer(
        split.client, split.server, SETTINGS["sgd"], eval_layers=split.eval_layers
    )
    undivided = _normed_network()
    optimiser = REFERENCES["sgd"](undivided.parameters())
    for step in range(4):
        x, y = _batch(step)
        loss = _step(trainer, step)
        trainer.evaluate(x.numpy(), y.numpy())
        optimiser.zero_grad()
        expected = nn.functional.cross_entropy(undivided(x), y)
        expected.backward()
        optimiser.step()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    weights = trainer.client.state_dict() | trainer.server.state_dict()
    for name, tensor in undivided.state_dict().items():
        assert torch.allclose(weights[name], tensor, rtol=1e-4, atol=1e-6), name
    before = _normed_network().state_dict()
    assert torch.equal(weights["server.1.running_mean"], before["server.1.running_mean"])
    assert not torch.equal(weights["server.3.running_mean"], before["server.3.running_mean"])
