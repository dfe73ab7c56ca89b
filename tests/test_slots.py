"""Bundles on disk: kill -9 between any two file operations leaves a whole, verified bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.journal import Journal
from edge_agent.slots import SlotStore
from tests.slot_crashes import bundle_of, in_use, update

ROOT = Path(__file__).parent.parent


def test_store_gives_back_what_was_installed(tmp_path: Path) -> None:
    update(SlotStore(tmp_path), 1)
    store = SlotStore(tmp_path)
    assert in_use(store) == bundle_of(1)
    update(store, 2)
    assert in_use(SlotStore(tmp_path)) == bundle_of(2)
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "b.bundle", "slots.json"]


def test_bundle_that_is_here_already_is_not_written_again(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    update(store, 1)
    update(store, 2, good=True)
    before = (tmp_path / "a.bundle").stat().st_mtime_ns
    update(store, 1)
    assert in_use(store) == bundle_of(1)
    assert (tmp_path / "a.bundle").stat().st_mtime_ns == before


def test_bundle_damaged_on_disk_is_as_good_as_absent(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    update(store, 1)
    (tmp_path / "a.bundle").write_bytes(bundle_of(1)[:-1])
    assert store.journal.active is not None
    assert store.read(store.journal.active) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"active": "c"}', "\xff"])
def test_unreadable_journal_means_no_bundle_and_no_end(tmp_path: Path, text: str) -> None:
    update(SlotStore(tmp_path), 1)
    (tmp_path / "slots.json").write_text(text)
    store = SlotStore(tmp_path)
    assert store.journal == Journal()
    update(store, 2)
    assert in_use(SlotStore(tmp_path)) == bundle_of(2)


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    update(SlotStore(tmp_path), 1)
    (tmp_path / ".slots.json.123.tmp").write_text("{")
    (tmp_path / f"{'0' * 64}.bundle").write_text("of an earlier version")
    SlotStore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "slots.json"]


@pytest.mark.parametrize(
    "case",
    ["committed-after", "committed-before", "reverted-after", "reverted-before", "first"],
)
def test_kill_at_every_file_operation_leaves_a_whole_bundle(tmp_path: Path, case: str) -> None:
    """Of the update before or after; with the first one, that one or none."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.slot_crashes", tmp_path, case],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) > 20, "nothing was tried"
