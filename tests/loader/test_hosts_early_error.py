"""An error that many other lines follow."""

from __future__ import annotations

import io

from llama_loader import server_log


def test_first_error_counts_whatever_the_server_prints_after_it() -> None:
    log = server_log.ServerLog()
    first = "0.00.1.0 E CUDA error: the provided PTX was compiled with an unsupported toolchain."
    log._read(io.BytesIO("\n".join([first, *["0.00.2.0 I more"] * 300, ""]).encode()))
    error = server_log.explain(-6, log.tail(), loading=True)
    assert error.code == "DRIVER_TOO_OLD"
    assert "unsupported toolchain" in error.message
