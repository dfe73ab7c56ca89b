"""A run is recorded well enough to be simulated: what the real run writes is what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.cli.app import app
from coordinator.journal import Journal
from coordinator.recorder import write_summary
from coordinator.store import open_store
from coordinator.summing_up import build_device_records, build_run_record, build_summary
from tests.pairs import Pair, make_samples


@pytest.mark.parametrize("written", ["store", "summary"])
def test_trained_run_is_simulated_with_its_counts_and_measured_delays(
    tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair(tmp_path / "run", make_samples(a=40, b=24))
    pair.begin().train()
    run, settings = pair.run, pair.run.settings
    if written == "store":
        store = open_store(f"sqlite:///{settings.directory / 'state.sqlite'}")
        journal = Journal(store, settings.run, settings.directory, keep=1)
        journal.write_state(
            build_run_record(settings, run, attempt=1, online=True),
            build_device_records(pair.registry, run),
        )
        journal.close()
    else:
        write_summary(settings.directory, build_summary(settings, run, broker="none"))
    where = str(settings.directory)
    arguments = ["simulate", "--population-from", where, "--delays-from", where, "-B", "16"]
    app([*arguments, "-p", "ugs", "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    shown = {device["device"]: device for device in document["devices"]}
    for name, samples in (("a", 40), ("b", 24)):
        assert shown[name]["samples"] == samples
        parts = (shown[name]["fixed_s"], shown[name]["per_sample_s"])
        assert parts == pytest.approx(run.delay_of(name))
        assert sum(parts) > 0
    record = build_device_records(pair.registry, run)[0]
    assert record.forward is not None
    assert record.backward is not None
    assert record.forward.observations == record.backward.observations > 0
    assert record.contribution_s == pytest.approx(
        record.fixed_s + record.per_sample_s * run.typical_count(record.device)
    )
