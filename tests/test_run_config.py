"""A run's settings file: what it may hold, and one line about what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import RunSettings, override
from coordinator.rounds import RoundSettings
from wire.errors import ConfigError
from wire.messages import Precision
from wire.settings import load_settings


def _error(tmp_path: Path, document: object) -> ConfigError:
    """The error that a document gives: one line that begins with the file."""
    path = tmp_path / "run.yaml"
    path.write_bytes(msgspec.yaml.encode(document))
    with pytest.raises(ConfigError) as caught:
        load_settings(path, RunSettings)
    assert str(caught.value).startswith(f"{path}: {caught.value.field}: ")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("document", "field", "words"),
    [
        ({"run": "a b"}, "$", "expected run: 1 to 64 letters"),
        ({"fleet": "#"}, "$", "expected fleet: 1 to 64 letters"),
        ({"epoch": 3}, "$", "unknown field `epoch`"),
        ({"epochs": 0}, "$", "expected epochs >= 1, received 0"),
        ({"epochs": "many"}, "$.epochs", "Expected `int`, got `str`"),
        ({"global_batch": 0}, "$", "expected global_batch >= 1"),
        ({"min_devices": -1}, "$", "expected min_devices >= 1"),
        ({"ahead": 0}, "$", "expected ahead >= 1"),
        ({"threads": 0}, "$", "expected threads >= 1"),
        ({"seed": -1}, "$", "expected seed >= 0"),
        ({"precision": "fp8"}, "$.precision", "expected one of fp32, fp16, int8, found 'fp8'"),
        ({"network": {"layers": 3}}, "$.network", "unknown field `layers`"),
        ({"network": {"input_shape": 8}}, "$.network.input_shape", "got `int`"),
        ({"network": {"input_shape": [1, "x"]}}, "$.network.input_shape[1]", "got `str`"),
        ({"network": {"classes": "ten"}}, "$.network.classes", "got `str`"),
        ({"test_data": {}}, "$.test_data", "exactly one of"),
        ({"mqtt": {"tls": {"ca": 1}}}, "$.mqtt.tls.ca", "Expected `str`"),
        ({"policy": {"name": "best"}}, "$.policy.name", "expected one of fls, fpls, ugs, lds"),
        ({"policy": {"refit_every": 0}}, "$.policy", "refit_every >= 1"),
        (
            {"policy": {"delta": 1, "deviation_budget": 0.1}},
            "$.policy",
            "delta or deviation_budget, received both",
        ),
        ({"policy": {"delays_s": {"a": -1}}}, "$.policy", "every entry of delays_s > 0"),
        ({"optimiser": {"name": "lbfgs"}}, "$.optimiser.name", "one of sgd, adam, adamw"),
        ({"optimiser": {"lr": 0}}, "$.optimiser", "expected lr > 0"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "$.optimiser", "betas within [0, 1)"),
        ({"optimiser": {"betas": [0.9]}}, "$.optimiser.betas", "length 2"),
        ({"optimiser": {"nesterov": True}}, "$.optimiser", "momentum > 0 with nesterov"),
        ({"client_optimiser": {"lr": -1}}, "$.client_optimiser", "expected lr > 0"),
        ({"deadline": {"fixed_s": 0}}, "$.deadline", "fixed_s > 0"),
        ({"deadline": {"factor": 1}}, "$.deadline", "factor > 1"),
        ({"deadline": {"max_misses": 0}}, "$.deadline", "max_misses >= 1"),
        ({"checkpoint": {"every_steps": 0}}, "$.checkpoint", "every_steps >= 1"),
        ({"checkpoint": {"keep": 0}}, "$.checkpoint", "keep >= 1"),
    ],
)
def test_wrong_field_gives_one_line_with_file_and_path(
    tmp_path: Path, document: dict[str, Any], field: str, words: str
) -> None:
    error = _error(tmp_path, document)
    assert error.field == field
    assert words in error.expected


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_of_an_optimiser_must_be_finite(tmp_path: Path, field: str, value: float) -> None:
    assert _error(tmp_path, {"optimiser": {field: value}}).field == "$.optimiser"


@pytest.mark.parametrize(
    "document",
    [
        {"policy": {"delta": float("nan")}},
        {"policy": {"deviation_budget": float("nan")}},
        {"policy": {"delta": float("inf")}},
        {"policy": {"delays_s": {"a": float("inf")}}},
        {"deadline": {"fixed_s": float("nan")}},
        {"deadline": {"factor": float("nan")}},
        {"deadline": {"return_grace_s": float("nan")}},
        {"network": {"input_shape": [0, 8]}},
        {"network": {"input_shape": []}},
        {"network": {"classes": 1}},
    ],
    ids=str,
)
def test_settings_that_would_only_fail_later_are_refused_at_the_start(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    (name,) = document
    error = _error(tmp_path, document)
    assert error.field is not None
    assert error.field.startswith(f"$.{name}")


def test_empty_mapping_is_a_run_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    settings = load_settings(path, RunSettings)
    assert settings == RunSettings()
    assert settings.directory == Path("runs/run")
    assert settings.state_url == "sqlite:///runs/run/state.sqlite"


def test_folder_and_state_can_be_chosen() -> None:
    settings = RunSettings(out="elsewhere", state="redis://host/0")
    assert (settings.directory, settings.state_url) == (Path("elsewhere"), "redis://host/0")
    assert RunSettings(out="elsewhere").state_url == "sqlite:///elsewhere/state.sqlite"


def test_round_settings_are_taken_over() -> None:
    settings = RunSettings(epochs=3, global_batch=17, min_devices=2, ahead=9, seed=5)
    assert settings.round_settings() == RoundSettings(
        epochs=3,
        global_batch=17,
        min_devices=2,
        ahead=9,
        seed=5,
        policy=settings.policy,
        deadline=settings.deadline,
    )


def test_flags_replace_fields_by_dotted_name_and_none_leaves_them() -> None:
    settings = RunSettings(epochs=3)
    changed = override(
        settings,
        {"policy.name": "ugs", "epochs": None, "precision": "int8", "deadline.fixed_s": 2.0},
        source="--flags",
    )
    assert (changed.policy.name.value, changed.epochs) == ("ugs", 3)
    assert (changed.precision, changed.deadline.fixed_s) == (Precision.INT8, 2.0)
    assert settings == RunSettings(epochs=3)


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("policy.name", "best", "$.policy.name"),
        ("epochs", 0, "$"),
        ("mqtt.port", 0, "$.mqtt"),
        ("precision", "fp8", "$.precision"),
    ],
)
def test_flag_that_does_not_fit_is_refused_with_its_path(
    flag: str, value: object, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RunSettings(), {flag: value}, source="run.yaml")
    assert (caught.value.source, caught.value.field) == ("run.yaml", field)
