"""What is quoted of a llama-server that cannot list its devices, or cannot be started."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llama_loader import devices
from llama_loader.errors import HostError
from llama_loader.server import Server
from tests.loader.test_devices import ENVIRON
from tests.loader.test_server import plan

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Impostor

WHOLE = f"the line that matters {'.' * 250} ends here"


def test_lines_of_a_device_list_that_failed_are_quoted_whole(impostor: Impostor) -> None:
    runtime = impostor.behave(list={"text": f"{WHOLE}\n{'x' * 200}\n", "status": 3})
    with pytest.raises(HostError) as caught:
        devices.list_devices(runtime, ENVIRON)
    assert caught.value.code == "DEVICE_LIST_FAILED"
    assert WHOLE in caught.value.message


def test_program_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    with pytest.raises(HostError) as caught, Server(plan(tmp_path)):
        pass
    assert f"{tmp_path}/llama-server: Permission denied" in caught.value.message
