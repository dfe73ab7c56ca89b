"""Secrets by name: what a settings file may say, and what is said when one is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.store import open_store
from wire.credentials import read_secret, secret_path
from wire.errors import ConfigError
from wire.inbox import Inbox
from wire.mqtt import MqttConnection, MqttSettings
from wire.settings import parse_settings
from wire.tls import TlsSettings


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a service manager names, empty."""
    directory = tmp_path / "credentials"
    directory.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    return directory


def connect(settings: MqttSettings) -> MqttConnection:
    return MqttConnection(
        settings,
        client_id="test",
        fleet="test",
        subscriptions=[],
        inbox=Inbox(),
        next_boot=lambda: 1,
        build_will=None,
    )


def test_path_stays_as_it_is() -> None:
    assert secret_path("secrets/password", field="$.x", environ={}) == Path("secrets/password")


@pytest.mark.parametrize("file", ["mqtt-password", "splitfleet_mqtt-password"])
def test_credential_is_found_under_its_own_name_and_under_systemds(
    credentials: Path, file: str
) -> None:
    (credentials / file).write_text("geheim\n")
    assert read_secret("credential:mqtt-password", field="$.x") == "geheim"


def test_own_name_comes_first(credentials: Path) -> None:
    (credentials / "key").write_text("own")
    (credentials / "splitfleet_key").write_text("systemd's")
    assert read_secret("credential:key", field="$.x") == "own"


def test_missing_credential_is_named_with_those_that_are_there(credentials: Path) -> None:
    (credentials / "splitfleet_tls.key").touch()
    with pytest.raises(ConfigError) as caught:
        read_secret("credential:mqtt-password", field="$.mqtt.password_file")
    assert str(caught.value) == (
        f"{credentials}: $.mqtt.password_file: expected a credential 'mqtt-password', found tls.key"
    )


def test_by_hand_it_says_which_variable_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"\$\.x: expected \$CREDENTIALS_DIRECTORY .*folder"):
        secret_path("credential:key", field="$.x", environ={})


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "gone")}
    with pytest.raises(ConfigError, match=r"gone: .*readable folder"):
        secret_path("credential:key", field="$.x", environ=environ)


@pytest.mark.parametrize("name", ["", "../shadow", "a/b", ".hidden", "a b"])
def test_name_that_could_leave_the_folder_is_refused(credentials: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected credential:NAME"):
        secret_path(f"credential:{name}", field="$.x")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        read_secret(str(tmp_path / "password"), field="$.x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "password").touch(mode=0o000)
    with pytest.raises(ConfigError, match=r"password: .*Permission denied"):
        read_secret(str(tmp_path / "password"), field="$.x")


def test_broker_password_comes_from_a_credential(credentials: Path) -> None:
    settings = MqttSettings(username="gw-01", password_file="credential:mqtt-password")  # noqa: S106
    with pytest.raises(ConfigError, match=r"\$\.mqtt\.password_file.*'mqtt-password'"):
        connect(settings)
    (credentials / "mqtt-password").write_text("geheim\n")
    assert connect(settings)._client.password == "geheim"  # noqa: S105


def test_missing_tls_key_is_named_by_its_field(credentials: Path) -> None:
    (credentials / "ca.crt").touch()
    (credentials / "tls.crt").touch()
    tls = TlsSettings(ca="credential:ca.crt", cert="credential:tls.crt", key="credential:tls.key")
    with pytest.raises(ConfigError, match=r"\$\.mqtt\.tls\.key: .*'tls.key', found ca.crt"):
        connect(MqttSettings(tls=tls))


def test_state_store_with_a_password_is_named_by_a_credential(
    credentials: Path, tmp_path: Path
) -> None:
    (credentials / "state-url").write_text(f"sqlite:///{tmp_path / 'state.sqlite'}\n")
    store = open_store("credential:state-url")
    store.close()
    assert (tmp_path / "state.sqlite").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password_file: /etc/x", "expected username beside password_file"),
        ("tls: {ca: a, key: b}", "expected cert beside key"),
    ],
)
def test_half_of_a_pair_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_settings(text.encode(), MqttSettings, source="agent.yaml")
