"""``coordinator study``: what it trains is what a fleet would train, and what it writes down."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats

from coordinator.optimisers import OptimiserName, OptimiserSettings
from coordinator.planning import PolicySettings
from coordinator.simulation.delay_models import BaseDelay, straggler_delays
from coordinator.study.charts import accuracy_limits_percent
from coordinator.study.data import StudyData
from coordinator.study.fleet import EpochOrder, EpochPlans, StudyFleet
from coordinator.study.methods import Method
from coordinator.study.settings import TrainingSettings
from coordinator.study.summary import Group, Interval, interval
from coordinator.study.training import Trainer
from edge_agent.datasets import LabelledData
from tests.commands import RunCommand
from tests.pairs import CLASSES, SEED, Pair, make_samples
from wire.exit_codes import ExitCode
from wire.messages import SampleOrder


@pytest.fixture
def study(run_coordinator: RunCommand) -> RunCommand:
    return partial(run_coordinator, "study")


@pytest.fixture
def small(tmp_path: Path) -> list[object]:
    """Options of a study over own data that takes a second or two."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6)).astype(np.float32)
    for name, samples in (("train", 400), ("test", 100)):
        y = np.arange(samples) % 4
        x = centres[y] + 0.3 * rng.normal(size=(samples, 6)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x.astype(np.float32), y=y)
    # fmt: off
    return [
        "--data", tmp_path / "train.npz", "--test-data", tmp_path / "test.npz",
        "--devices", "6", "--schemes", "2/3", "--stragglers", "0,0.2", "--seeds", "0-1",
        "--policies", "undivided,ugs,lds:delta=1,class-targeted",
        "--epochs", "2", "--batch", "20", "--lr", "0.01",
        "--network", "mlp", "--network-arguments", '{"hidden": [8]}',
    ]
    # fmt: on


# What is trained


@pytest.mark.parametrize("policy", ["ugs", "fls", "class-targeted"])
def test_batches_and_losses_are_those_of_a_fleet_of_agents(tmp_path: Path, policy: str) -> None:
    samples = make_samples(a=30, b=41, c=17)
    optimiser = {"name": "sgd", "lr": 0.1}
    # Given delays: what a loaded machine measures would change the plan of class-targeted.
    document = {"name": policy, "delays_s": {"a": 1.0, "b": 2.0, "c": 1.0}}
    pair = Pair(tmp_path, samples, {"policy": document, "optimiser": optimiser})
    pair.begin().train()

    fleet, data = _pooled(samples)
    settings = pair.run.settings.policy
    order = SampleOrder.BY_CLASS if settings.name.is_by_class else SampleOrder.SHUFFLED
    plans = EpochPlans(fleet, settings, global_batch=12, seed=SEED)
    trainer = Trainer(_training(optimiser_lr=0.1), data, SEED)
    losses, batches = [], []
    for epoch in range(2):
        rows_of = EpochOrder(fleet, data.train.y, order, seed=SEED, epoch=epoch)
        for step in plans.epoch(epoch):
            batches.append(len(rows_of.rows(step)))
            losses.append(trainer.train_step(rows_of.rows(step)))

    assert batches == [record.samples for record in pair.reporter.steps]
    np.testing.assert_allclose(losses, [r.loss for r in pair.reporter.steps], rtol=1e-4)


def _pooled(samples: Any) -> tuple[StudyFleet, StudyData]:
    x = np.concatenate([own[0] for own in samples.values()])
    y = np.concatenate([own[1] for own in samples.values()])
    ends = np.cumsum([len(own[1]) for own in samples.values()])
    parts = np.split(np.arange(len(y)), ends[:-1])
    counts = [np.bincount(y[part], minlength=CLASSES) for part in parts]
    fleet = StudyFleet(
        names=tuple(samples),
        parts=tuple(parts),
        counts_KM=np.array(counts),
        delays=straggler_delays(3, BaseDelay(1.0, 0.0), stragglers=0, factor=1.0, seed=0),
    )
    pool = LabelledData(x=x, y=y, classes=CLASSES)
    return fleet, StudyData(train=pool, test=pool)


def _training(*, optimiser_lr: float) -> TrainingSettings:
    return TrainingSettings(
        network="mlp",
        network_arguments={"hidden": [8, 6]},
        optimiser=OptimiserSettings(name=OptimiserName.SGD, lr=optimiser_lr),
    )


def test_layer_that_the_user_put_into_eval_mode_stays_there() -> None:
    _, data = _pooled(make_samples(a=30))
    settings = TrainingSettings(network="tests.user_networks:norm_kept_as_it_is")
    trainer = Trainer(settings, data, SEED)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.train_epoch(iter([np.arange(30)]), lambda: False)
    after = trainer.network.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(after["1.weight"], before["1.weight"])
    assert trainer.network.training


def test_everybody_trains_every_sample_once_an_epoch_with_ugs_and_by_class() -> None:
    samples = make_samples(a=30, b=41, c=17)
    fleet, data = _pooled(samples)
    for name in ("ugs", "lds", "class-targeted", "fpls"):
        settings = msgspec.convert({"name": name}, PolicySettings)
        order = SampleOrder.BY_CLASS if settings.name.is_by_class else SampleOrder.SHUFFLED
        plans = EpochPlans(fleet, settings, global_batch=12, seed=1)
        rows_of = EpochOrder(fleet, data.train.y, order, seed=1, epoch=0)
        seen = np.concatenate([rows_of.rows(step) for step in plans.epoch(0)])
        assert sorted(seen) == list(range(88)), name


# What is written


def test_study_writes_a_table_of_all_cells_and_a_page_that_needs_nothing_else(
    study: RunCommand, small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    ended = study(*small, "--out", out)
    assert ended.code == ExitCode.OK, ended.err
    document = json.loads((out / "results.json").read_bytes())
    rows = list(csv.DictReader((out / "results.csv").open()))
    cells = 2 * (1 + 2 * 3)  # seeds x (undivided + stragglers x policies)
    assert document["complete"] is True
    assert len(rows) == len(document["results"]) == cells
    _assert_sound(document)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "<?xml" not in page
    assert not re.search(r"(src|@import|<script|<link)", page.split("</style>")[0])
    assert set(re.findall(r'(?:href|src)="([^"#]+)"', re.sub(r"(?s)<svg.*?</svg>", "", page))) == {
        "https://arxiv.org/abs/2407.15738"
    }
    assert "is the fleet" in page
    assert "±" in page
    assert "LDS, delta 1" in page


def _assert_sound(document: dict[str, Any]) -> None:
    by_key = {}
    for result in document["results"]:
        fleet = result["cell"]["fleet"]
        policy = result["cell"]["method"]["policy"]
        if fleet is not None:
            key = (policy, fleet["scheme"]["name"], fleet["stragglers"], result["cell"]["seed"])
            by_key[key] = result
    for (policy, scheme, stragglers, seed), result in by_key.items():
        ugs = by_key["ugs", scheme, stragglers, seed]
        if policy == "class-targeted":
            assert result["deviation_mean"] < 1.3 * ugs["deviation_mean"]
        if policy == "lds" and stragglers:
            assert result["epoch_end_s"][-1] < ugs["epoch_end_s"][-1], "no time was saved"
        if policy in {"fls", "ugs"}:  # they never look at delays: one training for both
            calm = by_key[policy, scheme, 0.0, seed]
            assert result["test_accuracies"] == calm["test_accuracies"]


def test_second_start_goes_on_with_what_is_missing_and_ends_with_the_same_numbers(
    study: RunCommand, small: list[object], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert study(*small, "--out", whole).code == ExitCode.OK
    shutil.copytree(whole, cut)
    cells = sorted((cut / "cells").iterdir())
    for path in cells[::3]:
        path.unlink()
    cells[1].write_text('{"cell": ')  # half a file, as a full disk leaves it
    again = study(*small, "--out", cut)
    assert again.code == ExitCode.OK
    assert "going on with the rest" in again.out
    assert _numbers(cut) == _numbers(whole)


def _numbers(folder: Path) -> list[dict[str, Any]]:
    """The results without what the clock says."""
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_bytes())["results"]
    for result in results:
        del result["trained_s"]
    return results


def test_study_that_is_killed_keeps_its_finished_cells(
    study: RunCommand, small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    options = [*map(str, small), "--jobs", "2", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "coordinator", "study", *options])
    try:
        deadline_s = time.monotonic() + 60
        while not any((out / "cells").glob("*.json")):
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (out / "results.json").exists()
    ended = study(*small, "--out", out)
    assert ended.code == ExitCode.OK
    assert "going on with the rest" in ended.out
    assert study(*small, "--out", tmp_path / "whole").code == ExitCode.OK
    assert _numbers(out) == _numbers(tmp_path / "whole")


def test_interrupted_study_writes_down_what_it_has_and_says_how_to_go_on(
    small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    options = [*map(str, small), "--out", str(out)]
    command = [sys.executable, "-m", "coordinator", "study", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[1/"):
                os.kill(process.pid, signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == ExitCode.INTERRUPTED
    assert "the same command goes on with the rest" in rest
    assert "Stopped early" in (out / "report.html").read_text()
    assert json.loads((out / "results.json").read_bytes())["complete"] is False


def test_json_goes_to_stdout_alone(study: RunCommand, small: list[object], tmp_path: Path) -> None:
    ended = study(
        *small, "--policies", "ugs", "--seeds", "3", "--out", tmp_path / "study", "--json"
    )
    assert json.loads(ended.out)["finished"] == 2
    assert "[1/1] ugs" in ended.err


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.81, 0.85, 0.92, 0.88]])
def test_intervals_are_students(values: list[float]) -> None:
    found = interval(values)
    assert found.half_width is not None
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert interval([0.5]).half_width is None


def test_chart_shows_the_mean_of_every_method_however_bad() -> None:
    means = (0.86, 0.525, 0.7)
    groups = [_group(mean, half_width=0.4) for mean in means]
    low, high = accuracy_limits_percent(groups)
    assert (low, high) == (40.0, 100.0)
    assert all(low < 100 * mean < high for mean in means)
    assert accuracy_limits_percent([_group(0.01, half_width=None)]) == (0.0, 100.0)


def _group(accuracy: float, half_width: float | None) -> Group:
    value = Interval(accuracy, half_width, 3)
    nothing = dict.fromkeys(
        ("over_fls", "over_ugs", "over_undivided", "time_s", "time_ratio", "deviation_ratio"),
    )
    return Group(
        method=Method(),
        fleet=None,
        seeds=(0,),
        accuracy=value,
        steps=value,
        straggler_steps=None,
        deviation=value,
        deviation_p95=value,
        curve=(accuracy,),
        curve_s=None,
        **nothing,
    )


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--policies", "ugs,best"], "--policies: expected some of undivided, "),
        (["--policies", "ugs:delta=1"], "--policies: expected "),
        (["--policies", "lds:delta=much"], "--policies: expected a finite number from 0"),
        (["--policies", "ugs,,lds"], "--policies: expected values separated by commas"),
        (["--schemes", "wild"], "--schemes: expected some of iid, mild, severe or C/ALPHA"),
        (["--devices", "0"], "--devices: "),
        (["--devices", "many"], "--devices: expected whole numbers, found 'many'"),
        (["--devices", "900"], "--devices 900"),
        (["--stragglers", "2"], "--stragglers: "),
        (["--straggler-factor", "0.5"], "--straggler-factor: "),
        (["--seeds", "3-1"], "--seeds: expected a range such as 0-4"),
        (["--network-arguments", "[1]"], "--network-arguments: expected a JSON object"),
        (["--network", "mpl"], "mpl"),
        (["--samples", "5000"], "--samples: expected at most 400, found 5,000"),
        (["--data", "mnist"], "--data: expected fashion-mnist, digits or FILE.npz"),
        (["--data", "fashion-mnist", "--data-dir", "/nowhere"], "dataset-fashion-mnist"),
        (["--data", "/nowhere/x.npz"], "/nowhere/x.npz"),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_trained(
    study: RunCommand, small: list[object], tmp_path: Path, options: list[str], expected: str
) -> None:
    out = tmp_path / "study"
    ended = study(*small, *options, "--out", out)
    assert ended.code in {ExitCode.CONFIG, ExitCode.DATA}, ended
    assert expected in ended.err, ended.err
    assert ended.err.count("\n") == 1
    assert not any(out.rglob("*.json"))


def test_data_without_its_test_samples_is_refused(study: RunCommand, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4))
    ended = study("--data", tmp_path / "x.npz", "--out", tmp_path / "out")
    assert ended.code == ExitCode.CONFIG
    assert "--data: expected --test-data FILE.npz with it" in ended.err


def test_folder_that_cannot_be_written_is_named(
    study: RunCommand, small: list[object], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = study(*small, "--out", tmp_path / "file")
    assert ended.code == ExitCode.CONFIG
    assert f"--out {tmp_path}/file" in ended.err
