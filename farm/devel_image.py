"""Which devel image a build stands on, where none was named: the line's, or one of packages."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from farm import pipeline, targets
from farm.engines.docker import DockerImages, connect
from farm.errors import EngineError
from farm.inputs import pins

if TYPE_CHECKING:
    from farm.request import BuildRequest
    from farm.terminal.report import BuildReport


def with_image(request: BuildRequest, line: str, report: BuildReport) -> BuildRequest:
    """Name the line's pinned image if it can be had, else one made from packages.

    Without an engine the request stays as it is: ``pipeline.choose_engine`` says what that means.

    Raises:
        UsageError: the image cannot be had, and there is no recipe for one.
        EngineError: making one failed.
    """
    try:
        client = connect()
    except EngineError:
        return request
    reference = pins.load().image(targets.load().line(line).image).reference
    try:
        with closing(client):
            images = DockerImages(client)
            found = images.find(reference) or images.pull(reference)
            return replace(request, image=found.reference)
    except EngineError as error:
        report.say(f"note[{error.code}]: {error.message}; making one from packages")
    return replace(request, image=pipeline.make_base_image(line, None, report))
