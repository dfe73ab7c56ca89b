"""The commands that look at a run or a machine, and export: what they show, how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator import health
from coordinator.broker_config import LabBroker, lab_acl, lab_mosquitto_config
from coordinator.cli.status import Liveness, liveness
from coordinator.health import Level, satisfies
from coordinator.journal import DeviceRecord, Journal, PhaseDelay, RunRecord
from coordinator.store import open_store, put_records
from tests.brokers import configured_mosquitto
from tests.commands import Ended, RunCommand
from wire.bundle import Bundle
from wire.exit_codes import ExitCode

COMMANDS = ("devices", "status", "simulate", "export", "broker-config", "doctor")


def run_record(**changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run": "lab-1",
        "fleet": "lab",
        "attempt": 2,
        "phase": "activations",
        "epoch": 1,
        "epochs": 10,
        "step": 230,
        "version": 228,
        "loss": 0.1234,
        "test_accuracy": 0.912,
        "steps_per_s": 45.3,
        "waited_for": ("gw-2",),
        "bundle": "f" * 64,
    }
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


DEVICES = [
    DeviceRecord(
        device="gw-1",
        online=True,
        ready=True,
        samples=1200,
        samples_trained=2400,
        fixed_s=0.012,
        per_sample_s=0.0005,
        contribution_s=0.020,
        forward=PhaseDelay(fixed_s=0.01, per_sample_s=0.0003, observations=212, changes=1),
        backward=PhaseDelay(fixed_s=0.002, per_sample_s=0.0002, observations=210),
        bytes_up=1_500_000,
        bytes_down=250_000,
        refused={"late": 3, "shape": 1},
        missed_deadlines=2,
        backends=("onnxruntime",),
    ),
    DeviceRecord(device="gw-2", online=True, ready=False, backends=("\x1btorch",)),
    DeviceRecord(device="gw-3", online=False, ready=False),
    DeviceRecord(
        device="gw-4", online=True, ready=False, problem="refused the bundle: \x1b[31mno room"
    ),
]


@pytest.fixture
def write_state(tmp_path: Path) -> Callable[..., str]:
    """Write a run into a store as its coordinator does; returns the store's URL."""
    url = f"sqlite:///{tmp_path}/state.sqlite"

    def write(record: RunRecord | None = None, devices: list[DeviceRecord] = DEVICES) -> str:
        record = record or run_record()
        journal = Journal(open_store(url), record.run, tmp_path, keep=1)
        journal.write_state(record, devices)
        journal.close()
        return url

    return write


def write_config(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text)
    return path


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_names_the_command(
    run_coordinator: RunCommand, command: str
) -> None:
    ended = run_coordinator(command, "--help")
    assert ended.code == 0
    assert f"Example: coordinator {command}" in " ".join(ended.out.split())


def test_help_brings_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from coordinator.cli.app import app\n"
        f"for command in {COMMANDS!r}:\n"
        "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "print({'torch', 'matplotlib', 'onnxruntime'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


# devices


def test_devices_are_shown_with_state_samples_delay_bytes_and_refusals(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    ended = run_coordinator("devices", "--state", write_state())
    assert ended.code == 0
    rows = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("gw-")}
    for part in (
        "ready",
        "1,200",
        "2,400",
        "12.0 ms + 500 us",
        " 212 ",
        "1.50 MB",
        "250 kB",
        "late 3",
    ):
        assert part in rows["gw-1"]
    assert "preparing" in rows["gw-2"]
    assert "offline" in rows["gw-3"]
    assert "refused" in rows["gw-4"]
    assert "4 devices: 3 online, 1 ready" in ended.out
    assert "backward pass: 1 on onnxruntime, 1 on torch" in ended.out


def test_a_devices_words_cannot_command_the_terminal(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    assert "\x1b" not in run_coordinator("devices", "--state", write_state()).out


def test_devices_as_json_are_complete(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    shown = json.loads(run_coordinator("devices", "--state", write_state(), "--json").out)
    assert [device["device"] for device in shown] == ["gw-1", "gw-2", "gw-3", "gw-4"]
    assert msgspec.convert(shown, list[DeviceRecord]) == DEVICES


def test_a_run_without_devices_says_so(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    ended = run_coordinator("devices", "--state", write_state(None, []))
    assert ended.out == "run lab-1: no device has reported yet\n"


def test_store_and_run_come_from_the_runs_file(
    run_coordinator: RunCommand, write_state: Callable[..., str], tmp_path: Path
) -> None:
    write_state()
    write_state(run_record(run="other"), [])
    config = write_config(tmp_path, f"run: lab-1\nout: {tmp_path}\n")
    assert "gw-1" in run_coordinator("devices", "-c", config).out
    assert "no device" in run_coordinator("devices", "-c", config, "--run", "other").out


# Which run


def test_without_a_store_the_command_line_is_wrong(run_coordinator: RunCommand) -> None:
    ended = run_coordinator("devices")
    assert ended.code == ExitCode.USAGE
    assert "-c FILE or --state URL" in ended.err


def test_a_missing_store_is_an_error_and_stays_missing(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    config = write_config(tmp_path, f"out: {tmp_path}/nothing\n")
    ended = run_coordinator("status", "-c", config)
    assert ended.code == ExitCode.CONFIG
    assert ended.err.startswith(f"error: {config}: $.state: ")
    assert "does not exist" in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_an_unknown_run_is_an_error_that_names_those_there_are(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    ended = run_coordinator("status", "--state", write_state(), "--run", "lab-2")
    assert ended.code == ExitCode.CONFIG
    assert "expected run 'lab-2'" in ended.err
    assert "found lab-1" in ended.err


def test_of_several_runs_one_has_to_be_named(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    write_state()
    ended = run_coordinator("status", "--state", write_state(run_record(run="lab-2")))
    assert ended.code == ExitCode.CONFIG
    assert "--run: expected one of the runs" in ended.err
    assert "lab-1, lab-2" in ended.err


def test_a_store_that_does_not_answer_has_its_own_code(
    run_coordinator: RunCommand, free_port: int
) -> None:
    ended = run_coordinator("devices", "--state", f"redis://:secret@127.0.0.1:{free_port}/0")
    assert ended.code == ExitCode.UNAVAILABLE
    assert "secret" not in ended.err


def test_a_damaged_record_is_named(run_coordinator: RunCommand, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.sqlite"
    store = open_store(url)
    put_records(store, {"run/lab-1": DEVICES[0]})
    store.close()
    ended = run_coordinator("status", "--state", url)
    assert ended.code == ExitCode.DATA
    assert "record 'run/lab-1': expected a RunRecord" in ended.err


# status


def test_status_shows_where_a_run_is(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    ended = run_coordinator("status", "--state", write_state())
    assert ended.code == 0
    facts = dict(line.rstrip().split("  ", 1) for line in ended.out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["run"] == "lab-1 (fleet lab, attempt 2)"
    assert facts["state"].startswith("running, waits for activations")
    assert facts["epoch"] == "2 of 10"
    assert facts["step"] == "230 (228 applied)"
    assert facts["loss"] == "0.1234"
    assert facts["test accuracy"] == "91.2 %"
    assert facts["speed"] == "45.3 steps/s"
    assert facts["waits for"] == "gw-2"
    assert facts["devices"] == "4 devices: 3 online, 1 ready"


def age_record(url: str, seconds: float) -> None:
    store = open_store(url)
    old = run_record(updated_s=time.time() - seconds)
    put_records(store, {"run/lab-1": old})
    store.close()


def test_a_coordinator_that_has_gone_is_told_from_one_that_runs(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    url = write_state()
    age_record(url, 42)
    ended = run_coordinator("status", "--state", url)
    assert ended.code == ExitCode.FAILED
    assert "NO SIGN OF LIFE for 42." in ended.out
    shown = json.loads(run_coordinator("status", "--state", url, "--json").out)
    assert shown["state"] == "gone"
    assert 42 <= shown["age_s"] < 60


def test_a_run_that_said_goodbye_is_finished_or_stopped(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    url = write_state(run_record(online=False, epoch=10))
    ended = run_coordinator("status", "--state", url)
    assert (ended.code, "finished" in ended.out) == (0, True)
    write_state(run_record(online=False, epoch=3))
    ended = run_coordinator("status", "--state", url)
    assert (ended.code, "train --resume goes on" in ended.out) == (0, True)


def test_a_clock_that_is_behind_does_not_make_a_run_old() -> None:
    assert liveness(run_record(updated_s=1000.0), 990.0) is Liveness.RUNNING
    assert liveness(run_record(updated_s=1000.0), 1005.1) is Liveness.GONE


def test_status_as_json_counts_devices(
    run_coordinator: RunCommand, write_state: Callable[..., str]
) -> None:
    shown = json.loads(run_coordinator("status", "--state", write_state(), "--json").out)
    assert shown["state"] == "running"
    assert shown["devices"] == {"known": 4, "online": 3, "ready": 1}
    assert (shown["step"], shown["waited_for"]) == (230, ["gw-2"])


@pytest.mark.processes
def test_a_watch_follows_the_run_until_it_is_interrupted(write_state: Callable[..., str]) -> None:
    url = write_state()
    command = "import coordinator.cli.app as app; app.main()"
    watch = ["status", "--state", url, "--watch", "--json", "--interval", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *watch],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["step"] == 230
        write_state(run_record(step=231))
        while json.loads(process.stdout.readline())["step"] != 231:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


# export


def test_an_exported_bundle_is_what_is_reported(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    out, files = tmp_path / "new" / "c.bundle", tmp_path / "files"
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3", "--json"),
        *("--name", "press", "--version", "7", "--out", out, "--unpack", files),
    )
    assert ended.code == 0, ended.err
    bundle = Bundle.from_bytes(out.read_bytes())
    shown = json.loads(ended.out)
    assert shown["digest"] == bundle.digest
    assert shown["size_bytes"] == out.stat().st_size
    assert (shown["manifest"]["name"], shown["manifest"]["version"]) == ("press", "7")
    assert bundle.manifest.input.shape == (8,)
    assert {path.name for path in files.iterdir()} == {"manifest.json", *bundle.files}
    for name, data in bundle.files.items():
        assert (files / name).read_bytes() == data


def test_an_export_from_a_runs_file_takes_shapes_from_its_test_data(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    np.savez(tmp_path / "test.npz", x=np.zeros((6, 8), np.float32), y=np.arange(6) % 3)
    text = f"run: press\nnetwork: {{name: mlp}}\ntest_data: {{npz: {{path: {tmp_path}/test.npz}}}}"
    config = write_config(tmp_path, text)
    ended = run_coordinator("export", "-c", config, "--frozen", "--out", tmp_path / "c.bundle")
    assert ended.code == 0, ended.err
    manifest = Bundle.from_bytes((tmp_path / "c.bundle").read_bytes()).manifest
    assert (manifest.name, manifest.input.shape, manifest.classes) == ("press", (8,), 3)
    assert manifest.frozen
    for part in ("press version 1", manifest.cut_layer, "client_forward.onnx", "onnx-forward"):
        assert part in ended.out


def test_possible_cuts_are_listed_with_their_activations(run_coordinator: RunCommand) -> None:
    arguments = ("export", "--network", "cnn2d", "--input-shape", "1,8,8", "--classes", "3")
    cuts = json.loads(run_coordinator(*arguments, "--list-cuts", "--json").out)
    assert sum(cut["default"] for cut in cuts) == 1
    table = run_coordinator(*arguments, "--list-cuts").out
    for cut in cuts:
        assert cut["layer"] in table
        assert " x ".join(map(str, cut["activation_shape"])) in table


def test_an_export_without_a_shape_says_what_is_missing(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator("export", "--network", "mlp", "--classes", "3", "--out", tmp_path / "c")
    assert ended.code == ExitCode.CONFIG
    assert "$.network.input_shape: expected a value (or test_data, or --input-shape)" in ended.err


def test_a_layer_that_cannot_be_cut_is_refused_with_those_that_can(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3"),
        *("--cut", "nowhere", "--out", tmp_path / "c"),
    )
    assert ended.code == ExitCode.DATA
    assert "cut layer nowhere" in ended.err
    assert "possible cut layers" in ended.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--network", "mlp", "--input-shape", "8", "--classes", "3"),
        ("--network", "mlp", "--input-shape", "8,x", "--classes", "3", "--out", "c"),
        ("--network", "mlp", "--input-shape", "0", "--classes", "3", "--out", "c"),
    ],
)
def test_a_wrong_export_command_line_has_the_usage_code(
    run_coordinator: RunCommand, arguments: tuple[str, ...]
) -> None:
    assert run_coordinator("export", *arguments).code == ExitCode.USAGE


def test_an_export_that_cannot_be_written_names_the_file(
    run_coordinator: RunCommand, tmp_path: Path
) -> None:
    ended = run_coordinator(
        *("export", "--network", "mlp", "--input-shape", "8", "--classes", "3"),
        *("--out", tmp_path),
    )
    assert ended.code == ExitCode.CONFIG
    assert f"{tmp_path}: --out: expected a writable file" in ended.err


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
    config = write_config(tmp_path, "fleet: plant\n")
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
    return write_config(directory, text + more)


def checks_of(ended: Ended) -> dict[str, dict[str, object]]:
    document = json.loads(ended.out)
    assert document["ok"] == (ended.code == 0)
    return {check["check"]: check for check in document["checks"]}


@pytest.mark.broker
def test_a_sound_machine_and_run_pass(
    run_coordinator: RunCommand,
    tmp_path: Path,
    shared_mosquitto: object,
    write_state: Callable[..., str],
) -> None:
    write_state()
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
    ended = run_coordinator("doctor", "-c", write_config(tmp_path, "epochs: many\n"), "--json")
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
    checks = checks_of(run_coordinator("doctor", "-c", write_config(tmp_path, text), "--json"))
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
