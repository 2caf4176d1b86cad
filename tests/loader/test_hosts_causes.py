"""Ends of llama-server that no restart cures."""

from __future__ import annotations

import pytest

from llama_loader import server_log
from llama_loader.errors import HostError


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (
            (
                "llama-server: relocation error: /l/libcublas.so.12: symbol x version"
                " libcublasLt.so.12 not defined in file libcublasLt.so.12 with link time reference"
            ),
            "LIBRARY_MISMATCH",
        ),
        ("Error relocating /r/llama-server: __fprintf_chk: symbol not found", "LIBRARY_MISMATCH"),
        (
            "Error loading shared library libstdc++.so.6: No such file or directory (needed by x)",
            "LIBRARY_MISMATCH",
        ),
        ("0.00.1.0 E CUDA error: PTX JIT compiler library not found", "LIBRARY_MISSING"),
        ("0.00.1.0 E CUDA error: no CUDA-capable device is detected", "NO_DEVICE"),
        ("0.00.1.0 E CUDA error: system not yet initialized", "NO_DEVICE"),
    ],
)
def test_end_that_no_restart_cures_is_the_hosts_and_quotes_its_line(line: str, code: str) -> None:
    error = server_log.explain(-6, [line], loading=True)
    assert isinstance(error, HostError)
    assert (error.code, error.exit_status) == (code, 5)
    assert line.removeprefix("0.00.1.0 E ") in error.message


def test_other_errors_of_cuda_are_tried_again() -> None:
    error = server_log.explain(-6, ["CUDA error: unspecified launch failure"], loading=False)
    assert error.code == "CUDA_ERROR"
