"""What the documents say about the code is so: links, tables, examples, snippets."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.main import get_command

from coordinator.cli.app import app as coordinator_app
from coordinator.config import RunSettings
from edge_agent.cli import app as agent_app
from edge_agent.datasets import DataSettings
from wire.bundle import Manifest
from wire.codec import decode_tensors
from wire.errors import Refusal
from wire.exit_codes import ExitCode
from wire.messages import (
    ActivationsHeader,
    Allocation,
    Birth,
    Capabilities,
    ChunkHeader,
    CutGradientHeader,
    DeviceState,
    FleetState,
    GradientsHeader,
    Message,
    RolloutAcknowledge,
    RolloutCancel,
    RolloutOffer,
    RolloutStatus,
    Telemetry,
    WeightsHeader,
    decode_message,
    encode_message,
    parse_header,
)
from wire.precision import read_floats, read_labels
from wire.settings import parse_settings
from wire.topics import ROOT, Channel, Direction

ROOT_DIRECTORY = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in [*ROOT_DIRECTORY.glob("*.md"), *ROOT_DIRECTORY.glob("*/*.md")]
    if not path.parent.name.startswith(".")
)
PROTOCOL = ROOT_DIRECTORY / "docs" / "protocol.md"
OPERATIONS = ROOT_DIRECTORY / "docs" / "operations.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")

CONTROL_MESSAGES: dict[str, type[Message]] = {
    "Birth": Birth,
    "DeviceState": DeviceState,
    "Allocation": Allocation,
    "FleetState": FleetState,
    "RolloutOffer": RolloutOffer,
    "RolloutCancel": RolloutCancel,
    "RolloutAcknowledge": RolloutAcknowledge,
    "RolloutStatus": RolloutStatus,
    "Telemetry": Telemetry,
}
HEADERS: dict[str, type[Message]] = {
    "up/activations": ActivationsHeader,
    "down/cut-gradient": CutGradientHeader,
    "up/gradients": GradientsHeader,
    "fleet/weights": WeightsHeader,
    "down/bundle": ChunkHeader,
}


def _blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in _FENCE.findall(path.read_text()) if kind == language]


def _section(path: Path, title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    text = _FENCE.sub(lambda match: match[0].replace("\n#", "\n\\#"), path.read_text())
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{path.name} has no section {title!r}"
    return found[1]


def _rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without headings."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [index for index, line in enumerate(lines) if set(line) <= set("|- ")]
    headings = {index - 1 for index in rules} | set(rules)
    return [row for index, row in enumerate(rows) if index not in headings]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    text = _FENCE.sub("", path.read_text())
    return {_anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", path.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{path.name}: {link}"


def test_exit_codes_are_those_of_the_table() -> None:
    rows = _rows(_section(OPERATIONS, "Exit codes"))
    assert {(int(row[0]), _names(row[1])[0]) for row in rows} == {
        (code.value, code.name) for code in ExitCode
    }


@pytest.mark.parametrize(
    ("path", "title"), [(PROTOCOL, "Refusal reasons"), (OPERATIONS, "Refused messages")]
)
def test_refusal_reasons_are_those_of_the_code(path: Path, title: str) -> None:
    documented = [_names(row[0])[0] for row in _rows(_section(path, title))]
    assert documented == [reason.value for reason in Refusal]


def test_topics_are_those_of_the_code() -> None:
    documented = {}
    for row in _rows(_section(PROTOCOL, "Topics")):
        kind = "application/json" if row[2].startswith("JSON") else "application/vnd.safetensors"
        documented[_names(row[0])[0]] = (kind, int(row[3]), row[4] == "yes")
    expected = {}
    for channel in Channel:
        if channel is Channel.ROLLOUT or channel.direction is Direction.DOWN:
            topic = f"dev/{{id}}/down/{channel.level}"
        elif channel.direction is Direction.UP:
            topic = f"dev/{{id}}/up/{channel.level}"
        elif channel.direction is Direction.OPERATOR:
            topic = f"op/{{name}}/{channel.level}"
        elif channel.direction is Direction.COORDINATOR:
            topic = f"coordinator/{channel.level}"
        else:
            key = "/{key}" if channel is Channel.SHARED_BUNDLE else ""
            topic = f"fleet/{channel.level}{key}"
        expected[topic] = (channel.payload.value, channel.qos, channel.retain)
    assert documented == expected
    assert f"`{ROOT}/{{fleet}}/`" in _section(PROTOCOL, "Topics")


@pytest.mark.parametrize("name", CONTROL_MESSAGES)
def test_control_message_has_the_documented_fields_and_example(name: str) -> None:
    message_type = CONTROL_MESSAGES[name]
    section = _section(PROTOCOL, name)
    documented = {field for row in _rows(section) for field in _names(row[0])}
    if name == "Telemetry":
        documented = set(_names(section.split("```")[0]))
    if name == "Birth":
        documented -= set(Capabilities.__struct_fields__) - {"labels"}
    assert set(message_type.__struct_fields__) <= documented
    (example,) = re.findall(r"```json\n(.*?)\n```", section)
    assert encode_message(decode_message(example.encode(), message_type)).decode() == example


@pytest.mark.parametrize("name", ["Birth", "DeviceState", "Allocation", "FleetState"])
def test_documented_defaults_are_those_of_the_code(name: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(CONTROL_MESSAGES[name])}
    capabilities = {field.name: field for field in msgspec.structs.fields(Capabilities)}
    checked = 0
    for row in _rows(_section(PROTOCOL, name)):
        for field_name in _names(row[0]):
            field = fields.get(field_name) or capabilities[field_name]
            assert (row[2] == "required") == field.required, field_name
            if _names(row[2]) and not field.required:
                default = msgspec.json.encode(_default(field)).decode()
                assert _names(row[2])[0].replace(" ", "") == default, field_name
            checked += 1
    assert checked >= len(fields)


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize("name", HEADERS)
def test_tensor_message_has_the_documented_metadata_and_example(name: str) -> None:
    header_type = HEADERS[name]
    # GitHub drops the slash from the anchor; the heading keeps it.
    section = _section(PROTOCOL, name)
    documented = {field for row in _rows(section) for field in _names(row[0])}
    if name == "down/bundle":
        documented = set(_names(section.split("```")[0]))
    assert set(header_type.__struct_fields__) <= documented
    (example,) = re.findall(r"```json\n(.*?)\n```", section)
    entries = msgspec.json.decode(example)
    data_bytes = max(entry["data_offsets"][1] for n, entry in entries.items() if n[:2] != "__")
    payload = struct.pack("<Q", len(example)) + example.encode() + bytes(data_bytes)
    tensors = decode_tensors(payload)
    assert parse_header(tensors.metadata, header_type)
    assert tensors.arrays


def test_manifest_has_the_documented_fields_and_example() -> None:
    section = _section(PROTOCOL, "Bundles")
    documented = {field for row in _rows(section) for field in _names(row[0])}
    assert set(Manifest.__struct_fields__) <= documented
    (example,) = re.findall(r"```json\n(.*?)\n```", section)
    manifest = msgspec.json.decode(example, type=Manifest)
    assert manifest.activation.shape == (256,)


def test_the_payload_byte_by_byte_is_what_the_text_says() -> None:
    (block,) = _blocks(PROTOCOL, "hex")
    pairs = [line[:47].split() for line in block.splitlines()]
    payload = bytes(int(pair, 16) for line in pairs for pair in line)
    tensors = decode_tensors(payload)
    header = parse_header(tensors.metadata, ActivationsHeader)
    assert (header.run, header.step, header.count, header.bundle) == ("demo.1", 1, 2, "ab")
    values = read_floats(tensors, "activations", (2, 2))
    np.testing.assert_array_equal(values, [[0.5, -1.0], [0.0, 2.0]])
    assert read_labels(tensors, "labels", 2, 10).tolist() == [3, 7]


def _yaml_snippets() -> list[Any]:
    return [
        pytest.param(path, text, id=f"{path.name}-{number}")
        for path in DOCUMENTS
        for number, text in enumerate(_blocks(path, "yaml"))
    ]


@pytest.mark.parametrize(("path", "text"), _yaml_snippets())
def test_yaml_snippets_are_settings(path: Path, text: str) -> None:
    document = msgspec.yaml.decode(text)
    if set(document) == {"data"}:
        raw = msgspec.yaml.encode(document["data"])
        assert parse_settings(raw, DataSettings, source=path.name)
    else:
        assert parse_settings(text.encode(), RunSettings, source=path.name)


def _commands(app: Any) -> dict[str, set[str]]:
    """Options of each command; ``group command`` for one within a group."""
    found = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner, part in getattr(command, "commands", {"": command}).items():
            options = {option for parameter in part.params for option in parameter.opts}
            secondary = {o for parameter in part.params for o in parameter.secondary_opts}
            found[f"{name} {inner}".strip()] = options | secondary
    return found


def _command_lines() -> list[tuple[str, list[str]]]:
    """(program, words) of each use of our commands in shell blocks."""
    text = "\n".join(block for path in DOCUMENTS for block in _blocks(path, "sh"))
    lines = [line.split("#")[0].split() for line in text.replace("\\\n", " ").splitlines()]
    ours = ("coordinator", "edge-agent")
    return [(words[0], words[1:]) for words in lines if words and words[0] in ours]


def test_commands_and_options_in_the_documents_exist() -> None:
    known = {"coordinator": _commands(coordinator_app), "edge-agent": _commands(agent_app)}
    lines = _command_lines()
    assert len(lines) >= 10
    for program, words in lines:
        length = 1 if words[0] in known[program] else 2
        subcommand, rest = " ".join(words[:length]), words[length:]
        assert subcommand in known[program], (program, words)
        for word in rest:
            if word.startswith("-"):
                assert word.split("=")[0] in known[program][subcommand], (program, words)


def test_demo_options_in_the_readme_exist() -> None:
    known = _commands(coordinator_app)["demo"]
    lines = re.findall(r"^scripts/demo (--.*)$", (ROOT_DIRECTORY / "README.md").read_text(), re.M)
    assert lines
    for line in lines:
        options = {word for word in line.split() if word.startswith("--")} - {"--help"}
        assert options <= known
