"""What a machine without a Docker engine is told, and that nothing is left open there."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING

import pytest

from farm.engines.docker import connect
from farm.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("listener", ["nothing", "a file"])
def test_no_engine_is_one_error_and_leaves_no_socket(
    listener: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "docker.sock"
    if listener == "a file":
        place.touch()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(EngineError) as refused:
            connect()
        gc.collect()
    assert refused.value.code == "ENGINE_NOT_RUNNING"
    assert [one for one in caught if one.category is ResourceWarning] == []


def test_an_engine_behind_ssh_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "ssh://somebody@127.0.0.1:1")
    with pytest.raises(EngineError) as refused:
        connect()
    assert refused.value.code == "ENGINE_SSH_MISSING"
    assert "paramiko" in refused.value.hint


@pytest.mark.parametrize("address", ["tcp://1.2.3.4:notaport", "tcp://127.0.0.1:99999", "tcp://["])
def test_an_address_that_is_none_is_one_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    with pytest.raises(EngineError) as refused:
        connect()
    assert refused.value.code in {"ENGINE_ADDRESS_INVALID", "ENGINE_NOT_RUNNING"}
    assert "DOCKER_HOST" in refused.value.render()
