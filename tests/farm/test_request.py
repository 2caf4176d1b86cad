"""Options that cannot be meant are refused before anything is started."""

import pytest

from farm.errors import UsageError
from farm.request import BuildRequest, resolve
from tests.rigs.refusals import refused


@pytest.mark.parametrize(
    "address",
    ["garbage", "tcp://127.0.0.1:notaport", "inproc://x", "tcp://:8786", "tcp://host", "",
     "tcp://host:99999", "tcp://host:0", "tcp://host:1/path"],
)  # fmt: skip
def test_what_is_no_schedulers_address_is_wrong_usage(address: str) -> None:
    with refused("SCHEDULER_INVALID", UsageError) as caught:
        resolve(BuildRequest(engine="dask", scheduler=address))
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:8786", "builder:8786", "tls://builder:1", "tcp://[::1]:8786"]
)
def test_a_schedulers_address_is_taken(address: str) -> None:
    resolve(BuildRequest(engine="dask", scheduler=address))


@pytest.mark.parametrize("option", [{"scheduler": "tcp://builder:8786"}, {"workers": 2}])
def test_a_cluster_without_its_engine_is_wrong_usage(option: dict[str, object]) -> None:
    with refused("CLUSTER_WITHOUT_DASK", UsageError):
        resolve(BuildRequest(**option))  # type: ignore[arg-type] - one of two options
