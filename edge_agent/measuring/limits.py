"""Whether the kernel keeps to the limits of a service, as far as a process can see it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class MemoryLimits(StrEnum):
    """Whether the kernel keeps to a service's MemoryMax."""

    ENFORCED = "enforced"
    IGNORED = "ignored"
    UNKNOWN = "unknown"


def memory_limits(cgroups: Path = CGROUPS) -> MemoryLimits:
    """Look for the memory controller, which Raspberry Pi OS may have switched off at boot.

    Source: cgroups(7); version 2 lists controllers in a file, version 1 has a folder for each.
    """
    try:
        controllers = (cgroups / "cgroup.controllers").read_text().split()
    except OSError:
        if not cgroups.is_dir() or not any(cgroups.iterdir()):
            return MemoryLimits.UNKNOWN
        controllers = [path.name for path in cgroups.iterdir() if path.is_dir()]
    return MemoryLimits.ENFORCED if "memory" in controllers else MemoryLimits.IGNORED
