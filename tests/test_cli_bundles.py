"""Keys and bundles on the command line: what is made, what is refused, and with which code."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from coordinator.cli.app import app as coordinator_app
from coordinator.config import RunSettings
from coordinator.model import build_model
from edge_agent.cli import app as agent_app
from tests.test_bundle import DATA, FILES, PLAIN
from wire.bundle import Bundle, build_bundle
from wire.command import exit_code_of
from wire.errors import SplitfleetError
from wire.exit_codes import ExitCode
from wire.signing import (
    SigningKey,
    TrustedKeys,
    build_signature_file,
    generate_key,
    load_signing_key,
    write_key_pair,
)


def _invoke(app: Any, *words: str) -> tuple[int, str]:
    """Exit code and what was said, as the command's main turns errors into both."""
    result: Result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, SplitfleetError):
        return int(exit_code_of(result.exception)), str(result.exception)
    return result.exit_code, result.output


def _coordinator(*words: str) -> tuple[int, str]:
    return _invoke(coordinator_app, *words)


def _agent(*words: str) -> tuple[int, str]:
    return _invoke(agent_app, *words)


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    made = generate_key()
    write_key_pair(made, tmp_path / "k.key", tmp_path / "k.pub")
    return made


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_new_key_is_written_once_and_shown(tmp_path: Path) -> None:
    code, out = _coordinator("keys", "new", "fleet", "--dir", str(tmp_path / "keys"), "--json")
    assert code == ExitCode.OK
    facts = json.loads(out)
    private = Path(facts["private"])
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for file in (facts["private"], facts["public"], facts["bundle_keys"]):
        code, out = _coordinator("keys", "show", file, "--json")
        assert (code, json.loads(out)["id"]) == (ExitCode.OK, facts["id"])
    before = private.read_bytes()
    code, out = _coordinator("keys", "new", "fleet", "--dir", str(tmp_path / "keys"))
    assert (code, private.read_bytes()) == (ExitCode.CONFIG, before)
    assert "never overwritten" in out


def test_key_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    code, out = _coordinator("keys", "new", "../fleet", "--dir", str(tmp_path))
    assert code == ExitCode.USAGE
    assert "expected a name" in out


def test_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    file = _write(tmp_path / "x.pub", b"hello")
    assert _coordinator("keys", "show", file) == (
        ExitCode.CONFIG,
        f"{file}: expected an Ed25519 key in PEM",
    )


def test_show_tells_what_a_bundle_is(tmp_path: Path, key: SigningKey) -> None:
    signed = build_bundle(PLAIN, FILES, sign=lambda m: build_signature_file(m, [key]))
    file = _write(tmp_path / "s.bundle", signed)
    code, out = _agent("bundle", "show", file)
    assert code == ExitCode.OK
    assert "digits 3" in out
    assert f"not checked; claims to be by {key.public.key_id}" in out
    code, out = _agent("bundle", "show", file, "--json")
    document = json.loads(out)
    assert document["manifest"]["name"] == "digits"
    assert document["signatures"] == [key.public.key_id]


def test_verify_accepts_what_the_key_signed(tmp_path: Path, key: SigningKey) -> None:
    signed = build_bundle(PLAIN, FILES, sign=lambda m: build_signature_file(m, [key]))
    file = _write(tmp_path / "s.bundle", signed)
    words = ("bundle", "verify", file, "--no-self-test", "--json")
    code, out = _agent(*words, "--key", str(tmp_path / "k.pub"))
    assert (code, json.loads(out)["signed_by"]) == (ExitCode.OK, key.public.key_id)
    code, out = _agent(*words, "--key", generate_key().public.text)
    assert code == ExitCode.DATA
    assert "expected a signature of key" in out


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "expected a whole zip archive"),
        (DATA[:-50], "expected a whole zip archive"),
        (
            build_bundle(msgspec.structs.replace(PLAIN, expires="2025-02-01T00:00:00Z"), FILES),
            "expired on 2025-02-01",
        ),
        (
            build_bundle(msgspec.structs.replace(PLAIN, minimum_agent="99.0"), FILES),
            "expected agent 99.0 or later",
        ),
        (DATA, "client_forward.onnx"),
    ],
    ids=["empty", "truncated", "expired", "agent", "self-test"],
)
def test_verify_says_in_one_line_why_an_agent_would_refuse(
    tmp_path: Path, data: bytes, detail: str
) -> None:
    file = _write(tmp_path / "x.bundle", data)
    config = tmp_path / "agent.yaml"
    config.write_text(
        "device: gw\ndata: {npz: {path: x.npz}}\n"
        "compute: {forward: onnxruntime, backward: onnxruntime}\n"
    )
    code, out = _agent("bundle", "verify", file, "-c", str(config))
    assert code == ExitCode.DATA
    assert file in out
    assert detail in out
    assert "\n" not in out


def test_verify_takes_keys_from_the_agents_file(tmp_path: Path, key: SigningKey) -> None:
    config = tmp_path / "agent.yaml"
    text = "device: gw\ndata: {npz: {path: x.npz}}\nbundle_keys: [%s]\n"
    config.write_text(text % (tmp_path / "k.pub"))
    file = _write(tmp_path / "plain.bundle", DATA)
    code, out = _agent("bundle", "verify", file, "-c", str(config), "--no-self-test")
    assert code == ExitCode.DATA
    assert "expected a signed bundle" in out
    config.write_text(text % (tmp_path / "absent.pub"))
    code, out = _agent("bundle", "verify", file, "-c", str(config), "--no-self-test")
    assert code == ExitCode.CONFIG
    assert out.startswith(f"{config}: $.bundle_keys[0]: ")


def test_file_that_is_not_there_is_a_matter_of_configuration(tmp_path: Path) -> None:
    code, out = _agent("bundle", "show", str(tmp_path / "absent"))
    assert code == ExitCode.CONFIG
    assert "expected a bundle" in out


def test_export_signs_and_verify_runs_it(tmp_path: Path, key: SigningKey) -> None:
    file = str(tmp_path / "e.bundle")
    network = ("--network", "mlp", "--input-shape", "5", "--classes", "3", "--frozen")
    release = ("--sequence", "7", "--expires", "90d", "--minimum-agent", "0.1")
    code, out = _coordinator(
        "export", *network, *release, "--key", str(tmp_path / "k.key"), "--out", file
    )
    assert code == ExitCode.OK, out
    assert "sequence 7" in out
    assert f"signed by {key.public.key_id}" in out
    code, out = _agent("bundle", "verify", file, "--key", key.public.text, "--json")
    assert code == ExitCode.OK, out
    document = json.loads(out)
    assert document["manifest"]["sequence"] == 7
    assert document["self_test"]["max_error"] < 1e-3


@pytest.mark.parametrize(
    ("words", "detail"),
    [
        (("--expires", "soon"), "--expires"),
        (("--expires", "2020-01-01"), "a time to come"),
        (("--minimum-agent", "new"), "--minimum-agent"),
        (("--sequence", "-1"), "--sequence"),
    ],
)
def test_release_that_makes_no_sense_is_refused_before_the_work(
    tmp_path: Path, words: tuple[str, ...], detail: str
) -> None:
    network = ("--network", "mlp", "--input-shape", "5", "--classes", "3")
    code, out = _coordinator("export", *network, *words, "--out", str(tmp_path / "x"))
    assert code == ExitCode.USAGE
    assert detail in " ".join(out.replace("│", " ").split())


def test_key_that_cannot_sign_is_named(tmp_path: Path, key: SigningKey) -> None:
    network = ("--network", "mlp", "--input-shape", "5", "--classes", "3")
    public = str(tmp_path / "k.pub")
    code, out = _coordinator("export", *network, "--key", public, "--out", str(tmp_path / "x"))
    assert code == ExitCode.CONFIG
    assert out == f"--key: {public}: expected an Ed25519 private key in PEM, without a password"


def test_runs_bundle_is_signed_and_stays_the_same_on_resume(
    tmp_path: Path, key: SigningKey
) -> None:
    document = {
        "out": str(tmp_path / "run"),
        "network": {"name": "mlp", "cut": "block1", "arguments": {"hidden": [8, 6]}},
        "bundle_key": str(tmp_path / "k.key"),
    }
    trust = TrustedKeys((load_signing_key(tmp_path / "k.key").public,))
    digests = set()
    for _ in range(2):
        settings = msgspec.convert(document, RunSettings)
        model = build_model(settings, input_shape=(5,), classes=3, source="test")
        assert Bundle.from_bytes(model.bundle_bytes, trust=trust).signed_by == key.public.key_id
        digests.add(model.digest)
    assert len(digests) == 1
