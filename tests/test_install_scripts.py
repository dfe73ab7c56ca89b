"""The installers on scratch images: real environments, options, and what is refused.

Never on this machine: every call works on an image of the test's own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.config import load_agent_settings
from tests.installers import LIB, ROOT, copy_of, mode_of, script, snapshot
from tests.wheelhouse import build_own_wheel, build_wheelhouse


def version_in(image: Path) -> str:
    python = image / "opt/splitfleet/agent/bin/python"
    command = [python, "-I", "-c", "import importlib.metadata as m; print(m.version('splitfleet'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheelhouse(tmp_path_factory.mktemp("wheels") / "house", "agent")


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with version 0.1.0 and the device gw-07; not to be changed by tests."""
    image = tmp_path_factory.mktemp("installed") / "image"
    image.mkdir()
    result = install(image, wheels, "0.1.0", "gw-07")
    assert result.returncode == 0, result.stderr
    return image


def install(
    image: Path, wheels: Path, version: str, *options: str
) -> subprocess.CompletedProcess[str]:
    wheel = wheels / f"splitfleet-{version}-py3-none-any.whl"
    if not wheel.exists():
        build_own_wheel(wheels, version)
    offline = ("--wheels", wheels, "--wheel", wheel, "--python", sys.executable)
    return script("agent", image, *offline, *options)


# Real environments


def test_environment_runs_and_knows_only_its_place_in_the_image(installed: Path) -> None:
    slot = installed / "opt/splitfleet/agent-a"
    assert (installed / "opt/splitfleet/agent").readlink() == Path("agent-a")
    assert version_in(installed) == "0.1.0"
    command = (slot / "bin/edge-agent").read_text()
    assert command.startswith("#!/opt/splitfleet/agent-a/bin/python")
    for file in [slot / "pyvenv.cfg", *(slot / "bin").iterdir()]:
        if not file.is_symlink():
            assert str(installed) not in file.read_text(errors="replace"), file
    assert not list(slot.glob("lib/python3*/site-packages/torch"))


def test_device_has_unit_settings_and_a_folder_for_secrets(installed: Path) -> None:
    units = installed / "etc/systemd/system"
    unit = units / "edge-agent@.service"
    assert unit.read_text() == (ROOT / "systemd/edge-agent@.service").read_text()
    wants = units / "multi-user.target.wants/edge-agent@gw-07.service"
    assert wants.readlink() == Path("/etc/systemd/system/edge-agent@.service")
    settings = load_agent_settings(str(installed / "etc/splitfleet/agents/gw-07.yaml"))
    assert (settings.device, settings.mqtt.username) == ("gw-07", "gw-07")
    assert str(settings.state_directory) == "/var/lib/splitfleet/agents/gw-07"
    assert mode_of(installed / "etc/splitfleet/agents/gw-07.yaml") == 0o644
    assert mode_of(installed / "etc/splitfleet/credentials/agents/gw-07") == 0o700
    command = installed / "usr/local/bin/edge-agent"
    assert command.readlink() == Path("/opt/splitfleet/agent/bin/edge-agent")


def test_second_run_changes_nothing(installed: Path, wheels: Path) -> None:
    before = snapshot(installed)
    result = install(installed, wheels, "0.1.0", "gw-07")
    assert result.returncode == 0, result.stderr
    assert "splitfleet[agent] 0.1.0 in /opt/splitfleet/agent is up to date" in result.stdout
    assert snapshot(installed) == before


def test_upgrade_keeps_settings_secrets_and_state_and_the_way_back(
    installed: Path, wheels: Path, tmp_path: Path
) -> None:
    image = copy_of(installed, tmp_path / "image")
    kept = {
        "etc/splitfleet/agents/gw-07.yaml": (
            "device: gw-07\ndata: {npz: {path: /srv/x.npz}, classes: 3}\n"
        ),
        "etc/splitfleet/credentials/agents/gw-07/mqtt-password": "geheim",
        "var/lib/private/splitfleet/agents/gw-07/boot": "41",
    }
    for name, text in kept.items():
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).unlink(missing_ok=True)
        (image / name).write_text(text)
    result = install(image, wheels, "0.2.0")
    assert result.returncode == 0, result.stderr
    assert {name: (image / name).read_text() for name in kept} == kept
    assert version_in(image) == "0.2.0"
    assert script("agent", image, "--rollback").returncode == 0
    assert version_in(image) == "0.1.0"


def test_package_that_cannot_be_installed_leaves_the_version_in_use(
    installed: Path, wheels: Path, tmp_path: Path
) -> None:
    image = copy_of(installed, tmp_path / "image")
    broken = tmp_path / "splitfleet-0.3.0-py3-none-any.whl"
    broken.write_text("not a wheel")
    result = script(
        "agent", image, "--wheels", wheels, "--wheel", broken, "--python", sys.executable
    )
    assert result.returncode == 1
    assert "pip could not install" in result.stderr
    assert version_in(image) == "0.1.0"
    assert "no earlier environment" in script("agent", image, "--rollback").stderr


# What is asked for


def test_dry_run_says_all_and_changes_nothing(tmp_path: Path) -> None:
    result = script("agent", tmp_path, "--dry-run", "--with-torch", "gw-01")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    assert all(line.startswith("would ") for line in result.stdout.splitlines())
    for action in (
        "build splitfleet[agent-torch]",
        "link /opt/splitfleet/agent to agent-a",
        "write /etc/systemd/system/edge-agent@.service\n",
        "write /etc/systemd/system/edge-agent@.service.d/torch.conf",
        "write /etc/splitfleet/agents/gw-01.yaml",
        "make /etc/splitfleet/credentials/agents/gw-01",
        "enable edge-agent@gw-01.service",
    ):
        assert f"would {action}" in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["--with-torch=3"], "unknown option --with-torch=3"),
        (["--root"], "--root: expected a value"),
        (["--root", "/no/such/place"], "--root: expected a folder, found none at /no/such/place"),
        (["--wheels=/no/such/place"], "--wheels: expected a folder"),
        (["--wheel", "/no/such.whl"], "--wheel: expected a readable file"),
        (["--purge"], "--purge goes with --uninstall"),
        (["a/b"], "a/b: expected 1 to 64 letters"),
        (["gw@01"], "gw@01: expected 1 to 64 letters"),
        (["--config", "/etc/passwd"], "--config and --credential go with one device"),
        (["--config", "/etc/passwd", "a", "b"], "--config and --credential go with one device"),
        (["--credential", "key", "gw-01"], "--credential key: expected NAME=FILE"),
        (["--credential", "key=/no/such", "gw-01"], "expected NAME=FILE with a readable file"),
        (["--credential", "../key=/etc/passwd", "gw-01"], "expected NAME=FILE"),
    ],
)
def test_wrong_option_is_named_and_nothing_happens(
    tmp_path: Path, options: list[str], expected: str
) -> None:
    result = script("agent", tmp_path, "--dry-run", *options)
    assert result.returncode == 2
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_coordinator_takes_no_device_and_always_has_torch(tmp_path: Path) -> None:
    for option in ("gw-01", "--with-torch"):
        result = script("coordinator", tmp_path, "--dry-run", option)
        assert result.returncode == 2
        assert option in result.stderr


@pytest.mark.parametrize("component", ["agent", "coordinator"])
def test_help_shows_an_example(tmp_path: Path, component: str) -> None:
    result = script(component, tmp_path, "--help")
    assert result.returncode == 0
    assert f"sudo scripts/install-{component}" in result.stdout


def test_old_python_is_refused(tmp_path: Path) -> None:
    result = script("agent", tmp_path, "--python", "/bin/false")
    assert result.returncode == 1
    assert "--python /bin/false: expected Python 3.11 or later" in result.stderr


def test_python_that_services_cannot_see_is_refused() -> None:
    functions = (
        f"source {LIB}/venv.sh; source {LIB}/install.sh; {{ _is_new_enough() {{ true; }}; }}"
    )
    program = f"{functions}\npython_option=fake\nfind_python() {{ echo fake; }}\n"
    program += "fake() { echo /home/me/.pyenv/bin/python3.11; }\nchoose_python"
    result = subprocess.run(
        ["bash", "-c", program, "install-agent"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "/home/me/.pyenv/bin/python3.11 is hidden from services" in result.stderr


def test_without_root_it_says_so() -> None:
    """``id`` says 1000; nothing is reached that could change this machine."""
    program = f"""
        source {LIB}/venv.sh; source {LIB}/install.sh
        component=agent
        id() {{ echo 1000; }}
        set_places
        check_rights
    """
    result = subprocess.run(
        ["bash", "-c", program, "install-agent"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "root is needed: sudo scripts/install-agent" in result.stderr
