"""What the doctor finds of a disk on which a model is to be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.loader.test_doctor import clinic, failures
from tests.rigs.hub import Hub, serving
from tests.rigs.small_disk import mounted

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.loader.test_doctor import Clinic

__all__ = ["clinic"]


def test_doctor_finds_that_the_disk_has_no_room_for_the_model(
    clinic: Clinic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with mounted(tmp_path / "disk", "1m"), serving(Hub(files={"m.gguf": bytes(9_000_000)})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "disk/hub"))
        clinic.variables["HF_ENDPOINT"] = hub.url
        found = clinic.examine(GGUF_PATH="", GGUF_REPO_ID="me/model", GGUF_FILENAME="m.gguf")
    assert failures(found) == {"model": "DISK_FULL"}
    assert "takes 0.009 GB more" in found.checks[-1].detail
    assert found.exit_status == 6
