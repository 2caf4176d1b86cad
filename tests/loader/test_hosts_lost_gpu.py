"""A GPU that is lost beside one that answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llama_loader import report
from tests.loader import test_loader
from tests.loader.test_doctor import H200

if TYPE_CHECKING:
    from pathlib import Path

LOST = "GPU 1 is left out: NVML: GPU is lost (15)"


def test_lost_gpu_is_on_the_doctors_page_although_another_one_answers() -> None:
    lines = report.host_lines(replace(H200, complaints=(LOST,)))
    assert f"  complaint: {LOST}" in lines


def test_lost_gpu_is_told_before_the_server_starts_on_another_one(tmp_path: Path) -> None:
    host = replace(test_loader.H200, gpus=(test_loader.BLACKWELL,), gpu_source="nvml")
    (note,) = test_loader.unused(tmp_path, replace(host, complaints=(LOST,)))
    assert (note.code, note.message) == ("DRIVER_COMPLAINT", LOST)
