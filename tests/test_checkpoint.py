"""Checkpoints: whole or absent, verified on reading, and training goes on to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coordinator.checkpoint import (
    METADATA_KEY,
    CheckpointError,
    CheckpointPointer,
    below_prefix,
    flatten_optimiser,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    restore_optimiser,
    with_prefix,
    write_checkpoint,
)
from coordinator.store import get_record, open_store, put_records
from wire.errors import LocalProtocolError, ModelError

MakeOptimiser = Callable[[Any], torch.optim.Optimizer]

OPTIMISERS: dict[str, MakeOptimiser] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95)),
}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )


def _train(network: torch.nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Train on data from torch's own generator, so that its state matters too."""
    for _ in range(steps):
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()


def _some_tensors() -> dict[str, torch.Tensor]:
    return {"server.weight": torch.arange(6.0).reshape(2, 3), "server.bias": torch.ones(3)}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_interrupted_training_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    make = OPTIMISERS[name]
    whole = _network()
    torch.manual_seed(1)
    _train(whole, make(whole.parameters()), 10)

    first = _network()
    optimiser = make(first.parameters())
    torch.manual_seed(1)
    _train(first, optimiser, 5)
    tensors, document = flatten_optimiser(optimiser, first.named_parameters())
    pointer = write_checkpoint(
        tmp_path,
        5,
        {
            **with_prefix(first.state_dict(), "network."),
            **with_prefix(tensors, "optimiser."),
            "random.torch": torch.get_rng_state(),
        },
        {"optimiser": document},
    )

    checkpoint = read_checkpoint(pointer.path_in(tmp_path), pointer.sha256)
    second = _network(seed=7)
    second.load_state_dict(below_prefix(checkpoint.tensors, "network."))
    resumed = make(second.parameters())
    restore_optimiser(
        resumed,
        second.named_parameters(),
        below_prefix(checkpoint.tensors, "optimiser."),
        checkpoint.document["optimiser"],
    )
    torch.set_rng_state(checkpoint.tensors["random.torch"])
    _train(second, resumed, 5)

    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_state_follows_parameter_names_not_their_order() -> None:
    network = _network()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    _train(network, optimiser, 3)
    tensors, document = flatten_optimiser(optimiser, network.named_parameters())
    parameters = dict(network.named_parameters())
    other = torch.optim.Adam(list(reversed(parameters.values())), lr=1.0)
    restore_optimiser(other, parameters.items(), tensors, json.loads(json.dumps(document)))
    for parameter in parameters.values():
        for key, value in optimiser.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
    assert other.param_groups[0]["lr"] == 1e-2
    assert other.param_groups[0]["betas"] == (0.9, 0.999)


def test_each_parameter_group_keeps_its_own_settings() -> None:
    network = _network()
    named = dict(network.named_parameters())
    body, head = list(named.values())[:4], list(named.values())[4:]

    def make(rates: tuple[float, float]) -> torch.optim.Optimizer:
        groups = [{"params": body, "lr": rates[0]}, {"params": head, "lr": rates[1]}]
        return torch.optim.SGD(groups, momentum=0.9)

    optimiser = make((0.1, 0.01))
    _train(network, optimiser, 2)
    tensors, document = flatten_optimiser(optimiser, named.items())
    other = make((1.0, 1.0))
    restore_optimiser(other, named.items(), tensors, json.loads(json.dumps(document)))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.01]
    tail = head[-1]
    assert torch.equal(
        other.state[tail]["momentum_buffer"], optimiser.state[tail]["momentum_buffer"]
    )


def test_restored_state_is_independent_of_the_checkpoint() -> None:
    network = _network()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    _train(network, optimiser, 1)
    live, document = flatten_optimiser(optimiser, network.named_parameters())
    tensors = {name: tensor.clone() for name, tensor in live.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    other = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    restore_optimiser(other, network.named_parameters(), tensors, document)
    _train(network, other, 1)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_optimiser_that_has_not_stepped_has_no_tensors() -> None:
    network = _network()
    optimiser = torch.optim.Adam(network.parameters())
    tensors, document = flatten_optimiser(optimiser, network.named_parameters())
    assert tensors == {}
    restore_optimiser(optimiser, network.named_parameters(), tensors, document)
    assert len(optimiser.state) == 0


def _trained_adam() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    network = _network()
    optimiser = torch.optim.Adam(network.parameters())
    _train(network, optimiser, 1)
    tensors, document = flatten_optimiser(optimiser, network.named_parameters())
    return network, tensors, document


def test_another_class_of_optimiser_is_refused() -> None:
    network, tensors, document = _trained_adam()
    with pytest.raises(CheckpointError, match="expected SGD, found Adam"):
        restore_optimiser(
            torch.optim.SGD(network.parameters()), network.named_parameters(), tensors, document
        )


def test_another_network_is_refused_by_parameter_name() -> None:
    _, tensors, document = _trained_adam()
    other = torch.nn.Sequential(torch.nn.Linear(6, 8))
    with pytest.raises(CheckpointError, match=r"parameter '1\.bias' is not in the network"):
        restore_optimiser(
            torch.optim.Adam(other.parameters()), other.named_parameters(), tensors, document
        )
    other = torch.nn.Sequential(*_network(), torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"parameter '4\.bias' is not in the checkpoint"):
        restore_optimiser(
            torch.optim.Adam(other.parameters()), other.named_parameters(), tensors, document
        )


def test_another_shape_is_refused_and_changes_nothing() -> None:
    network, tensors, document = _trained_adam()
    optimiser = torch.optim.Adam(network.parameters())
    tensors["0.weight::exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(
        CheckpointError, match=r"'0\.weight::exp_avg' of shape \(8, 6\), found \(2, 2\)"
    ):
        restore_optimiser(optimiser, network.named_parameters(), tensors, document)
    assert len(optimiser.state) == 0


def test_entry_of_an_unknown_parameter_is_refused() -> None:
    network, tensors, document = _trained_adam()
    tensors["nowhere::exp_avg"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="no parameter for 'nowhere::exp_avg'"):
        restore_optimiser(
            torch.optim.Adam(network.parameters()), network.named_parameters(), tensors, document
        )


def test_other_grouping_is_refused() -> None:
    network, tensors, document = _trained_adam()
    parameters = list(network.parameters())
    grouped = torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}])
    with pytest.raises(CheckpointError, match="grouped in another way"):
        restore_optimiser(grouped, network.named_parameters(), tensors, document)


@pytest.mark.parametrize("missing", ["class", "param_groups", "state"])
def test_incomplete_optimiser_document_is_refused(missing: str) -> None:
    network, tensors, document = _trained_adam()
    del document[missing]
    with pytest.raises(CheckpointError, match=f"not as written: KeyError.*{missing}"):
        restore_optimiser(
            torch.optim.Adam(network.parameters()), network.named_parameters(), tensors, document
        )


def test_parameter_without_a_name_is_our_fault() -> None:
    network = _network()
    optimiser = torch.optim.Adam(network.parameters())
    with pytest.raises(LocalProtocolError, match=r"shape \(8, 6\) has no name"):
        flatten_optimiser(optimiser, [])


def test_document_and_tensors_come_back_as_they_went(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    rng.normal(size=7)
    document = {
        "consumed": [["d1", 0, 17]],
        "delays_s": {"d1": 0.1 + 0.2, "d2": float("inf")},
        "random": rng.bit_generator.state,  # holds integers of 128 bits
        "name": "Grüße",
        "none": None,
    }
    tensors = {
        "half": torch.randn(3, 2).half(),
        "brain": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(5.0),
        "count": torch.tensor(2**40),
        "empty": torch.empty(0, 3),
        "other-empty": torch.empty(0),
        "flag": torch.tensor([True, False]),
        "random": torch.get_rng_state(),
    }
    pointer = write_checkpoint(tmp_path, 12, tensors, document)
    checkpoint = read_checkpoint(pointer.path_in(tmp_path), pointer.sha256)
    assert (checkpoint.step, checkpoint.document) == (12, document)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor), name
    again = np.random.Generator(np.random.PCG64(0))
    again.bit_generator.state = checkpoint.document["random"]
    assert again.normal() == rng.normal()


def test_shared_strided_and_required_grad_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "row": base[1],
        "parameter": torch.nn.Parameter(base),
    }
    pointer = write_checkpoint(tmp_path, 0, tensors, {})
    read = read_checkpoint(pointer.path_in(tmp_path)).tensors
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.detach()), name


def test_pointer_describes_the_file_and_fits_the_store(tmp_path: Path) -> None:
    pointer = write_checkpoint(tmp_path, 3, _some_tensors(), {})
    path = pointer.path_in(tmp_path)
    assert path.stat().st_size == pointer.size_bytes
    store = open_store(f"sqlite:///{tmp_path}/state.db")
    put_records(store, {"checkpoint": pointer})
    assert get_record(store, "checkpoint", CheckpointPointer) == pointer
    store.close()


def test_second_checkpoint_of_a_step_leaves_the_first_alone(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 3, _some_tensors(), {"why": "interval"})
    second = write_checkpoint(tmp_path, 3, _some_tensors(), {"why": "signal"})
    assert read_checkpoint(first.path_in(tmp_path), first.sha256).document["why"] == "interval"
    assert read_checkpoint(second.path_in(tmp_path), second.sha256).document["why"] == "signal"


def test_same_content_is_the_same_file(tmp_path: Path) -> None:
    pointers = [write_checkpoint(tmp_path, 3, _some_tensors(), {}) for _ in range(2)]
    assert pointers[0] == pointers[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_read_tensors_survive_the_file(tmp_path: Path) -> None:
    pointer = write_checkpoint(tmp_path, 3, _some_tensors(), {})
    path = pointer.path_in(tmp_path)
    read = read_checkpoint(path).tensors
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(read["server.weight"], _some_tensors()["server.weight"])


@pytest.mark.parametrize("size_bytes", [0, 4, 100, -1])
def test_truncated_file_is_refused(tmp_path: Path, size_bytes: int) -> None:
    pointer = write_checkpoint(tmp_path, 3, _some_tensors(), {})
    path = pointer.path_in(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[:size_bytes])
    with pytest.raises(CheckpointError, match="damaged: expected SHA-256"):
        read_checkpoint(path, pointer.sha256)
    nameless = tmp_path / "other.safetensors"
    nameless.write_bytes(raw[:size_bytes])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        read_checkpoint(nameless)


def test_one_flipped_bit_is_noticed_with_and_without_the_digest(tmp_path: Path) -> None:
    pointer = write_checkpoint(tmp_path, 3, _some_tensors(), {})
    path = pointer.path_in(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for digest in (pointer.sha256, None):
        with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
            read_checkpoint(path, digest)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: .*No such file"):
        read_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(ModelError, match="Is a directory"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt"}, "found another safetensors file"),
        ({METADATA_KEY: "{"}, "expected a version, a step and a document"),
        ({METADATA_KEY: "[1]"}, "expected a version, a step and a document"),
        ({METADATA_KEY: '{"version": 1, "step": 4}'}, "expected a version, a step"),
        (
            {METADATA_KEY: '{"version": 2, "step": 4, "document": {}}'},
            "expected checkpoint version 1, found 2",
        ),
        ({METADATA_KEY: '{"version": 1, "step": "4", "document": {}}'}, "expected a whole number"),
        ({METADATA_KEY: '{"version": 1, "step": 4, "document": []}'}, "and a JSON object"),
    ],
)
def test_file_with_other_metadata_is_refused(
    tmp_path: Path, metadata: dict[str, str], expected: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{expected}"):
        read_checkpoint(path)


@pytest.mark.parametrize("document", [{1: "a"}, {"a": [{"b": {2: 3}}]}])
def test_keys_that_json_would_change_are_our_fault(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    with pytest.raises(LocalProtocolError, match="expected text keys"):
        write_checkpoint(tmp_path, 1, {}, document)


def test_values_that_json_cannot_hold_are_our_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LocalProtocolError, match="not JSON serializable"):
        write_checkpoint(tmp_path, 1, {}, {"lr": torch.tensor(1.0)})
    monkeypatch.setattr("coordinator.checkpoint.MAX_DOCUMENT_BYTES", 20)
    with pytest.raises(LocalProtocolError, match="expected at most 20 bytes"):
        write_checkpoint(tmp_path, 1, {}, {"long": "x" * 20})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../step.safetensors", "a/b", "step-1.safetensors", ""])
def test_pointer_to_anything_but_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    pointer = CheckpointPointer(name=name, sha256="", step=1, size_bytes=1)
    with pytest.raises(CheckpointError, match="expected the name of a checkpoint file"):
        pointer.path_in(tmp_path)


def test_failed_write_leaves_the_last_checkpoint_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = write_checkpoint(tmp_path, 1, _some_tensors(), {})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coordinator.checkpoint.os.replace", full_disk)
    with pytest.raises(CheckpointError, match=r"step 2 not written.*No space left"):
        write_checkpoint(tmp_path, 2, _some_tensors(), {})
    assert [path.name for path in tmp_path.iterdir()] == [pointer.name]


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step 2 not written"):
        write_checkpoint(tmp_path / "file" / "checkpoints", 2, {}, {})


def test_pruning_keeps_the_newest_and_what_is_pointed_at(tmp_path: Path) -> None:
    pointers = [write_checkpoint(tmp_path, step, _some_tensors(), {}) for step in (5, 100, 20, 1)]
    (tmp_path / "notes.txt").write_text("not ours")
    deleted = prune_checkpoints(tmp_path, keep=2, pointed_at={pointers[3].name})
    assert [path.name for path in deleted] == [pointers[0].name]
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        pointers[3].name,
        pointers[2].name,
        pointers[1].name,
    ]
    assert (tmp_path / "notes.txt").exists()
    assert prune_checkpoints(tmp_path, keep=5, pointed_at=()) == []


def test_pruning_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prune_checkpoints(tmp_path, keep=0, pointed_at=())


def test_directory_without_checkpoints_lists_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "not-yet") == []
    assert prune_checkpoints(tmp_path / "not-yet", keep=1, pointed_at=()) == []


@pytest.mark.parametrize("cleaner", ["write", "prune"])
def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path, cleaner: str) -> None:
    for name in (".checkpoint-4711.tmp", ".tmp5hJgwx"):  # ours, and safetensors'
        (tmp_path / name).write_bytes(b"half")
    if cleaner == "write":
        write_checkpoint(tmp_path, 1, _some_tensors(), {})
    else:
        prune_checkpoints(tmp_path, keep=1, pointed_at=())
    assert list(tmp_path.glob(".*")) == []


_WRITER = """
import sys, torch
from pathlib import Path
from coordinator.checkpoint import write_checkpoint
step = 0
while True:
    step += 1
    tensors = {"w": torch.full((500_000,), float(step))}
    write_checkpoint(Path(sys.argv[1]), step, tensors, {"n": step})
    print(step, flush=True)
"""


@pytest.mark.processes
def test_killed_writer_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """1. A process writes without pause. 2. kill -9. 3. Every file reads, none reported is lost."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.kill()
        process.stdout.read()
    paths = list_checkpoints(tmp_path)
    assert len(paths) >= 5
    for step, path in enumerate(paths, start=1):
        checkpoint = read_checkpoint(path)
        assert (checkpoint.step, checkpoint.document) == (step, {"n": step})
        assert bool((checkpoint.tensors["w"] == step).all())
    prune_checkpoints(tmp_path, keep=1, pointed_at=())
    assert list(tmp_path.iterdir()) == [paths[-1]]
