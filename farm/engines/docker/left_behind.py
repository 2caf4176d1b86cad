"""Containers whose maker was killed: each carries its maker's name, and the next run removes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from docker.errors import APIError, NotFound

from farm import makers
from farm.engines.docker.connection import engine_errors

if TYPE_CHECKING:
    import docker

    from farm.engines.base import LineSink

LABEL: Final = "llama-farm"
"""On every container and image of ours, so that a person can find them: ``--filter label=…``."""
HOST_LABEL: Final = f"{LABEL}.host"
PID_LABEL: Final = f"{LABEL}.pid"
STARTED_LABEL: Final = f"{LABEL}.started"
_CONFLICT: Final = 409
"""Somebody else removes it already."""


def labels(key: str) -> dict[str, str]:
    """Return what a container of this process carries."""
    maker = makers.me()
    return {
        LABEL: key,
        HOST_LABEL: maker.host,
        PID_LABEL: str(maker.pid),
        STARTED_LABEL: str(maker.started),
    }


def sweep(client: docker.DockerClient, sink: LineSink) -> None:
    """Remove this host's containers whose maker is gone, and say so; no others are touched.

    Raises:
        EngineError: the engine is out of reach.
    """
    host = makers.host()
    if not host:
        return
    mine: dict[str, str | list[str] | bool] = {"label": f"{HOST_LABEL}={host}"}
    with engine_errors("ENGINE_FAILED", "the containers could not be listed"):
        listed = client.containers.list(all=True, filters=mine, ignore_removed=True)
    for container in listed:
        maker = maker_of(container)
        if maker is not None and maker.is_gone():
            remove_container(container)
            sink(
                f"note[LEFT_BEHIND]: removed container {container.name}: "
                f"process {maker.pid}, which had made it, was killed"
            )


def maker_of(container: Any) -> makers.Maker | None:
    """Return which process made a container; None where no run of the farm did."""
    told = container.labels
    pid, started = told.get(PID_LABEL, ""), told.get(STARTED_LABEL, "")
    if not (pid.isdecimal() and started.isdecimal()) or LABEL not in told:
        return None
    return makers.Maker(told.get(HOST_LABEL, ""), int(pid), int(started))


def remove_container(container: Any) -> None:
    """Remove a container and its own volumes, also while it runs.

    Raises:
        EngineError: the engine is out of reach.
    """
    with engine_errors("ENGINE_FAILED", f"container {container.name} could not be removed"):
        try:
            container.remove(force=True, v=True)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != _CONFLICT:
                raise
