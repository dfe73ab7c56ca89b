"""The systemd units against the exit codes they rely on, and the check that guards them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from wire.credentials import DIRECTORY_ID
from wire.exit_codes import ExitCode

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "systemd").glob("*.service"))
TORCH = ROOT / "systemd" / "edge-agent@.service.d" / "torch.conf"
VERIFY = ROOT / "scripts" / "lib" / "verify_units.sh"

NO_USE_TO_RESTART = {
    "coordinator.service": {ExitCode.USAGE, ExitCode.DATA, ExitCode.TAKEN_OVER, ExitCode.CONFIG},
    "edge-agent@.service": {ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG},
}


def settings_of(unit: Path) -> dict[str, list[tuple[str, str]]]:
    """Sections of a unit file with their assignments, in order."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            sections[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            sections[list(sections)[-1]].append((key, value))
    return sections


def value_of(unit: Path, section: str, key: str) -> str:
    values = [value for name, value in settings_of(unit)[section] if name == key]
    assert len(values) == 1, f"{unit.name}: {key} in [{section}]: {values}"
    return values[0]


def verify(*units: Path, threshold: int = 15) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VERIFY, *units],
        env={**os.environ, "EXPOSURE_THRESHOLD": str(threshold)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_both_units_are_there() -> None:
    assert [unit.name for unit in UNITS] == ["coordinator.service", "edge-agent@.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_restart_is_left_out_for_exactly_the_codes_it_cannot_help(unit: Path) -> None:
    codes = {int(code) for code in value_of(unit, "Service", "RestartPreventExitStatus").split()}
    assert codes == {int(code) for code in NO_USE_TO_RESTART[unit.name]}
    assert value_of(unit, "Service", "Restart") == "on-failure"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_no_start_limit_gives_up_on_a_long_outage(unit: Path) -> None:
    assert value_of(unit, "Unit", "StartLimitIntervalSec") == "0"
    assert float(value_of(unit, "Service", "RestartSec")) >= 5


def test_secrets_come_from_a_folder_that_only_root_reads() -> None:
    assert [value_of(unit, "Service", "LoadCredential") for unit in UNITS] == [
        f"{DIRECTORY_ID}:/etc/splitfleet/credentials/coordinator",
        f"{DIRECTORY_ID}:/etc/splitfleet/credentials/agents/%i",
    ]


@pytest.mark.parametrize("unit", [UNITS[1], TORCH], ids=lambda unit: unit.name)
def test_agent_leaves_a_board_with_1_gb_room_to_live(unit: Path) -> None:
    high = int(value_of(unit, "Service", "MemoryHigh").removesuffix("M"))
    most = int(value_of(unit, "Service", "MemoryMax").removesuffix("M"))
    assert high < most <= 704


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_service_reports_its_progress(unit: Path) -> None:
    assert value_of(unit, "Service", "Type") == "notify"
    assert float(value_of(unit, "Service", "WatchdogSec")) >= 30


def test_writable_code_is_denied_only_where_torch_does_not_run() -> None:
    coordinator, agent = (dict(settings_of(unit)["Service"]) for unit in UNITS)
    torch = dict(settings_of(TORCH)["Service"])
    assert "MemoryDenyWriteExecute" not in coordinator
    assert agent["MemoryDenyWriteExecute"] == "yes"
    assert torch["MemoryDenyWriteExecute"] == "no"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_nothing_forbids_setting_thread_affinity(unit: Path) -> None:
    service = settings_of(unit)["Service"]
    denied = [value for key, value in service if key == "SystemCallFilter" and value[0] == "~"]
    assert not any("@resources" in value for value in denied)


def test_units_pass_the_check() -> None:
    result = verify(*UNITS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "coordinator.service",
        "coordinator.service+serve.conf",
        "edge-agent@.service",
        "edge-agent@.service+torch.conf",
    ]


def test_check_fails_on_a_drop_in_that_opens_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNITS[0].name
    unit.write_text(UNITS[0].read_text())
    (tmp_path / f"{unit.name}.d").mkdir()
    (tmp_path / f"{unit.name}.d" / "open.conf").write_text("[Service]\nSystemCallFilter=\n")
    result = verify(unit)
    assert result.returncode == 1
    assert "coordinator.service+open.conf is exposed above" in result.stderr


def test_check_fails_on_a_setting_that_systemd_does_not_know(tmp_path: Path) -> None:
    """systemd-analyze itself exits 0 there."""
    unit = tmp_path / "typo.service"
    unit.write_text(UNITS[0].read_text().replace("WatchdogSec=", "WatchDogSeconds="))
    result = verify(unit)
    assert result.returncode == 1
    assert "WatchDogSeconds" in result.stderr


def test_check_fails_on_a_unit_that_is_too_exposed(tmp_path: Path) -> None:
    unit = tmp_path / "open.service"
    unit.write_text("[Service]\nExecStart=/opt/splitfleet/coordinator/bin/coordinator train\n")
    result = verify(unit)
    assert result.returncode == 1
    assert "exposed above 15 tenths" in result.stderr
