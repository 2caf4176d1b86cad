"""Options that cannot be meant are refused before anything is started."""

import re

import pytest

from farm import targets
from farm.errors import UsageError
from farm.options import BuildRequest
from farm.request import require_buildable, resolve
from llama_loader.selection import building
from tests.rigs.refusals import refused


@pytest.mark.parametrize(
    "address",
    ["garbage", "tcp://127.0.0.1:notaport", "inproc://x", "tcp://:8786", "tcp://host", "",
     "tcp://host:99999", "tcp://host:0", "tcp://host:1/path"],
)  # fmt: skip
def test_what_is_no_schedulers_address_is_wrong_usage(address: str) -> None:
    with refused("SCHEDULER_INVALID", UsageError, status=2):
        resolve(BuildRequest(engine="dask", scheduler=address))


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:8786", "builder:8786", "tls://builder:1", "tcp://[::1]:8786"]
)
def test_a_schedulers_address_is_taken(address: str) -> None:
    resolve(BuildRequest(engine="dask", scheduler=address))


@pytest.mark.parametrize("option", [{"scheduler": "tcp://builder:8786"}, {"workers": 2}])
def test_a_cluster_without_its_engine_is_wrong_usage(option: dict[str, object]) -> None:
    with refused("CLUSTER_WITHOUT_DASK", UsageError):
        resolve(BuildRequest(**option))  # type: ignore[arg-type] - one of two options


@pytest.mark.parametrize(
    "capabilities", [("90",), ("60", "120"), ("75", "121"), ("60", "121"), ("37",), ("37", "90")]
)
def test_the_loaders_hint_names_a_possible_build_or_none(
    capabilities: tuple[str, ...],
) -> None:
    hint = building(capabilities)
    asked = re.search(r"invoke build-cuda(?: --line (\w+))? --archs '([0-9;]+)'", hint)
    table = targets.load()
    if asked:
        line = table.line(asked[1] or targets.DEFAULT_LINE)
        require_buildable(line, (targets.ArchSet("asked", asked[2]),))
        return
    assert "no line of the farm" in hint
    for name in ("cu124", "cu128", "cu130"):
        with pytest.raises(UsageError):
            require_buildable(table.line(name), (targets.ArchSet("asked", ";".join(capabilities)),))
