"""Signing keys: made once, never shown, opened by a password where they have one."""

import stat
from pathlib import Path

import pytest

from farm import trust
from farm.errors import PublishError, UsageError
from tests.rigs.refusals import refused


def test_the_secret_key_is_this_users_alone(tmp_path: Path) -> None:
    public = trust.generate(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert public in (tmp_path / "key.pub").read_text()
    signer = trust.signer(tmp_path / "key")
    assert signer.public_key == public
    trust.require_signed(b"x", signer.sign(b"x", "why"), public, what="x")
    secret = (tmp_path / "key").read_text().splitlines()[1]
    assert secret not in repr(signer)


@pytest.mark.parametrize("there", [("key", "key.pub"), ("key",), ("key.pub",)])
def test_a_key_is_never_overwritten_and_no_half_of_a_pair_is_left(
    there: tuple[str, ...], tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / name).write_text("another's")
    with refused("KEY_EXISTS", UsageError):
        trust.generate(tmp_path / "key")
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == dict.fromkeys(there, "another's")


@pytest.mark.parametrize("whole", [True, False])
def test_a_variable_takes_the_file_or_its_line(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = trust.generate(tmp_path / "key")
    text = (tmp_path / "key").read_text()
    monkeypatch.setenv("FARM_SIGNING_KEY", text if whole else text.splitlines()[1])
    assert trust.signer(None).public_key == public


def test_an_encrypted_key_needs_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_SIGNING_PASSWORD", "a long one")
    public = trust.generate(tmp_path / "key")
    assert trust.signer(tmp_path / "key").public_key == public
    for wrong in ("", "another"):
        monkeypatch.setenv("FARM_SIGNING_PASSWORD", wrong)
        with refused("KEY_INVALID", UsageError) as caught:
            trust.signer(tmp_path / "key")
        assert "a long one" not in caught.value.render()
        assert ("FARM_SIGNING_PASSWORD is not set" in caught.value.message) is (not wrong)


def test_public_key_in_place_of_the_secret_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust.generate(tmp_path / "key")
    with refused("KEY_INVALID", UsageError, "key.pub holds the public key"):
        trust.signer(tmp_path / "key.pub")
    assert capsys.readouterr().err == ""  # that others may read it is no mistake


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "KEY_MISSING"),
        *(
            (text, "KEY_INVALID")
            for text in ("nonsense", "RWQ=", "RWQ\udcff=", "untrusted comment: x\nRWQ=")
        ),
        (__file__, "KEY_INVALID"),  # a file's name where its text is meant
    ],
)
def test_text_or_file_that_is_no_signing_key_is_refused(
    text: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_SIGNING_KEY", text)
    with refused(code, UsageError, hint="--key its file" if text == __file__ else ""):
        trust.signer(None)


def test_key_in_a_folder_that_does_not_exist_is_one_error(tmp_path: Path) -> None:
    with refused("KEY_NOT_WRITTEN", PublishError, hint="--out FILE"):
        trust.generate(tmp_path / "nowhere" / "key")
    with pytest.raises(UsageError):
        trust.signer(tmp_path / "nowhere" / "key")


def test_a_key_with_a_disk_s_line_ends_of_another_system(tmp_path: Path) -> None:
    public = trust.generate(tmp_path / "key")
    content = (tmp_path / "key").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "key").write_bytes(content)
    assert trust.signer(tmp_path / "key").public_key == public


def test_a_key_that_others_may_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust.generate(tmp_path / "key")
    trust.signer(tmp_path / "key")
    assert capsys.readouterr().err == ""
    (tmp_path / "key").chmod(0o640)
    trust.signer(tmp_path / "key")
    assert capsys.readouterr().err.startswith("note[KEY_READABLE]: ")


@pytest.mark.parametrize("number", range(60))
def test_a_key_or_signature_that_was_damaged_is_one_clear_error(
    number: int, tmp_path: Path
) -> None:
    public = trust.generate(tmp_path / "key")
    whole = (tmp_path / "key").read_bytes()
    signature = trust.signer(tmp_path / "key").sign(b"x", "why")
    at = number * len(signature) // 60
    for damaged in (signature[:at], b"\0" + signature[at:], signature[at:]):
        if damaged != signature:
            with pytest.raises(PublishError) as caught:
                trust.require_signed(b"x", damaged, public, what="x")
            assert caught.value.code in {"SIGNATURE_DAMAGED", "SIGNED_BY_ANOTHER_KEY"}
    (tmp_path / "key").write_bytes(whole[: number * len(whole) // 62])
    with pytest.raises(UsageError):
        trust.signer(tmp_path / "key")


def test_a_public_key_is_its_line_or_its_file(tmp_path: Path) -> None:
    public = trust.generate(tmp_path / "key")
    for text in (public, f" {public}\r\n", (tmp_path / "key.pub").read_text()):
        assert trust.require_public(text) == public
    for wrong in ("", "RWx", public[:-1], (tmp_path / "key").read_text()):
        with refused("KEY_INVALID", UsageError) as caught:
            trust.require_public(wrong)
        assert len(wrong) < 60 or wrong.split()[-1][:20] not in caught.value.render()
