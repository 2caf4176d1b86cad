"""The Docker engine. The only package that imports ``docker``.

Builds in containers on top of one devel image, on any engine that ``DOCKER_HOST`` names: the source
is copied in and the products are copied out, nothing is mounted from this machine. Containers have
no network, unless the compiler cache is shared over one; a folder that machines share for it
(``file:``) is the engine's host's.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from farm import durable
from farm.engines import shared_cache
from farm.engines.docker.connection import engine_errors
from farm.engines.docker.container import LABEL, DockerWorkspace, running
from farm.engines.docker.inventory import CACHE_VOLUME, DockerImages, make_volume
from farm.errors import EngineError, remark
from farm.inputs import images, patches
from farm.inputs.images import BUILDER_DOCKERFILE, ImageFacts, ImageTools
from farm.plan import CACHE_FOLDER, CONTAINER_LAYOUT, BuildPlan, LineSink

if TYPE_CHECKING:
    import docker


class DockerEngine:
    """Builds in containers on top of one devel image, which is pulled unless the engine has it.

    ``jobs`` compilers run at a time, as many as the engine has processors when None. Without
    ``cached`` everything is compiled, with no compiler cache in the container. Every method raises
    ``EngineError`` where the image is missing or unusable, or the engine is out of reach.
    """

    name = "docker"

    def __init__(
        self,
        client: docker.DockerClient,
        *,
        reference: str,
        jobs: int | None = None,
        cached: bool = True,
    ) -> None:
        self._client = client
        self._reference = reference
        self._jobs = jobs
        self._cached = cached
        self._images = DockerImages(client)
        self._tools: ImageTools | None = None
        self._pulled = False

    def tools(self) -> ImageTools:
        """Return the devel image's tools; the image is probed once."""
        if self._tools is None:
            self._tools = self._images.tools(replace(self._base(), reference=self._reference))
        return self._tools

    def identity(self, plan: BuildPlan) -> str:
        """Return the identity of the devel image's content and of the builder image's recipe."""
        del plan  # all of a run's plans are built on one image
        return f"docker {self._base().id} {_builder_tag(self._base())}"

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[DockerWorkspace]:
        """Start a container with the plan's source; it is removed on every exit."""
        base = self._base()
        builder = self._builder_image(base, sink)
        trusted = images.is_trusted(base, self._images)
        image = replace(base, reference=self._reference, trusted=trusted)
        layout = CONTAINER_LAYOUT if self._cached else replace(CONTAINER_LAYOUT, launcher="")
        if plan.line.is_cuda:
            layout = replace(layout, cuda=self.tools().cuda_root)
        shared = self._cached and shared_cache.is_for(plan.source, image)
        folder = shared_cache.folder() if shared else None
        # Only a cache that machines share over a network needs one.
        network = "bridge" if shared and shared_cache.remote() and not folder else "none"
        volumes = self._volumes(shared_cache.owner(plan.source, image), folder)
        with running(
            self._client, builder, plan.key, network=network, volumes=volumes
        ) as workspace:
            with (
                engine_errors("ENGINE_LOST", "the source could not be copied in"),
                tempfile.TemporaryFile() as spool,
            ):  # owned by root, without .git
                files: dict[str, Path | bytes] = {str(layout.source): plan.source.tree}
                files[str(layout.recipe)] = patches.recipe()
                durable.write_tar(spool, files)
                workspace.container.put_archive("/", spool)
            yield replace(
                workspace,
                layout=layout,
                jobs=self._jobs or workspace.jobs,
                image=image,
                ccache_dir=CACHE_FOLDER if self._cached else None,
            )

    def _volumes(self, owner: str, shared: str | None) -> dict[str, dict[str, str]]:
        """Return the compiler cache's volume, and the folder that machines share."""
        if not self._cached:
            return {}
        volume = f"{CACHE_VOLUME}-{owner}" if owner else CACHE_VOLUME
        make_volume(self._client, volume)
        volumes = {volume: {"bind": str(CACHE_FOLDER), "mode": "rw"}}
        # in the container alone it would grow without limit, and be removed with it
        return volumes | ({shared: {"bind": shared, "mode": "rw"}} if shared else {})

    def close(self) -> None:
        """Close the connections to the engine."""
        self._client.close()

    def has_image(self) -> bool:
        """Whether the engine has the devel image, so that it need not be pulled."""
        return self._images.find(self._reference) is not None

    def forget_pulled(self) -> None:
        """Remove the devel image if this engine pulled it; used after a check without a build."""
        if self._pulled:
            self._images.remove(self._reference)

    def _base(self) -> ImageFacts:
        found = self._images.find(self._reference)
        if found is None:
            found = self._images.pull(self._reference)
            self._pulled = True
        if found.triggers:  # they would run while the builder image is made
            raise EngineError("IMAGE_ONBUILD", image=self._reference, triggers=found.triggers)
        return found

    def _builder_image(self, base: ImageFacts, sink: LineSink) -> ImageFacts:
        tag = _builder_tag(base)
        found = self._images.find(tag)
        if found is not None and images.is_ours(found, tag):
            return found
        sink(remark("BUILDER_IMAGE", tag=tag, reference=self._reference))
        context, base_id = io.BytesIO(), {"BASE": base.id}
        durable.write_tar(context, {"Dockerfile": BUILDER_DOCKERFILE.read_bytes()})
        made = self._images.build(
            context, tag, buildargs=base_id, labels={LABEL: "builder"}, log=sink
        )
        return images.keep(made, tag)


def _builder_tag(base: ImageFacts) -> str:
    inputs = hashlib.sha256(base.id.encode() + BUILDER_DOCKERFILE.read_bytes())
    return f"llama-farm-builder:{inputs.hexdigest()[:16]}"
