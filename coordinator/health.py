"""Looks at a machine, and at a run's settings, for what would keep a training from working.

Each check says what it found and, where that is not good, what to do about it. A check never
raises: one that cannot be made is a finding too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from coordinator.broker import find_mosquitto, mosquitto_version
from coordinator.broker_config import check_mosquitto_version
from wire.errors import ConfigError, SplitfleetError, TransportError
from wire.exit_codes import ExitCode
from wire.settings import load_settings

if TYPE_CHECKING:
    from coordinator.config import RunSettings
    from models.split import SplitNetwork

DISTRIBUTION = "splitfleet"
OLDEST_PYTHON = (3, 11)
BROKER_TIMEOUT_S = 5.0
LEAST_FREE_BYTES = 200 * 10**6
GOOD_FREE_BYTES = 10**9
# Header and labels of a message beside its largest tensor.
MESSAGE_HEADROOM_BYTES = 16_384

# Distributions that are imported under another name.
_MODULES = {"pyyaml": "yaml", "paho-mqtt": "paho.mqtt", "prometheus-client": "prometheus_client"}
_EXTRA = "coordinator"
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*(?P<versions>[^;]*?)\s*"
    r"(?:;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"]\s*)?"
)
_BOUND = re.compile(r"(?P<relation>>=|<)\s*(?P<version>\d+(?:\.\d+)*)")


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "PROBLEM"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; ``advice`` says what to do. ``code`` is the exit code of a problem."""

    check: str
    level: Level
    found: str
    advice: str = ""
    code: ExitCode = ExitCode.OK


def examine(config: str | None) -> list[Finding]:
    """All checks; those of the run's parts if there is a file that can be read."""
    findings = [check_python(), *check_libraries(), check_mosquitto(is_needed=config is None)]
    if config is None:
        return [*findings, check_disk(Path())]
    try:
        from coordinator.config import RunSettings  # noqa: PLC0415 - torch may be what is missing

        settings = load_settings(config, RunSettings)
    except (ConfigError, ImportError) as exc:
        advice = "correct the file; docs and configs/ show what it may hold"
        return [*findings, _problem("settings", str(exc), advice, ExitCode.CONFIG)]
    findings.append(_ok("settings", config))
    return findings + _examine_run(settings, config)


def exit_code_of(findings: list[Finding]) -> ExitCode:
    """OK, or the code of the first problem."""
    problems = (finding.code for finding in findings if finding.level is Level.PROBLEM)
    return next(problems, ExitCode.OK)


def check_python() -> Finding:
    """Python is new enough."""
    found = f"Python {platform.python_version()} on {platform.machine()}, {sys.executable}"
    if sys.version_info >= OLDEST_PYTHON:
        return _ok("python", found)
    return _problem("python", found, "install Python 3.11 or later", ExitCode.FAILED)


def check_libraries() -> list[Finding]:
    """What the coordinator's installation asks for is there, new enough, and can be imported."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        found = f"{DISTRIBUTION} itself is not installed: versions are unknown"
        return [_warning("libraries", found, f"pip install '{DISTRIBUTION}[{_EXTRA}]'")]
    findings = []
    good = []
    for text in requirements:
        match = _REQUIREMENT.fullmatch(text)
        if match is None or match["extra"] not in (None, _EXTRA) or match["name"] == DISTRIBUTION:
            continue
        finding = check_library(match["name"], match["versions"])
        if finding.level is Level.OK:
            good.append(finding.found)
        else:
            findings.append(finding)
    return [_ok("libraries", ", ".join(good)), *findings] if good else findings


def check_library(name: str, versions: str) -> Finding:
    """One distribution: its version against ``>=`` and ``<`` bounds, and an import."""
    advice = f"pip install '{name}{versions}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _problem(name, "not installed", advice, ExitCode.FAILED)
    if not satisfies(version, versions):
        return _problem(name, f"{version}, expected {versions}", advice, ExitCode.FAILED)
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as exc:  # whatever a broken installation raises is what we are looking for
        found = f"{version} is installed but cannot be imported ({exc})"
        return _problem(name, found, f"reinstall it: {advice}", ExitCode.FAILED)
    return _ok(name, f"{name} {version}")


def satisfies(version: str, versions: str) -> bool:
    """Whether a version lies within bounds such as ``>=2.1,<3``; other relations are ignored."""
    found = _release(version)
    for bound in _BOUND.finditer(versions):
        limit = _release(bound["version"])
        if (found < limit) if bound["relation"] == ">=" else (found >= limit):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros: 3.0 and 3 are the same."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_mosquitto(*, is_needed: bool) -> Finding:
    """Mosquitto's binary; ``is_needed`` where no broker is named and one has to be started."""
    binary = find_mosquitto()
    advice = "apt-get install mosquitto"
    if binary is None:
        if not is_needed:
            return _ok("mosquitto", "not installed here; the settings name a broker")
        if importlib.util.find_spec("iotcore") is None:
            return _problem("mosquitto", "no broker is installed", advice, ExitCode.UNAVAILABLE)
        found = "not installed; demos use iotcore, which keeps nothing over a restart"
        return _warning("mosquitto", found, advice)
    try:
        version = mosquitto_version(binary)
        check_mosquitto_version(tuple(int(part) for part in version.split(".")))
    except SplitfleetError as exc:
        return _problem("mosquitto", f"{binary}: {exc}", advice, ExitCode.UNAVAILABLE)
    return _ok("mosquitto", f"{version}, {binary}")


def check_disk(directory: Path) -> Finding:
    """There is room for checkpoints where the run is written."""
    place = _nearest_existing(directory)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free at {place.resolve()}"
    if not os.access(place, os.W_OK):
        advice = "choose another `out`, or change the directory's owner"
        return _problem("disk", f"{place.resolve()} is not writable", advice, ExitCode.CONFIG)
    if free < LEAST_FREE_BYTES:
        return _problem("disk", found, "make room, or choose another `out`", ExitCode.FAILED)
    if free < GOOD_FREE_BYTES:
        return _warning("disk", found, "checkpoints of a large network need more")
    return _ok("disk", found)


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def _examine_run(settings: RunSettings, source: str) -> list[Finding]:
    data, shape = _check_test_data(settings, source)
    network, split = _check_network(settings, shape, source)
    return [
        *data,
        *network,
        *_check_broker(settings, split),
        _check_store(settings, source),
        check_disk(settings.directory),
    ]


def _check_test_data(
    settings: RunSettings, source: str
) -> tuple[list[Finding], tuple[tuple[int, ...] | None, int | None]]:
    """The test data, and what is known of samples: shape and number of classes."""
    shape, classes = settings.network.input_shape, settings.network.classes
    if settings.test_data is None:
        found = "none: the accuracy will not be measured"
        return [_warning("test data", found, "name some under `test_data`")], (shape, classes)
    from edge_agent.datasets import load_data  # noqa: PLC0415

    try:
        data = load_data(settings.test_data, source=source, field="$.test_data")
    except ConfigError as exc:
        finding = _problem("test data", str(exc), "correct the file's `test_data`", ExitCode.CONFIG)
        return [finding], (shape, classes)
    found = f"{len(data):,} samples of shape {data.sample_shape}, {data.classes} classes"
    return [_ok("test data", found)], (shape or data.sample_shape, classes or data.classes)


def _check_network(
    settings: RunSettings, known: tuple[tuple[int, ...] | None, int | None], source: str
) -> tuple[list[Finding], SplitNetwork | None]:
    shape, classes = known
    if shape is None or classes is None:
        found = "not checked: its input is known once the first device has come"
        return [_ok("network", found)], None
    try:
        from coordinator.model import build_split  # noqa: PLC0415

        split = build_split(settings, input_shape=shape, classes=classes, source=source)
    except (SplitfleetError, ImportError) as exc:
        advice = "coordinator export --list-cuts shows the possible cut layers"
        return [_problem("network", str(exc), advice, ExitCode.DATA)], None
    activation = " x ".join(map(str, split.activation_shape))
    found = f"{split.network} cut at {split.cut_layer}: activations of {activation} a sample"
    return [_ok("network", found)], split


def largest_message_bytes(split: SplitNetwork, global_batch: int) -> int:
    """At most this much is in one message: the client's weights, or a whole batch in fp32."""
    weights = sum(4 * parameter.numel() for parameter in split.client.parameters())
    batch = global_batch * (4 * math.prod(split.activation_shape) + 8)
    return max(weights, batch) + MESSAGE_HEADROOM_BYTES


def _check_broker(settings: RunSettings, split: SplitNetwork | None) -> list[Finding]:
    where = f"{settings.mqtt.host}:{settings.mqtt.port}"
    try:
        limit = ask_broker(settings)
    except ConfigError as exc:
        return [_problem("broker", str(exc), "correct the file's `mqtt`", ExitCode.CONFIG)]
    except TransportError as exc:
        advice = "start it, or correct the file's `mqtt`; coordinator broker-config makes one"
        return [_problem("broker", f"{where}: {exc}", advice, ExitCode.UNAVAILABLE)]
    return [_ok("broker", f"{where} answers"), _check_limit(limit, settings, split)]


def _check_limit(limit: int, settings: RunSettings, split: SplitNetwork | None) -> Finding:
    """Messages fit through the broker, and our own limit."""
    found = f"messages of up to {limit:,} bytes"
    advice = "raise max_packet_size in mosquitto.conf and `mqtt.max_payload_bytes`"
    if split is not None:
        needed = largest_message_bytes(split, settings.global_batch)
        found += f"; this run's are at most {needed:,}"
        if needed > limit:
            return _problem("message size", found, advice, ExitCode.CONFIG)
    elif limit < settings.mqtt.max_payload_bytes // 2:
        return _warning("message size", found, advice)
    return _ok("message size", found)


def ask_broker(settings: RunSettings) -> int:
    """Connect beside a coordinator that may be running; returns the largest payload in bytes.

    Raises TransportError if the broker does not answer or refuses, ConfigError for settings.
    """
    from wire.brief_connection import brief_connection  # noqa: PLC0415
    from wire.topics import build_client_id  # noqa: PLC0415

    attempt = brief_connection(
        msgspec.structs.replace(settings.mqtt, session_expiry_s=0),
        client_id=build_client_id(settings.fleet, purpose="doctor"),
        fleet=settings.fleet,
        timeout_s=BROKER_TIMEOUT_S,
    )
    with _silent("wire.mqtt"), attempt as (connection, _):
        return connection.max_payload_bytes


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from saying what the finding says."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_store(settings: RunSettings, source: str) -> Finding:
    from coordinator.store import masked_url, open_store  # noqa: PLC0415

    url = settings.state_url
    where = masked_url(url)
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return _ok("state store", f"{where} is made when the run starts")
    try:
        store = open_store(url, create=False, source=source)
        try:
            devices = len(store.keys(f"run/{settings.run}/device/"))
        finally:
            store.close()
    except ConfigError as exc:
        return _problem("state store", str(exc), "correct the file's `state`", ExitCode.CONFIG)
    except TransportError as exc:
        advice = "start Redis, or correct the file's `state`"
        return _problem("state store", str(exc), advice, ExitCode.UNAVAILABLE)
    return _ok("state store", f"{where} answers; it knows {devices} devices of run {settings.run}")


def _ok(check: str, found: str) -> Finding:
    return Finding(check=check, level=Level.OK, found=found)


def _warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, level=Level.WARNING, found=found, advice=advice)


def _problem(check: str, found: str, advice: str, code: ExitCode) -> Finding:
    return Finding(check=check, level=Level.PROBLEM, found=found, advice=advice, code=code)
