"""``coordinator simulate``: what it reports, and what it refuses."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.allocation import POLICIES
from coordinator.journal import DeviceRecord, Journal, RunRecord
from coordinator.simulation.choices import PolicyChoice, parse_choices
from coordinator.simulation.delay_models import BaseDelay, DeviceDelays, straggler_delays
from coordinator.simulation.fleet import SimulatedFleet
from coordinator.simulation.play import play_epoch
from coordinator.simulation.populations import PopulationSettings, build_label_counts
from coordinator.store import open_store
from tests.commands import RunCommand
from wire.exit_codes import ExitCode

ISSUE_KEYS = {
    "steps",
    "time_s",
    "time_ratio",
    "deviation_mean",
    "deviation_p95",
    "deviation_ratio",
    "straggler_steps",
}
SMALL = ("--devices", 16, "--samples", 2000, "-B", 32, "--seeds", 1)


@pytest.fixture
def simulate(run_coordinator: RunCommand) -> RunCommand:
    return partial(run_coordinator, "simulate")


def _file(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# What it reports


def test_json_has_every_promised_key_for_every_registered_policy(simulate: RunCommand) -> None:
    document = simulate(*SMALL, "--json").document
    assert set(document["policies"]) == {policy.value for policy in POLICIES}
    for facts in document["policies"].values():
        assert facts.keys() >= ISSUE_KEYS | {"participation"}
    assert document["time_lower_bound_s"] > 0
    assert document["seeds"] == [0]
    assert document["settings"]["devices"] == 16
    assert len(document["devices"]) == 16


def test_published_fleet_reaches_what_was_seen_before(simulate: RunCommand) -> None:
    """128 devices, two classes each, 10 % stragglers of 10x, B = 128, 50,000 samples."""
    document = simulate("-p", "ugs,lds@1,lds@2", "--seeds", 4, "--json").document
    one, two = document["policies"]["lds@1"], document["policies"]["lds@2"]
    assert one["time_ratio"] < 0.34
    assert one["deviation_ratio"] < 1.15
    assert two["time_ratio"] < 0.21
    assert two["deviation_ratio"] < 1.25
    assert 0.17 < document["time_lower_bound_ratio"] < 0.20
    for facts in two["by_seed"]:
        assert facts["straggler_steps"] < 50


def test_file_of_counts_and_delays_is_timed_by_hand(simulate: RunCommand, tmp_path: Path) -> None:
    counts = _file(tmp_path / "counts.json", [[40, 0], [0, 40]])
    delays = _file(tmp_path / "delays.json", [1.0, [2.0, 0.5]])
    document = simulate(
        "--label-counts", counts, "--delays", delays, "-B", 8, "-p", "fls", "--seeds", 1, "--json"
    ).document
    fls = document["policies"]["fls"]
    # Each gives 4 a step: ten steps of 2 + 0.5 * 4 s, one half of each class.
    assert (fls["steps"], fls["time_s"], fls["deviation_mean"]) == (10, 40.0, 0.0)
    assert fls["participation"] == 1.0
    assert document["policies"].keys() == {"ugs", "fls"}


@pytest.mark.parametrize(
    "written",
    [
        [[1.0, 0.5], [2.0, 0.25]],
        {"delays": [[1.0, 0.5], [2.0, 0.25]]},
        {"fixed_s": [1.0, 2.0], "per_sample_s": [0.5, 0.25]},
        [{"fixed_s": 1.0, "per_sample_s": 0.5}, {"fixed_s": 2.0, "per_sample_s": 0.25}],
        {"b": [2.0, 0.25], "a": [1.0, 0.5]},
    ],
)
def test_every_form_of_delays_says_the_same(
    simulate: RunCommand, tmp_path: Path, written: object
) -> None:
    counts = _file(tmp_path / "counts.json", {"a": [4, 1], "b": [3, 3]})
    delays = _file(tmp_path / "delays.json", written)
    document = simulate(
        "--label-counts", counts, "--delays", delays, "-p", "ugs", "--json"
    ).document
    facts = [(d["device"], d["fixed_s"], d["per_sample_s"]) for d in document["devices"]]
    assert facts == [("a", 1.0, 0.5), ("b", 2.0, 0.25)]


def test_seeds_give_mean_spread_and_each_value(simulate: RunCommand) -> None:
    document = simulate(*SMALL[:-1], "3,5,8", "-p", "lds", "--json").document
    lds = document["policies"]["lds"]
    times_s = [facts["time_s"] for facts in lds["by_seed"]]
    assert document["seeds"] == [3, 5, 8]
    assert lds["time_s"] == pytest.approx(np.mean(times_s))
    assert lds["spread"]["time_s"] == pytest.approx(np.std(times_s, ddof=1))
    assert len(set(document["time_lower_bounds_s"])) > 1


def test_seeds_repeat_and_fleet_seed_keeps_the_fleet(simulate: RunCommand) -> None:
    first = simulate(*SMALL, "--json").out
    assert simulate(*SMALL, "--json").out == first
    kept = simulate(*SMALL[:-1], 3, "--fleet-seed", 7, "-p", "ugs", "--json").document
    assert len(set(kept["time_lower_bounds_s"])) == 1


def test_table_shows_policies_bound_and_what_was_simulated(simulate: RunCommand) -> None:
    shown = simulate(*SMALL, "-p", "fls", "-p", "lds@20%")
    assert shown.code == ExitCode.OK
    assert "16 devices, 2,000 samples of 10 classes, 2 classes a device; 2 stragglers" in shown.out
    for name in ("fls", "ugs", "lds@20%", "bound"):
        assert f"\n{name} " in shown.out


def test_steps_beyond_the_global_batch_are_pointed_out(simulate: RunCommand) -> None:
    shown = simulate("--devices", 20, "--samples", 400, "-B", 4, "-p", "fls", "--seeds", 1)
    assert "steps larger than the global batch" in shown.out
    assert "fls (20)" in shown.out


def test_csv_has_a_row_per_policy_and_seed(simulate: RunCommand, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    simulate(*SMALL[:-1], 2, "-p", "ugs,lds", "--csv", path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("ugs", "0"),
        ("ugs", "1"),
        ("lds", "0"),
        ("lds", "1"),
    ]
    assert float(rows[0]["time_ratio"]) == 1.0
    assert float(rows[2]["time_lower_bound_s"]) <= float(rows[2]["time_s"])


def test_caps_bound_counts_and_raise_the_lower_bound(simulate: RunCommand, tmp_path: Path) -> None:
    counts = _file(tmp_path / "counts.json", [[100, 100]] * 4)
    free = ("--label-counts", counts, "--stragglers", 1, "-B", 100, "-p", "lds@6", "--seeds", 1)
    wide = simulate(*free, "--json").document
    tight = simulate(*free, "--max-batch", 25, "--json").document
    assert wide["policies"]["lds@6"]["straggler_steps"] < 8
    assert tight["policies"]["lds@6"]["straggler_steps"] == 8
    assert (wide["time_lower_bound_s"], tight["time_lower_bound_s"]) == (26.0, 80.0)
    caps = _file(tmp_path / "caps.json", [25, 25, 25, 25])
    assert simulate(*free, "--max-batch", caps, "--json").document["policies"] == tight["policies"]


# Recorded runs


def _write_run(folder: Path, devices: list[DeviceRecord], name: str = "run") -> None:
    folder.mkdir(exist_ok=True)
    store = open_store(f"sqlite:///{folder / 'state.sqlite'}")
    journal = Journal(store, name, folder, keep=1)
    journal.write_state(RunRecord(run=name, fleet="lab", attempt=1, phase="done"), devices)
    journal.close()


def _device(name: str, counts: tuple[int, ...], **changes: object) -> DeviceRecord:
    values = {"device": name, "online": True, "ready": True, "label_counts": counts}
    return DeviceRecord(**(values | changes))  # type: ignore[arg-type]


RECORDED = [
    _device("gw-b", (10, 30), fixed_s=0.5, per_sample_s=0.01, max_batch=8),
    _device("gw-a", (20, 20), fixed_s=0.1, per_sample_s=0.02),
    _device("gw-c", (40,)),
    _device("gw-new", ()),
]


def test_fleet_of_a_run_is_simulated_with_its_names_caps_and_delays(
    simulate: RunCommand, tmp_path: Path
) -> None:
    _write_run(tmp_path / "lab", RECORDED)
    run = tmp_path / "lab"
    arguments = ("--population-from", run, "--delays-from", run, "-B", 30, "-p", "ugs")
    document = simulate(*arguments, "--json").document
    believed = {d["device"]: (d["fixed_s"], d["per_sample_s"]) for d in document["devices"]}
    # The device that was not measured gets the median of the others.
    assert believed == {"gw-a": (0.1, 0.02), "gw-b": (0.5, 0.01), "gw-c": (0.3, 0.015)}
    assert document["fleet"]["class_counts"] == [70, 50]
    assert document["policies"]["ugs"]["steps"] >= 5, "gw-b takes at most 8 of its 40 a step"
    shown = simulate(*arguments)
    assert "gw-b" in shown.out
    assert "500 ms" in shown.out


def test_run_is_found_by_the_url_of_its_store_and_its_name(
    simulate: RunCommand, tmp_path: Path
) -> None:
    _write_run(tmp_path, RECORDED, name="monday")
    _write_run(tmp_path, RECORDED[:1], name="tuesday")
    url = f"sqlite:///{tmp_path / 'state.sqlite'}"
    document = simulate("--population-from", f"{url}#tuesday", "-p", "ugs", "--json").document
    assert document["fleet"]["devices"] == 1
    ended = simulate("--population-from", url)
    assert ended.code == ExitCode.CONFIG
    assert "--population-from: expected one of the runs in" in ended.err
    assert f"monday, tuesday (say {url}#NAME)" in ended.err


def test_summary_of_a_run_is_enough(simulate: RunCommand, tmp_path: Path) -> None:
    summary = {
        "run": "r", "network": "mlp", "cut_layer": "b", "policy": "lds", "precision": "fp16",
        "seed": 0, "global_batch": 8, "epochs": 1, "steps": 1, "test_accuracy": None,
        "test_loss": None, "samples_held": 4, "samples_trained": 4, "samples_missed": 0,
        "train_s": 1.0, "steps_per_s": 1.0, "bytes_up": 0, "bytes_down": 0, "mean_deviation": 0.1,
        "refused": {}, "broker": "b", "completed": True, "epoch_results": [],
        "devices": [
            {
                "device": "gw-a", "samples_held": 4, "samples_trained": 4, "samples_missed": 0,
                "missed_deadlines": 0, "delay_s": 0.3, "bytes_up": 0, "bytes_down": 0,
                "refused": {}, "label_counts": [1, 3], "fixed_s": 0.25, "per_sample_s": 0.0125,
            }
        ],
    }  # fmt: skip
    (tmp_path / "summary.json").write_bytes(msgspec.json.encode(summary))
    arguments = ("--population-from", tmp_path, "--delays-from", tmp_path, "-p", "ugs", "--json")
    document = simulate(*arguments).document
    assert document["devices"][0]["fixed_s"] == 0.25
    assert document["fleet"]["class_counts"] == [1, 3]
    (tmp_path / "summary.json").write_text("{}")
    ended = simulate(*arguments)
    assert ended.code == ExitCode.CONFIG
    assert "summary.json: expected a run's summary" in ended.err


def test_run_without_measurements_or_counts_is_refused(
    simulate: RunCommand, tmp_path: Path
) -> None:
    _write_run(tmp_path / "a", [_device("gw-c", (40,))])
    ended = simulate("--delays-from", tmp_path / "a")
    assert (ended.code, "none of the 1 devices has one yet" in ended.err) == (78, True)
    _write_run(tmp_path / "b", [_device("gw-new", ())])
    ended = simulate("--population-from", tmp_path / "b")
    assert (ended.code, "reported their label counts, found none" in ended.err) == (78, True)


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-B", 0), "--global-batch: expected a whole number from 1, found 0"),
        (("--refit-every", 0), "--refit-every: expected a whole number from 1, found 0"),
        (("--seed", -1), "--seed: expected a whole number from 0, found -1"),
        (("--seeds", "0"), "--seeds: expected how many seeds (1 to 1000) or a list"),
        (("--seeds", "a,b"), "--seeds: expected how many seeds"),
        (("-p", "sgd"), "--policies: expected policies among fls, fpls, ugs, lds, class-targeted"),
        (("-p", "ugs@2"), "--policies: expected 'ugs' without '@'"),
        (("-p", "lds@x%"), "--policies: expected a number from 0 behind '@'"),
        (("--delta", -1), "--delta: expected a finite number from 0, found -1"),
        (("--delta", "nan"), "--delta: expected a finite number from 0, found nan"),
        (("--delta", 1, "--deviation-budget", 0.1), "expected --delta or --deviation-budget"),
        (("--devices", 0), "--devices: expected a whole number from 1, found 0"),
        (("--devices", 2, "-C", 2), "--devices: expected at least 5 devices with 2 classes each"),
        (("--samples", 0), "--samples: expected a whole number from 1, found 0"),
        (("--classes", 0), "--classes: expected a whole number from 1, found 0"),
        (("-C", 11), "--classes-per-device: expected 1 to 10, the classes with samples, found 11"),
        (("--alpha", 0), "--alpha: expected a finite number above 0, found 0"),
        (("--iid", "--alpha", 1), "--alpha: expected no --alpha beside --iid"),
        (("--stragglers", 129), "--stragglers: expected a number of devices from 0 to 128"),
        (("--stragglers", "ten"), "--stragglers: expected a number of devices from 0 to 128"),
        (("--stragglers", "nan%"), "--stragglers: expected a number of devices from 0 to 128"),
        (("--factor", 0.5), "--factor: expected a finite factor from 1, found 0.5"),
        (("--lognormal", -1), "--lognormal: expected a finite number from 0, found -1"),
        (("--lognormal", 1, "--stragglers", 3), "--stragglers: expected at most one of"),
        (("--fixed-s", 0), "--fixed-s: expected --fixed-s or --per-sample-s above 0"),
        (("--per-sample-s", -1), "--per-sample-s: expected a finite number from 0, found -1"),
        (("--max-batch", 0), "--max-batch: max_batch: expected a whole number from 1, received 0"),
        (("--max-batch", "many"), "--max-batch: expected a whole number from 1 or a JSON file"),
        (("--population-from", "no/where"), "--population-from: expected a run's folder"),
        (("--delays-from", "sqlite:///no/state.sqlite"), "--delays-from: expected a usable state"),
        (("--delays-from", "no/where"), "--delays-from: expected a run's folder"),
        (("--csv", "no/where/rows.csv"), "--csv: expected a file in a folder that exists"),
    ],
)
def test_wrong_option_is_named_with_what_is_possible(
    simulate: RunCommand, arguments: tuple[object, ...], said: str
) -> None:
    ended = simulate("-p", "ugs", "--seeds", 1, *arguments)
    assert ended.code == ExitCode.CONFIG
    assert said in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[[1, 2", "it is not JSON"),
        ([1, 2, 3], "expected a matrix of whole numbers"),
        ({"rows": 3}, "expected a matrix of whole numbers"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([[1, 2.5]], "expected whole numbers, received 2.5"),
        ([[1, -2]], "expected whole numbers from 0"),
        ([["a", 2]], "expected whole numbers"),
        ([], "expected 2 axes"),
        ([[0, 0], [0, 0]], "expected at least one sample in all, found only zeros"),
    ],
)
def test_wrong_label_counts_are_refused_with_the_file(
    simulate: RunCommand, tmp_path: Path, written: object, said: str
) -> None:
    path = _file(tmp_path / "counts.json", written)
    ended = simulate("--label-counts", path)
    assert ended.code == ExitCode.CONFIG
    assert ended.err.startswith(f"error: {path}: ")
    assert said in ended.err


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("nothing", "it is not JSON"),
        ([], "expected one delay per device"),
        (3, "expected one delay per device"),
        ([1, -2], "[1]: expected finite seconds from 0"),
        ([1, "2"], "[1]: expected finite seconds from 0"),
        ([1, True], "[1]: expected finite seconds from 0"),
        ("[1, Infinity]", "[1]: expected finite seconds from 0"),
        ([1, [1, 2, 3]], "[1]: expected finite seconds from 0"),
        ([1, {"seconds": 3}], "[1]: expected finite seconds from 0"),
        ({"fixed_s": [1, 2], "per_sample_s": [1]}, "expected as many entries in fixed_s (2)"),
        ([1, 2, 3], "expected 2 delays, as many as devices in the label counts, found 3"),
        ({"x": 1, "y": 2}, "expected a delay of device 'a'"),
    ],
)
def test_wrong_delays_are_refused_with_the_file(
    simulate: RunCommand, tmp_path: Path, written: object, said: str
) -> None:
    counts = _file(tmp_path / "counts.json", {"a": [1, 2], "b": [3, 4]})
    path = _file(tmp_path / "delays.json", written)
    ended = simulate("--label-counts", counts, "--delays", path)
    assert ended.code == ExitCode.CONFIG
    assert str(path) in ended.err
    assert said in ended.err


def test_options_that_say_the_same_twice_are_refused(simulate: RunCommand, tmp_path: Path) -> None:
    counts = _file(tmp_path / "counts.json", [[1, 2], [3, 4]])
    delays = _file(tmp_path / "delays.json", [1, 2])
    for arguments, said in (
        (("--label-counts", counts, "--devices", 3), "expected no --devices beside --label-counts"),
        (("--label-counts", counts, "--population-from", "x"), "expected at most one of"),
        (("--delays", delays, "--fixed-s", 3), "expected no --fixed-s beside --delays"),
        (("--delays", delays, "--factor", 3), "expected at most one of"),
        (("--delays", delays, "--devices", 3), "--devices: expected 2, as many as there are"),
    ):
        ended = simulate(*arguments)
        assert (ended.code, said in ended.err) == (ExitCode.CONFIG, True), ended.err


def test_caps_of_another_number_of_devices_are_refused(
    simulate: RunCommand, tmp_path: Path
) -> None:
    caps = _file(tmp_path / "caps.json", [1, 2, 3])
    ended = simulate("--devices", 16, "--max-batch", caps)
    assert (ended.code, "expected shape (16,), received (3,)" in ended.err) == (78, True)


def test_help_has_an_example(simulate: RunCommand) -> None:
    shown = simulate("--help")
    assert "Example: coordinator simulate" in shown.out


# One epoch, step by step


def _fleet(**changes: int) -> SimulatedFleet:
    counts_KM = build_label_counts(PopulationSettings(devices=24, samples=4000), seed=1)
    return SimulatedFleet(
        counts_KM, straggler_delays(24, BaseDelay(0.5, 0.02), stragglers=3, factor=8, seed=1)
    )


@pytest.mark.parametrize("name", ["fls", "fpls", "ugs", "lds", "lds@3", "class-targeted"])
def test_every_sample_is_played_once_and_time_is_that_of_the_slowest(name: str) -> None:
    fleet = _fleet()
    (choice,) = [c for c in parse_choices([name]) if c.name == name]
    play = play_epoch(fleet, choice, global_batch=50, seed=2, keep_counts=True)
    assert play.counts is not None
    played_K = np.zeros(24, dtype=np.int64)
    for step, seconds in zip(play.counts, play.seconds_T, strict=True):
        played_K[step.devices] += step.counts
        parts = fleet.delays.fixed_s_K[step.devices]
        parts = parts + fleet.delays.per_sample_s_K[step.devices] * step.counts
        assert seconds == parts.max()
    assert np.array_equal(played_K, fleet.held_K)
    assert play.samples_T.sum() == 4000
    assert play.active_T.tolist() == [len(step.devices) for step in play.counts]


def test_deviation_of_single_class_devices_is_known_exactly() -> None:
    fleet = SimulatedFleet(np.array([[60, 0], [0, 20]]), DeviceDelays(np.ones(2), np.zeros(2)))
    play = play_epoch(
        fleet,
        PolicyChoice("ugs", parse_choices(["ugs"])[0].policy),
        global_batch=10,
        seed=0,
        keep_counts=True,
    )
    assert play.counts is not None
    for step, deviation in zip(play.counts, play.deviation_T, strict=True):
        first = int(step.counts[step.devices == 0].sum())
        assert deviation == pytest.approx(2 * abs(first / 10 - 0.75))


def test_ugs_deviates_as_uniform_batches_of_the_pooled_data_do() -> None:
    """Mean over seeds against batches cut from a shuffled list of all samples."""
    fleet = _fleet()
    (ugs,) = parse_choices(["ugs"])
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), fleet.label_counts_KM.sum(axis=0))
    pooled_M = np.bincount(labels) / labels.size
    shuffled, played = [], []
    for seed in range(30):
        batches = rng.permutation(labels).reshape(-1, 50)
        mixes = np.stack([np.bincount(batch, minlength=10) / 50 for batch in batches])
        shuffled.append(np.abs(mixes - pooled_M).sum(axis=1).mean())
        played.append(play_epoch(fleet, ugs, global_batch=50, seed=seed).deviation_T.mean())
    noise = float(np.std(shuffled)) / np.sqrt(30)
    assert float(np.mean(played)) == pytest.approx(float(np.mean(shuffled)), abs=5 * noise)


def test_class_targeted_batches_deviate_as_ugs_and_take_less_time() -> None:
    fleet = _fleet()
    plays = {
        choice.name: play_epoch(fleet, choice, global_batch=50, seed=3)
        for choice in parse_choices(["ugs", "class-targeted"])
    }
    ugs, targeted = plays["ugs"], plays["class-targeted"]
    assert targeted.seconds_T.sum() < 0.6 * ugs.seconds_T.sum()
    assert targeted.deviation_T.mean() == pytest.approx(ugs.deviation_T.mean(), rel=0.15)


def test_parts_of_a_fleet_must_belong_together() -> None:
    delays = DeviceDelays(np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"delays: expected one per device \(3\), found 2"):
        SimulatedFleet(np.ones((3, 2), dtype=np.int64), delays)
    with pytest.raises(ValueError, match="max_batch: expected one per device"):
        SimulatedFleet(np.ones((2, 2), dtype=np.int64), delays, np.ones(3, dtype=np.int64))
    with pytest.raises(ValueError, match="at least one sample"):
        SimulatedFleet(np.zeros((2, 2), dtype=np.int64), delays)
