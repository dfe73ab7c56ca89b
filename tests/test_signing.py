"""Signatures: only what a trusted key has signed, byte for byte, is taken."""

from __future__ import annotations

import base64
import io
import json
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.test_bundle import DATA, FILES, PLAIN
from wire.bundle import CLIENT_FORWARD, MANIFEST, SIGNATURE, Bundle, build_bundle, sign_bundle
from wire.errors import ConfigError, ModelError
from wire.signing import (
    PublicKey,
    SignatureError,
    SigningKey,
    TrustedKeys,
    build_signature_file,
    generate_key,
    load_public_key,
    load_signing_key,
    load_trusted_keys,
    write_key_pair,
)

KEY = generate_key()
OTHER = generate_key()
TRUST = TrustedKeys((KEY.public,))


def _sign(*keys: SigningKey) -> bytes:
    return build_bundle(PLAIN, FILES, sign=lambda manifest: build_signature_file(manifest, keys))


def _files(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _repack(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_signed_bundle_names_its_key() -> None:
    bundle = Bundle.from_bytes(_sign(KEY), trust=TRUST)
    assert bundle.signed_by == KEY.public.key_id
    assert Bundle.from_bytes(_sign(KEY)).signed_by is None, "nothing was checked"


def test_signature_is_plain_ed25519_over_the_manifest() -> None:
    files = _files(_sign(KEY))
    (entry,) = json.loads(files[SIGNATURE])["signatures"]
    KEY.private.public_key().verify(base64.b64decode(entry["signature"]), files[MANIFEST])


def test_any_trusted_key_will_do_so_that_keys_can_be_changed() -> None:
    both = TrustedKeys((KEY.public, OTHER.public))
    assert Bundle.from_bytes(_sign(OTHER), trust=both).signed_by == OTHER.public.key_id
    assert Bundle.from_bytes(_sign(OTHER, KEY), trust=TRUST).signed_by == KEY.public.key_id


def test_unsigned_bundle_is_refused_where_keys_are_known() -> None:
    with pytest.raises(SignatureError, match="expected a signed bundle"):
        Bundle.from_bytes(DATA, trust=TRUST)


def test_unknown_key_is_refused_by_its_id() -> None:
    with pytest.raises(SignatureError, match=OTHER.public.key_id):
        Bundle.from_bytes(_sign(OTHER), trust=TRUST)


def test_changed_manifest_is_refused_although_all_hashes_fit() -> None:
    files = _files(_sign(KEY))
    files[MANIFEST] = files[MANIFEST].replace(b'"version": "3"', b'"version": "4"')
    changed = _repack(files)
    assert Bundle.from_bytes(changed).manifest.version == "4"
    with pytest.raises(SignatureError, match="did not sign this manifest"):
        Bundle.from_bytes(changed, trust=TRUST)


def test_changed_file_is_refused_by_its_hash() -> None:
    files = _files(_sign(KEY))
    files[CLIENT_FORWARD] = files[CLIENT_FORWARD][:-1] + b"X"
    with pytest.raises(ModelError, match=CLIENT_FORWARD):
        Bundle.from_bytes(_repack(files), trust=TRUST)


def _signature_file(*words: str) -> bytes:
    """Key, signature, key, signature..."""
    pairs = zip(words[::2], words[1::2], strict=True)
    signatures = [{"key": key, "signature": signature} for key, signature in pairs]
    return json.dumps({"schema": 1, "signatures": signatures}).encode()


@pytest.mark.parametrize(
    "signature_file",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff", id="bytes"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"schema":2,"signatures":[]}', id="schema"),
        pytest.param(b'{"schema":1,"signatures":[]}', id="none"),
        pytest.param(_signature_file(KEY.public.key_id, "??"), id="no-base64"),
        pytest.param(_signature_file(KEY.public.key_id, ""), id="no-bytes"),
        pytest.param(_signature_file(*["a", "b"] * 9), id="too-many"),
    ],
)
def test_signature_file_that_is_none_is_refused(signature_file: bytes) -> None:
    files = _files(_sign(KEY)) | {SIGNATURE: signature_file}
    with pytest.raises(SignatureError):
        Bundle.from_bytes(_repack(files), trust=TRUST)


def test_signature_comes_before_the_manifest_is_read() -> None:
    """What nobody has signed must not even reach the parser."""
    files = _files(_sign(KEY)) | {MANIFEST: b"not json"}
    with pytest.raises(SignatureError):
        Bundle.from_bytes(_repack(files), trust=TRUST)


def test_bundle_can_be_signed_again_without_another_change() -> None:
    again = sign_bundle(DATA, lambda manifest: build_signature_file(manifest, [KEY]))
    assert again == _sign(KEY)
    assert Bundle.from_bytes(again, trust=TRUST).manifest == Bundle.from_bytes(DATA).manifest


def test_key_files_come_back_and_only_the_owner_reads_the_private_one(tmp_path: Path) -> None:
    private, public = tmp_path / "k.key", tmp_path / "k.pub"
    write_key_pair(KEY, private, public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert load_signing_key(private).public == KEY.public
    assert load_public_key(str(public)) == KEY.public
    assert load_public_key(KEY.public.text) == KEY.public


def test_openssl_reads_the_key_files(tmp_path: Path) -> None:
    write_key_pair(KEY, tmp_path / "k.key", tmp_path / "k.pub")
    command = ["openssl", "pkey", "-in", str(tmp_path / "k.key"), "-pubout"]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    assert out == (tmp_path / "k.pub").read_bytes()


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    private, public = tmp_path / "k.key", tmp_path / "k.pub"
    write_key_pair(KEY, private, public)
    for taken in (private, public):
        kept = taken.read_bytes()
        with pytest.raises(ConfigError, match="never overwritten"):
            write_key_pair(OTHER, private, public)
        assert taken.read_bytes() == kept
        private.unlink(missing_ok=True)


def test_settings_errors_name_file_field_and_what_was_expected(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pub"
    nonsense.write_text("hello")
    for text in (str(nonsense), str(tmp_path / "absent.pub"), "AAAA", ""):
        with pytest.raises(ConfigError, match=r"agent.yaml: \$\.bundle_keys\[1\]: ") as caught:
            load_trusted_keys([KEY.public.text, text], source="agent.yaml")
        assert "\n" not in str(caught.value)
    assert load_trusted_keys([]) is None


def test_private_key_in_place_of_the_public_one_is_not_taken(tmp_path: Path) -> None:
    write_key_pair(KEY, tmp_path / "k.key", tmp_path / "k.pub")
    with pytest.raises(ConfigError, match="Ed25519 public key"):
        load_public_key(str(tmp_path / "k.key"))
    with pytest.raises(ConfigError, match="Ed25519 private key"):
        load_signing_key(tmp_path / "k.pub")


def test_service_manager_may_hand_the_private_key_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_key_pair(KEY, tmp_path / "k.key", tmp_path / "k.pub")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_signing_key("credential:k.key").public == KEY.public


def test_key_id_is_pinned() -> None:
    assert PublicKey(bytes(32)).key_id == "66687aadf862bd77"
