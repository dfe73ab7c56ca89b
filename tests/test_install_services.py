"""What the installers do to settings, secrets, units and services, on scratch images.

The environment is a stand-in that runs this checkout; so is systemctl, which writes down what it is
told.
"""

from __future__ import annotations

import stat
from pathlib import Path

from coordinator.config import RunSettings
from tests.installers import ROOT, mode_of, snapshot, stand_in
from wire.settings import load_settings

# Settings and secrets


def test_given_settings_and_secrets_are_put_in_place(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    mine, other, secret = tmp_path / "mine.yaml", tmp_path / "other.yaml", tmp_path / "secret"
    mine.write_text("device: gw-01\ndata: {npz: {path: /srv/a.npz}, classes: 2}\n")
    other.write_text(mine.read_text().replace("a.npz", "b.npz"))
    secret.write_text("geheim")
    credential = f"--credential=mqtt-password={secret}"
    for given in (mine, other, other):
        result = stand_in("agent", image, "--config", str(given), credential, "gw-01")
        assert result.returncode == 0, result.stderr
    settings = image / "etc/splitfleet/agents"
    assert (settings / "gw-01.yaml").read_text() == other.read_text()
    assert (settings / "gw-01.yaml.previous").read_text() == mine.read_text()
    stored = image / "etc/splitfleet/credentials/agents/gw-01/mqtt-password"
    assert (stored.read_text(), mode_of(stored)) == ("geheim", 0o600)
    assert mode_of(image / "etc/splitfleet/credentials") == 0o700


def test_settings_that_a_version_refuses_keep_the_one_in_use(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01").returncode == 0
    settings = tmp_path / "etc/splitfleet/agents/gw-01.yaml"
    settings.write_text(settings.read_text() + "bogus: 1\n")
    result = stand_in("agent", tmp_path, STAMP="2")
    assert result.returncode == 1
    assert "gw-01.yaml: $: Object contains unknown field `bogus`" in result.stderr
    assert "does not fit that version; the one in use stays" in result.stderr
    assert (tmp_path / "opt/splitfleet/agent").readlink() == Path("agent-a")


def test_given_settings_that_are_wrong_replace_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    given = tmp_path / "gw-01.yaml"
    given.write_text("device: gw-01\ndata: {npz: {path: /srv/a.npz}, classes: 2}\n")
    assert stand_in("agent", image, "--config", str(given), "gw-01").returncode == 0
    right = given.read_text()
    given.write_text(right + "bogus: 1\n")
    result = stand_in("agent", image, "--config", str(given), "gw-01")
    assert result.returncode == 1
    assert f"{given}: $: Object contains unknown field `bogus`" in result.stderr
    assert (image / "etc/splitfleet/agents/gw-01.yaml").read_text() == right


def test_secrets_copied_in_by_hand_are_closed_on_the_next_run(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01").returncode == 0
    secret = tmp_path / "etc/splitfleet/credentials/agents/gw-01/tls.key"
    secret.write_text("key")
    secret.chmod(0o644)
    assert stand_in("agent", tmp_path, "gw-01").returncode == 0
    assert mode_of(secret) == 0o600


def test_torch_brings_its_drop_in_and_takes_it_away(tmp_path: Path) -> None:
    drop_in = tmp_path / "etc/systemd/system/edge-agent@.service.d/torch.conf"
    assert stand_in("agent", tmp_path, "--with-torch").returncode == 0
    assert "MemoryDenyWriteExecute=no" in drop_in.read_text()
    assert stand_in("agent", tmp_path, STAMP="2").returncode == 0
    assert drop_in.exists(), "an upgrade keeps what was chosen"
    assert stand_in("agent", tmp_path, "--without-torch", STAMP="3").returncode == 0
    assert not drop_in.exists()
    assert stand_in("agent", tmp_path, "--rollback").returncode == 0
    assert drop_in.exists(), "the version before had torch"


def test_coordinator_gets_settings_that_load_and_its_unit(tmp_path: Path) -> None:
    for _ in range(2):
        result = stand_in("coordinator", tmp_path)
        assert result.returncode == 0, result.stderr
    assert load_settings(tmp_path / "etc/splitfleet/coordinator.yaml", RunSettings)
    unit = tmp_path / "etc/systemd/system/coordinator.service"
    assert unit.read_text() == (ROOT / "systemd/coordinator.service").read_text()
    assert mode_of(tmp_path / "etc/splitfleet/credentials/coordinator") == 0o700
    assert (
        tmp_path / "etc/systemd/system/multi-user.target.wants/coordinator.service"
    ).is_symlink()


# Away


def fill_state(image: Path, *places: str) -> None:
    for place in places:
        folder = image / "var/lib/private/splitfleet" / place
        folder.mkdir(parents=True)
        (folder / "boot").write_text("7")


def test_uninstall_keeps_settings_secrets_and_state(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01").returncode == 0
    fill_state(tmp_path, "agents/gw-01")
    for _ in range(2):
        result = stand_in("agent", tmp_path, "--uninstall")
        assert result.returncode == 0, result.stderr
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()}
    assert left == {
        "etc/splitfleet/agents/gw-01.yaml",
        "var/lib/private/splitfleet/agents/gw-01/boot",
    }


def test_purge_removes_the_agents_and_nothing_of_the_coordinators(tmp_path: Path) -> None:
    assert stand_in("coordinator", tmp_path).returncode == 0
    fill_state(tmp_path, "coordinator")
    before = snapshot(tmp_path)
    assert stand_in("agent", tmp_path, "gw-01", "gw-02").returncode == 0
    fill_state(tmp_path, "agents/gw-01")
    result = stand_in("agent", tmp_path, "--uninstall", "--purge")
    assert result.returncode == 0, result.stderr
    files = {name for name, (mode, *_) in snapshot(tmp_path).items() if not stat.S_ISDIR(mode)}
    assert files == {name for name, (mode, *_) in before.items() if not stat.S_ISDIR(mode)}
    assert not (tmp_path / "etc/splitfleet/agents").exists()


def test_named_device_goes_alone(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01", "gw-02").returncode == 0
    assert stand_in("agent", tmp_path, "--uninstall", "--purge", "gw-01").returncode == 0
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    assert [link.name for link in wants.iterdir()] == ["edge-agent@gw-02.service"]
    assert [p.name for p in (tmp_path / "etc/splitfleet/agents").iterdir()] == ["gw-02.yaml"]
    assert (tmp_path / "opt/splitfleet/agent").is_symlink()


def test_dry_run_of_an_uninstall_changes_nothing(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01").returncode == 0
    before = snapshot(tmp_path)
    result = stand_in("agent", tmp_path, "--uninstall", "--purge", "--dry-run")
    assert "would remove /etc/splitfleet/agents/gw-01.yaml" in result.stdout
    assert snapshot(tmp_path) == before


# Services


def told(image: Path) -> list[str]:
    """What systemctl was told, without questions; forgotten afterwards."""
    path = image / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if not line.startswith("is-")]


def fill_in(image: Path, device: str) -> None:
    settings = image / f"etc/splitfleet/agents/{device}.yaml"
    settings.write_text(settings.read_text().replace("broker.lab.example", "10.0.0.1"))


def test_service_waits_until_its_settings_are_filled_in(tmp_path: Path) -> None:
    result = stand_in("agent", tmp_path, "gw-01", systemd=True)
    assert told(tmp_path) == ["daemon-reload", "enable --quiet edge-agent@gw-01.service"]
    assert "fill in /etc/splitfleet/agents/gw-01.yaml" in result.stdout
    fill_in(tmp_path, "gw-01")
    result = stand_in("agent", tmp_path, "gw-01", systemd=True)
    assert told(tmp_path) == ["restart edge-agent@gw-01.service"]
    assert "next, for" not in result.stdout


def test_upgrade_restarts_what_runs_or_has_failed_and_leaves_the_stopped(tmp_path: Path) -> None:
    devices = ("gw-01", "gw-02", "gw-03")
    assert stand_in("agent", tmp_path, *devices, systemd=True).returncode == 0
    for device in devices:
        fill_in(tmp_path, device)
    (tmp_path / "active").write_text("edge-agent@gw-01.service\n")
    (tmp_path / "failed").write_text("edge-agent@gw-02.service\n")
    told(tmp_path)
    assert stand_in("agent", tmp_path, systemd=True).returncode == 0
    assert told(tmp_path) == [], "nothing has changed"
    assert stand_in("agent", tmp_path, systemd=True, STAMP="2").returncode == 0
    assert told(tmp_path) == [
        "daemon-reload",
        "restart edge-agent@gw-01.service",
        "restart edge-agent@gw-02.service",
    ]


def test_one_service_that_does_not_start_keeps_no_other_from_it(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01", "gw-02", systemd=True).returncode == 0
    for device in ("gw-01", "gw-02"):
        fill_in(tmp_path, device)
    (tmp_path / "broken").write_text("edge-agent@gw-01.service\n")
    told(tmp_path)
    result = stand_in("agent", tmp_path, "gw-01", "gw-02", systemd=True)
    assert result.returncode == 1
    assert "did not start: edge-agent@gw-01.service; see journalctl -u" in result.stderr
    assert told(tmp_path)[-1] == "restart edge-agent@gw-02.service"


def test_no_start_starts_nothing(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01", systemd=True).returncode == 0
    fill_in(tmp_path, "gw-01")
    (tmp_path / "active").write_text("edge-agent@gw-01.service\n")
    told(tmp_path)
    result = stand_in("agent", tmp_path, "--no-start", "gw-01", systemd=True, STAMP="2")
    assert result.returncode == 0, result.stderr
    assert told(tmp_path) == ["daemon-reload"]


def test_uninstall_stops_services_before_it_removes_them(tmp_path: Path) -> None:
    assert stand_in("agent", tmp_path, "gw-01", systemd=True).returncode == 0
    told(tmp_path)
    result = stand_in("agent", tmp_path, "--uninstall", systemd=True)
    assert result.returncode == 0, result.stderr
    assert told(tmp_path) == ["disable --now --quiet edge-agent@gw-01.service", "daemon-reload"]


def test_coordinator_that_runs_is_restarted_by_an_upgrade(tmp_path: Path) -> None:
    assert stand_in("coordinator", tmp_path, systemd=True).returncode == 0
    settings = tmp_path / "etc/splitfleet/coordinator.yaml"
    settings.write_text(settings.read_text().replace("broker.lab.example", "10.0.0.1"))
    (tmp_path / "active").write_text("coordinator.service\n")
    told(tmp_path)
    assert stand_in("coordinator", tmp_path, systemd=True, STAMP="2").returncode == 0
    assert told(tmp_path) == ["daemon-reload", "restart coordinator.service"]
