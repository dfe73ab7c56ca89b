"""How much memory this process has used, and how much the device has left."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def peak_rss_bytes(proc: Path = Path("/proc")) -> int:
    """The most memory that this process has held.

    Linux's ``VmHWM`` and not ``getrusage``: that one begins with the size of whoever started the
    process, which for an agent started by a coordinator is several times its own.
    """
    found = _read_kib(proc / "self" / "status", "VmHWM:")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int | None:
    """Memory that a process could still take, by the kernel's word; None where it has none.

    A limit of the service's or container's own (cgroup v2) counts where it is smaller.
    """
    free = _read_kib(proc / "meminfo", "MemAvailable:")
    left = _left_in_group(proc, cgroup)
    known = [size for size in (free, left) if size is not None]
    return min(known, default=None)


def _left_in_group(proc: Path, cgroup: Path) -> int | None:
    try:
        group = (proc / "self" / "cgroup").read_text(encoding="ascii").rpartition("::/")[2].strip()
        limit = (cgroup / group / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / group / "memory.current").read_text(encoding="ascii"))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def _read_kib(path: Path, field: str) -> int | None:
    """A line ``FIELD   1234 kB`` of a file below /proc, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None
