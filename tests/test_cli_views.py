"""The commands that look at a run: what they show, how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from coordinator.cli.status import Liveness, liveness
from coordinator.journal import DeviceRecord
from coordinator.store import open_store, put_records
from tests.commands import RunCommand, write_run_file
from tests.stored_runs import DEVICES, run_record, write_run
from wire.exit_codes import ExitCode

COMMANDS = ("devices", "status", "simulate", "export", "broker-config", "doctor")


@pytest.fixture
def write_state(tmp_path: Path) -> Callable[..., str]:
    """Write a run into a store; returns the store's URL."""
    return partial(write_run, tmp_path)


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
    config = write_run_file(tmp_path, f"run: lab-1\nout: {tmp_path}\n")
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
    config = write_run_file(tmp_path, f"out: {tmp_path}/nothing\n")
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
