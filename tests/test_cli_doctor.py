"""``coordinator broker-config`` and ``doctor``: files for a broker, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coordinator import health
from coordinator.broker_config import LabBroker, lab_acl, lab_mosquitto_config
from coordinator.health import Level, satisfies
from tests.brokers import configured_mosquitto
from tests.commands import Ended, RunCommand, write_run_file
from tests.stored_runs import write_run
from wire.exit_codes import ExitCode

# broker-config


def test_configuration_and_rules_are_printed_one_by_one_or_together(
    run_coordinator: RunCommand,
) -> None:
    lab = LabBroker(fleet="plant", port=2883)
    conf, acl = (
        run_coordinator("broker-config", "--fleet", "plant", "--port", 2883, "--part", part).out
        for part in ("conf", "acl")
    )
    assert (conf, acl) == (lab_mosquitto_config(lab), lab_acl(lab))
    both = run_coordinator("broker-config", "--fleet", "plant", "--port", 2883).out
    assert both.index(conf) < both.index(acl)


@pytest.mark.broker
def test_written_files_are_what_a_mosquitto_takes(
    run_coordinator: RunCommand, tmp_path: Path, free_port: int
) -> None:
    (tmp_path / "users").touch(mode=0o600)
    ended = run_coordinator(
        *("broker-config", "--out", tmp_path, "--port", free_port, "--bind", "127.0.0.1"),
        *("--operator-port", 0, "--password-path", tmp_path / "users"),
        *("--acl-path", tmp_path / "splitfleet.acl", "--persistence-dir", tmp_path),
    )
    assert ended.code == 0, ended.err
    assert f"mosquitto_passwd -c {tmp_path}/users coordinator" in ended.out
    text = (tmp_path / "splitfleet.conf").read_text()
    with configured_mosquitto(text, tmp_path, free_port):
        pass  # it has answered


def test_the_fleet_comes_from_the_runs_file(run_coordinator: RunCommand, tmp_path: Path) -> None:
    config = write_run_file(tmp_path, "fleet: plant\n")
    assert "splitfleet/v1/plant/#" in run_coordinator("broker-config", "-c", config).out


def test_tls_needs_all_three_files(run_coordinator: RunCommand) -> None:
    assert run_coordinator("broker-config", "--tls-ca", "/ca.pem").code == ExitCode.USAGE
    files = ("--tls-ca", "/ca.pem", "--tls-cert", "/c.pem", "--tls-key", "/k.pem")
    assert "require_certificate true" in run_coordinator("broker-config", *files).out
    no_certificates = run_coordinator("broker-config", *files, "--no-client-certificates").out
    assert "require_certificate" not in no_certificates
    assert "certfile /c.pem" in no_certificates


def test_a_port_that_is_none_is_refused(run_coordinator: RunCommand) -> None:
    ended = run_coordinator("broker-config", "--port", 99_999)
    assert ended.code == ExitCode.CONFIG
    assert ended.err == "error: port: expected a port from 1 to 65535, got 99999\n"


# doctor


def doctor_config(directory: Path, port: int, more: str = "") -> Path:
    text = (
        f"run: lab-1\nout: {directory}\nmqtt: {{port: {port}}}\n"
        "network: {name: mlp, input_shape: [8], classes: 3}\n"
    )
    return write_run_file(directory, text + more)


def checks_of(ended: Ended) -> dict[str, dict[str, object]]:
    document = json.loads(ended.out)
    assert document["ok"] == (ended.code == 0)
    return {check["check"]: check for check in document["checks"]}


@pytest.mark.broker
def test_a_sound_machine_and_run_pass(
    run_coordinator: RunCommand,
    tmp_path: Path,
    shared_mosquitto: object,
) -> None:
    write_run(tmp_path)
    np.savez(tmp_path / "t.npz", x=np.zeros((6, 8), np.float32), y=np.arange(6) % 3)
    port = shared_mosquitto.port  # type: ignore[attr-defined]
    config = doctor_config(tmp_path, port, f"test_data: {{npz: {{path: {tmp_path}/t.npz}}}}\n")
    ended = run_coordinator("doctor", "-c", config, "--json")
    assert (ended.code, ended.err) == (0, "")
    checks = checks_of(ended)
    assert {check["level"] for check in checks.values()} <= {"ok", "warning"}
    assert "mlp cut at" in str(checks["network"]["found"])
    assert "it knows 4 devices of run lab-1" in str(checks["state store"]["found"])
    assert "torch" in str(checks["libraries"]["found"])


def test_a_broker_that_does_not_answer_is_a_problem_with_advice(
    run_coordinator: RunCommand, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "BROKER_TIMEOUT_S", 0.3)
    ended = run_coordinator("doctor", "-c", doctor_config(tmp_path, free_port))
    assert ended.code == ExitCode.UNAVAILABLE
    assert f"no broker answers at 127.0.0.1:{free_port}" in " ".join(ended.out.split())
    assert "-> start it" in ended.out
    assert ended.out.endswith("1 problem\n")
    assert ended.err == ""


@pytest.mark.broker
def test_a_broker_with_a_small_limit_is_a_problem(
    run_coordinator: RunCommand, tmp_path: Path, free_port: int
) -> None:
    conf = f"listener {free_port} 127.0.0.1\nallow_anonymous true\nmax_packet_size 20000\n"
    config = doctor_config(tmp_path, free_port, "global_batch: 4096\n")
    with configured_mosquitto(conf, tmp_path, free_port):
        ended = run_coordinator("doctor", "-c", config, "--json")
    assert ended.code == ExitCode.CONFIG
    check = checks_of(ended)["message size"]
    assert check["level"] == "PROBLEM"
    assert "max_packet_size" in str(check["advice"])


def test_settings_that_cannot_be_read_are_one_finding_among_the_others(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator("doctor", "-c", write_run_file(tmp_path, "epochs: many\n"), "--json")
    assert ended.code == ExitCode.CONFIG
    checks = checks_of(ended)
    assert "$.epochs" in str(checks["settings"]["found"])
    assert checks["python"]["level"] == "ok"


def test_every_bad_part_of_a_run_is_found_at_once(
    run_coordinator: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(health, "BROKER_TIMEOUT_S", 0.3)
    (tmp_path / "state.sqlite").write_text("this is no database, and longer than its header" * 9)
    text = (
        f"out: {tmp_path}\nmqtt: {{port: {free_port}}}\ntest_data: {{npz: {{path: no.npz}}}}\n"
        "network: {name: mlp, cut: nowhere, input_shape: [8], classes: 3}\n"
    )
    checks = checks_of(run_coordinator("doctor", "-c", write_run_file(tmp_path, text), "--json"))
    problems = {name for name, check in checks.items() if check["level"] == "PROBLEM"}
    assert problems == {"test data", "network", "broker", "state store"}


def test_missing_libraries_are_found_with_the_command_that_installs_them() -> None:
    finding = health.check_library("no-such-library-of-ours", ">=1.2")
    assert finding.level is Level.PROBLEM
    assert finding.advice == "pip install 'no-such-library-of-ours>=1.2'"
    assert health.check_library("msgspec", ">=99").found.endswith("expected >=99")
    assert health.check_library("msgspec", ">=0.1").level is Level.OK


def test_a_library_that_cannot_be_imported_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(health._MODULES, "msgspec", "no_such_module_of_ours")
    finding = health.check_library("msgspec", ">=0.1")
    assert finding.level is Level.PROBLEM
    assert "cannot be imported" in finding.found


@pytest.mark.parametrize(
    ("version", "versions", "is_inside"),
    [
        ("2.2.0", ">=2.1,<3", True),
        ("3.0", ">=2.1,<3", False),
        ("2.0.9", ">=2.1", False),
        ("2.13.0+cpu", ">=2.9", True),
        ("2.10", ">=2.9", True),
        ("3", ">=3.0", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, versions: str, is_inside: bool) -> None:
    assert satisfies(version, versions) is is_inside


def test_a_machine_without_any_broker_is_a_problem_only_where_one_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "find_mosquitto", lambda: None)
    monkeypatch.setattr(health.importlib.util, "find_spec", lambda name: None)
    assert health.check_mosquitto(is_needed=True).level is Level.PROBLEM
    assert health.check_mosquitto(is_needed=False).level is Level.OK


def test_little_disk_space_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_free(count: int) -> Level:
        usage = (10**12, 0, count)
        disk_usage = lambda path: health.shutil._ntuple_diskusage(*usage)  # noqa: E731
        monkeypatch.setattr(health.shutil, "disk_usage", disk_usage)
        return health.check_disk(tmp_path / "not" / "yet" / "there").level

    assert [with_free(10**10), with_free(5 * 10**8), with_free(10**6)] == [
        Level.OK,
        Level.WARNING,
        Level.PROBLEM,
    ]
