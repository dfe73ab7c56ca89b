"""Files that are old or new, never half; the boot counter."""

from __future__ import annotations

import os
import time
from pathlib import Path

from edge_agent.boot import BootCounter
from edge_agent.files import write_atomically


def test_write_leaves_no_temporary_file_behind(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_boot_counter_grows_across_restarts(tmp_path: Path) -> None:
    counter = BootCounter(tmp_path / "state")
    first = counter.next()
    assert [counter.next() for _ in range(2)] == [first + 1, first + 2]
    assert BootCounter(tmp_path / "state").next() == first + 3


def test_device_set_up_anew_counts_on_above_what_it_was(tmp_path: Path) -> None:
    """A new SD card: the coordinator would take a smaller number for a late message."""
    started_s = int(time.time())
    assert BootCounter(tmp_path / "new").next() > started_s


def test_unreadable_boot_counter_goes_on_above_what_it_was(tmp_path: Path) -> None:
    counter = BootCounter(tmp_path)
    last = [counter.next() for _ in range(5)][-1]
    (tmp_path / "boot").write_text("\0\0")
    assert BootCounter(tmp_path).next() > last
