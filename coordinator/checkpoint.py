"""Checkpoints: one safetensors file each, with everything that a run needs to go on.

The tensors are weights, buffers, optimiser state and the torch generator's state; all else is a
JSON document in the file's metadata. A file is written beside its place, flushed to the disk and
renamed, so that it is there as a whole or not at all. Its name holds a part of its SHA-256: a
second checkpoint of the same step cannot take the place of one that is still pointed at.

A directory has one writer. Safetensors: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wire.errors import LocalProtocolError, ModelError

# All metadata is one entry: the library writes several in random order, and the same checkpoint
# should be the same bytes.
METADATA_KEY = "splitfleet-checkpoint"
FORMAT_VERSION = 1
DIGEST_CHARACTERS = 16
# Safetensors refuses to read headers above 100 MB; tensors' own entries need a part of it.
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024

_NAME = re.compile(r"step-(?P<step>\d{10,})-(?P<digest>[0-9a-f]{16})\.safetensors")
_TEMPORARY_PREFIX = ".checkpoint-"
_TEMPORARY_SUFFIX = ".tmp"
_LIBRARY_TEMPORARIES = ".tmp??????"  # safetensors' own, on the way to the name it was given


# Separates a parameter's name, which may hold dots, from the entry of its optimiser state.
_ENTRY_SEPARATOR = "::"

NamedParameters = Iterable[tuple[str, torch.Tensor]]


class CheckpointError(ModelError):
    """A checkpoint that cannot be read, or does not fit what is to be restored from it."""


class CheckpointPointer(msgspec.Struct, frozen=True, kw_only=True):
    """What a state store keeps of a checkpoint: a file name, never a path, and its digest."""

    name: str
    sha256: str
    step: int
    size_bytes: int

    def path_in(self, directory: Path) -> Path:
        """Return the file's path; raises CheckpointError if the name is not a checkpoint's."""
        if _NAME.fullmatch(self.name) is None:
            raise CheckpointError(f"expected the name of a checkpoint file, found {self.name!r}")
        return directory / self.name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; tensors on the CPU that belong to nobody else."""

    step: int
    tensors: dict[str, torch.Tensor]
    document: dict[str, Any]


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    document: Mapping[str, Any],
) -> CheckpointPointer:
    """Write a checkpoint, atomically and durably, and return what points at it.

    ``document`` holds what JSON can hold (tuples come back as lists). Raises LocalProtocolError
    for a document that JSON cannot hold, CheckpointError if the file cannot be written.
    """
    metadata = _build_metadata(step, document)
    temporary = directory / f"{_TEMPORARY_PREFIX}{os.getpid()}{_TEMPORARY_SUFFIX}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        save_file(_separate(tensors), temporary, metadata)
        digest, size_bytes = _flush_and_hash(temporary)
        name = f"step-{step:010d}-{digest[:DIGEST_CHARACTERS]}.safetensors"
        os.replace(temporary, directory / name)
        _flush_directory(directory)
    except (OSError, SafetensorError) as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{directory}: checkpoint of step {step} not written: {exc}") from exc
    return CheckpointPointer(name=name, sha256=digest, step=step, size_bytes=size_bytes)


def read_checkpoint(path: Path, expected_sha256: str | None = None) -> Checkpoint:
    """Read and verify a checkpoint.

    Without ``expected_sha256`` the part of the digest in the file's name is checked. Raises
    CheckpointError, naming the file, if it is missing, damaged, or not a checkpoint.
    """
    try:
        _check_digest(path, expected_sha256)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # Cloned, since the library may hand out memory that is mapped from the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as exc:
        raise CheckpointError(f"{path}: expected a checkpoint: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise CheckpointError(f"{path}: expected a whole safetensors file: {exc}") from exc
    step, document = _parse_metadata(path, metadata)
    return Checkpoint(step=step, tensors=tensors, document=document)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint files of a directory, oldest first (by step, then by time written)."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.append((int(match["step"]), path.stat().st_mtime_ns, path.name, path))
    return [entry[-1] for entry in sorted(found)]


def prune_checkpoints(directory: Path, *, keep: int, pointed_at: Collection[str]) -> list[Path]:
    """Delete all but the newest ``keep`` checkpoints and those named in ``pointed_at``.

    Removes leftovers of interrupted writes too. Returns the checkpoints that were deleted;
    raises CheckpointError if the directory refuses.
    """
    if keep < 1:
        raise ValueError(f"expected to keep at least 1 checkpoint, found {keep}")
    try:
        _remove_leftovers(directory)
        surplus = list_checkpoints(directory)[:-keep]
        deleted = [path for path in surplus if path.name not in pointed_at]
        for path in deleted:
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise CheckpointError(f"{directory}: old checkpoints not removed: {exc}") from exc
    return deleted


def _build_metadata(step: int, document: Mapping[str, Any]) -> dict[str, str]:
    _check_keys(document, "$")
    content = {"version": FORMAT_VERSION, "step": step, "document": document}
    try:
        text = json.dumps(content, separators=(",", ":"))
    except (TypeError, ValueError) as exc:
        raise LocalProtocolError(f"checkpoint document: {exc}") from exc
    if len(text) > MAX_DOCUMENT_BYTES:
        raise LocalProtocolError(
            f"checkpoint document: expected at most {MAX_DOCUMENT_BYTES} bytes, found {len(text)}"
        )
    return {METADATA_KEY: text}


def _check_keys(value: object, where: str) -> None:
    """Refuse keys that JSON would turn into text: they would not come back as they went."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise LocalProtocolError(
                    f"checkpoint document: expected text keys at {where}, found {key!r}"
                )
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item, f"{where}[]")


def _parse_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: expected a checkpoint, found another safetensors file")
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, step, document = content["version"], content["step"], content["document"]
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: expected a version, a step and a document") from exc
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {FORMAT_VERSION}, found {version}"
        )
    if not isinstance(step, int) or not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a whole number and a JSON object")
    return step, document


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous CPU tensors no two of which share memory, as the format demands."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _flush_and_hash(path: Path) -> tuple[str, int]:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _check_digest(path: Path, expected_sha256: str | None) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    match = _NAME.fullmatch(path.name)
    expected = expected_sha256 or (match["digest"] if match else "")
    if not found.startswith(expected):
        raise CheckpointError(
            f"{path}: damaged: expected SHA-256 {expected}, found {found[: len(expected)]}"
        )


def _flush_directory(directory: Path) -> None:
    """Make a rename durable; without this a power cut can undo it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(directory: Path) -> None:
    for pattern in (f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}", _LIBRARY_TEMPORARIES):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors under names that start with ``prefix``."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def below_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def flatten_optimiser(
    optimiser: torch.optim.Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimiser's state as tensors named ``parameter::entry`` and a JSON document.

    By name, not by position: the same network built again finds its state whatever the order.
    The tensors are the optimiser's own, not copies. Raises LocalProtocolError for a parameter
    that ``named_parameters`` does not name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            name = _name_of(parameter, names)
            entries = optimiser.state.get(parameter)
            if entries is None:
                continue
            scalars[name] = {k: v for k, v in entries.items() if not torch.is_tensor(v)}
            for key, value in entries.items():
                if torch.is_tensor(value):
                    tensors[f"{name}{_ENTRY_SEPARATOR}{key}"] = value.detach()
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimiser.param_groups
    ]
    document = {"class": type(optimiser).__name__, "param_groups": groups, "state": scalars}
    return tensors, document


def restore_optimiser(
    optimiser: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, torch.Tensor],
    document: Mapping[str, Any],
) -> None:
    """Put back what ``flatten_optimiser`` returned, to the bit.

    ``optimiser`` is a fresh one of the same class over the same parameters in the same groups;
    its hyperparameters become those of the checkpoint. Raises CheckpointError, naming what
    differs, and then leaves it as it was.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    parameters = {
        _name_of(parameter, names): parameter
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    try:
        _check_optimiser(optimiser, names, document)
        state = {name: dict(entries) for name, entries in document["state"].items()}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(_ENTRY_SEPARATOR)
            _check_entry(full_name, tensor, parameters.get(name))
            state[name][key] = tensor.clone()
        groups = document["param_groups"]
    except (KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"optimiser state: not as written: {exc!r}") from exc
    optimiser.load_state_dict(_positional_state(optimiser, list(parameters), groups, state))


def _name_of(parameter: torch.Tensor, names: Mapping[int, str]) -> str:
    if id(parameter) not in names:
        raise LocalProtocolError(
            f"optimiser state: a parameter of shape {tuple(parameter.shape)} has no name"
        )
    return names[id(parameter)]


def _check_optimiser(
    optimiser: torch.optim.Optimizer, names: Mapping[int, str], document: Mapping[str, Any]
) -> None:
    if document["class"] != type(optimiser).__name__:
        raise CheckpointError(
            f"optimiser state: expected {type(optimiser).__name__}, found {document['class']}"
        )
    live = [{names[id(p)] for p in group["params"]} for group in optimiser.param_groups]
    saved = [set(group["params"]) for group in document["param_groups"]]
    in_network, in_checkpoint = set[str]().union(*live), set[str]().union(*saved)
    for name in sorted(in_network ^ in_checkpoint):
        absent_from = "checkpoint" if name in in_network else "network"
        raise CheckpointError(f"optimiser state: parameter {name!r} is not in the {absent_from}")
    if live != saved:
        raise CheckpointError("optimiser state: parameters are grouped in another way")


def _check_entry(full_name: str, tensor: torch.Tensor, parameter: torch.Tensor | None) -> None:
    if parameter is None:
        raise CheckpointError(f"optimiser state: no parameter for {full_name!r}")
    # Entries are of the parameter's shape or counters without any.
    if tensor.dim() and tensor.shape != parameter.shape:
        raise CheckpointError(
            f"optimiser state: expected {full_name!r} of shape {tuple(parameter.shape)}, "
            f"found {tuple(tensor.shape)}"
        )


def _positional_state(
    optimiser: torch.optim.Optimizer,
    order: list[str],
    groups: list[dict[str, Any]],
    state: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Build the dictionary that torch loads: parameters by their position in the optimiser."""
    positions = {name: position for position, name in enumerate(order)}
    start = 0
    positional_groups = []
    for live, saved in zip(optimiser.param_groups, groups, strict=True):
        end = start + len(live["params"])
        values = {
            # JSON has no tuples, which some hyperparameters (betas) are.
            key: tuple(value) if isinstance(live.get(key), tuple) else value
            for key, value in saved.items()
        }
        positional_groups.append({**values, "params": list(range(start, end))})
        start = end
    return {
        "state": {positions[name]: entries for name, entries in state.items()},
        "param_groups": positional_groups,
    }
