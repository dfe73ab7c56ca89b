"""Whether a kernel keeps to memory limits, told from what its control groups look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent import checking
from edge_agent.checking import check_device, check_lines
from edge_agent.config import AgentSettings
from edge_agent.measuring.limits import MemoryLimits, memory_limits
from wire.settings import parse_settings


@pytest.mark.parametrize(
    ("controllers", "expected"),
    [
        ("cpuset cpu io memory pids\n", MemoryLimits.ENFORCED),
        ("cpuset cpu io pids\n", MemoryLimits.IGNORED),
    ],
)
def test_version_2_lists_its_controllers(
    tmp_path: Path, controllers: str, expected: MemoryLimits
) -> None:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    assert memory_limits(tmp_path) is expected


def test_version_1_has_a_folder_for_each(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    assert memory_limits(tmp_path) is MemoryLimits.IGNORED
    (tmp_path / "memory").mkdir()
    assert memory_limits(tmp_path) is MemoryLimits.ENFORCED


def test_where_no_groups_are_mounted_nothing_is_known(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) is MemoryLimits.UNKNOWN
    assert memory_limits(tmp_path / "gone") is MemoryLimits.UNKNOWN


def test_check_says_that_limits_are_ignored(
    monkeypatch: pytest.MonkeyPatch, free_port: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(checking, "BROKER_TIMEOUT_S", 0.1)
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 3), np.float32), y=np.arange(4) % 2)
    source = f"""
device: gw-01
state_dir: {tmp_path}
mqtt: {{port: {free_port}}}
data: {{npz: {{path: {tmp_path}/x.npz}}, classes: 2}}
"""
    settings = parse_settings(source.encode(), AgentSettings, source="gw-01.yaml")
    for found, shown in ((MemoryLimits.IGNORED, True), (MemoryLimits.ENFORCED, False)):
        monkeypatch.setattr(checking, "memory_limits", lambda found=found: found)
        report = check_device(settings, source="gw-01.yaml")
        assert report["memory_limits"] == found
        assert ("memory limits" in dict(check_lines(report))) is shown
