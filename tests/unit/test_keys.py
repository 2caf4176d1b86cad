"""Signing keys: made once, never shown, opened by a password where they have one."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from farm import trust
from farm.errors import PublishError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_the_secret_key_is_this_users_alone(tmp_path: Path) -> None:
    public = trust.generate(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert public in (tmp_path / "key.pub").read_text()
    signer = trust.signer(tmp_path / "key")
    assert signer.public_key == public
    trust.require_signed(b"x", signer.sign(b"x", "why"), public, what="x")
    secret = (tmp_path / "key").read_text().splitlines()[1]
    assert secret not in repr(signer)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    trust.generate(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(UsageError) as refused:
        trust.generate(tmp_path / "key")
    assert refused.value.code == "KEY_EXISTS"
    assert (tmp_path / "key").read_bytes() == before


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
        with pytest.raises(UsageError) as refused:
            trust.signer(tmp_path / "key")
        assert refused.value.code == "KEY_INVALID"
        assert "a long one" not in refused.value.render()


@pytest.mark.parametrize("text", ["", "nonsense", "RWQ=", "untrusted comment: x\nRWQ="])
def test_what_is_no_key(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SIGNING_KEY", text)
    with pytest.raises(UsageError) as refused:
        trust.signer(None)
    assert refused.value.code in {"KEY_MISSING", "KEY_INVALID"}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PublishError) as refused:
        trust.generate(tmp_path / "nowhere" / "key")
    assert refused.value.code == "KEY_NOT_WRITTEN"
    with pytest.raises(UsageError):
        trust.signer(tmp_path / "nowhere" / "key")
