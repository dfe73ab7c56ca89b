"""An agent's settings file: what it may hold, and one line about what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.config import AgentSettings, TrialDelay, load_agent_settings
from wire.errors import ConfigError

LEAST: dict[str, Any] = {"device": "gw-1", "data": {"npz": {"path": "samples.npz"}}}


def _write(tmp_path: Path, document: object) -> str:
    path = tmp_path / "agent.yaml"
    path.write_bytes(msgspec.yaml.encode(document))
    return str(path)


def _error(tmp_path: Path, document: object) -> ConfigError:
    """The error that a document gives: one line that begins with the file."""
    path = _write(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        load_agent_settings(path)
    assert str(caught.value).startswith(f"{path}: {caught.value.field}: ")
    assert "\n" not in str(caught.value)
    return caught.value


def test_device_and_data_are_enough(tmp_path: Path) -> None:
    settings = load_agent_settings(_write(tmp_path, LEAST))
    assert (settings.device, settings.fleet) == ("gw-1", "lab")
    assert settings.compute.backward == "auto"


def test_everything_that_can_be_written_is_read(tmp_path: Path) -> None:
    whole = msgspec.to_builtins(
        msgspec.convert(
            LEAST
            | {
                "fleet": "plant",
                "mqtt": {"host": "broker", "tls": {"ca": "ca.pem"}},
                "compute": {"forward": "torch", "threads": 2, "max_batch": 32},
                "labels": {"site": "north"},
                "trial_delay": {"fixed_s": 0.5, "per_sample_s": 0.01},
            },
            AgentSettings,
        )
    )
    settings = load_agent_settings(_write(tmp_path, whole))
    assert msgspec.to_builtins(settings) == whole
    assert settings.trial_delay.seconds(100) == 1.5


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"device": "gw 1"}, "$", "expected device: 1 to 64 letters"),
        ({"device": "+"}, "$", "expected device"),
        ({"device": 7}, "$.device", "Expected `str`, got `int`"),
        ({"fleet": "a/b"}, "$", "expected fleet"),
        ({"devise": "gw-1"}, "$", "unknown field `devise`"),
        ({"data": {}}, "$.data", "exactly one of npz, idx, csv, function"),
        ({"data": {"npz": {}}}, "$.data.npz", "missing required field `path`"),
        ({"data": {"npz": {"path": "a", "z": 1}}}, "$.data.npz", "unknown field `z`"),
        ({"mqtt": {"port": 0}}, "$.mqtt", "a port from 1 to 65535"),
        ({"mqtt": {"port": "high"}}, "$.mqtt.port", "Expected `int`"),
        ({"mqtt": {"keepalive_s": 0}}, "$.mqtt", "keepalive_s >= 1"),
        ({"mqtt": {"max_payload_bytes": 10}}, "$.mqtt", "max_payload_bytes >= 1024"),
        ({"mqtt": {"reconnect_min_s": 9, "reconnect_max_s": 1}}, "$.mqtt", "reconnect_min_s <="),
        ({"mqtt": {"tls": {}}}, "$.mqtt.tls", "missing required field `ca`"),
        ({"compute": {"forward": "jax"}}, "$.compute.forward", "one of auto, onnxruntime, torch"),
        ({"compute": {"backward": "yes"}}, "$.compute.backward", "one of auto, none, onnxruntime"),
        ({"mqtt": {"client": "fast"}}, "$.mqtt.client", "one of quick, stock, found 'fast'"),
        ({"compute": {"threads": 0}}, "$.compute", "threads >= 1"),
        ({"compute": {"max_batch_bytes": 1000}}, "$.compute", "max_batch_bytes >= 1048576"),
        ({"compute": {"max_batch": 0}}, "$.compute", "max_batch >= 1"),
        ({"trial_delay": {"fixed_s": -1}}, "$.trial_delay", "fixed_s and per_sample_s >= 0"),
        ({"trial_delay": {"fixed_s": float("nan")}}, "$.trial_delay", "both finite"),
        ({"telemetry_every_s": 0}, "$", "telemetry_every_s > 0"),
        ({"max_bundle_bytes": 0}, "$", "max_bundle_bytes >= 1"),
        ({"labels": ["north"]}, "$.labels", "Expected `object`, got `array`"),
        ({"state_dir": 3}, "$.state_dir", "Expected `str | null`, got `int`"),
    ],
)
def test_wrong_field_gives_one_line_with_file_and_path(
    tmp_path: Path, change: dict[str, Any], field: str, words: str
) -> None:
    error = _error(tmp_path, LEAST | change)
    assert error.field == field
    assert words in error.expected


@pytest.mark.parametrize("missing", ["device", "data"])
def test_required_field_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    document = {name: value for name, value in LEAST.items() if name != missing}
    assert f"missing required field `{missing}`" in _error(tmp_path, document).expected


@pytest.mark.parametrize("document", [None, [], "agent", 3])
def test_file_that_holds_no_mapping_is_refused(tmp_path: Path, document: object) -> None:
    assert _error(tmp_path, document).field == "$"


def test_broken_yaml_and_unreadable_files_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("device: [unclosed\n  data: {")
    for path, words in [(broken, "valid YAML"), (tmp_path / "absent.yaml", "readable YAML file")]:
        with pytest.raises(ConfigError) as caught:
            load_agent_settings(str(path))
        text = str(caught.value)
        assert text.startswith(f"{path}: expected ")
        assert words in text
        assert "\n" not in text


def test_flags_replace_fields_by_name_and_none_leaves_them(tmp_path: Path) -> None:
    path = _write(tmp_path, LEAST)
    flags = {"device": "gw-2", "mqtt.host": "broker", "mqtt.port": None, "state_dir": None}
    settings = load_agent_settings(path, flags)
    assert (settings.device, settings.mqtt.host, settings.mqtt.port) == ("gw-2", "broker", 1883)


@pytest.mark.parametrize(("flag", "value"), [("mqtt.port", 99_999), ("device", "a/b")])
def test_flag_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, flag: str, value: object
) -> None:
    path = _write(tmp_path, LEAST)
    with pytest.raises(ConfigError) as caught:
        load_agent_settings(path, {flag: value})
    assert str(caught.value).startswith(f"{path}: $.{flag}: expected ")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TrialDelay().fixed_s = 1.0  # type: ignore[misc]
