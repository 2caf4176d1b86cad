"""Describe a tarball and its parts in a CycloneDX document. The only user of cyclonedx.

Everything in the document comes from the tarball: its bytes, its manifest entry, and the record in
it. The serial number comes from the tarball's digest and the time is the tarball's, so the same
tarball gives the same bytes, on any machine and at any time.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from cyclonedx.exception import CycloneDxException
from cyclonedx.model import (
    ExternalReference,
    ExternalReferenceType,
    HashAlgorithm,
    HashType,
    Property,
    XsUri,
)
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from farm.plan import SOURCE_DATE_EPOCH
from farm.tarball.build_record import BuildRecord
from farm.tarball.parts import PUBLIC_DOMAIN, Part
from llama_loader.manifest import Artifact

if TYPE_CHECKING:
    from farm.cuda_runtime import RuntimeRecord

SUFFIX: Final = ".cdx.json"
PROPERTY: Final = "llama-farm"
"""The beginning of every property's name, before a colon."""
NVIDIA_LICENCE: Final = "NVIDIA CUDA Toolkit EULA"
"""It has no SPDX identifier."""

INVALID: Final = (ValueError, CycloneDxException)
"""What the libraries raise for a value that a document cannot have."""
_SHA256: Final = re.compile(r"sha256:([0-9a-f]{64})")


def name_of(tarball: str) -> str:
    """Return the document's file name."""
    return f"{tarball}{SUFFIX}"


def of_server(artifact: Artifact, record: BuildRecord) -> bytes:
    """Return the document of a llama-server's tarball; ``record`` is its ``BUILD.json``."""
    source, parts = record.source, record.parts
    licence = parts[0].licence if parts else None
    root = _root(artifact, f"b{source.build}", _expression(licence))
    root.properties.update(
        _properties(
            {
                "source": source.origin,
                "source-commit": source.commit,
                "source-sha256": source.sha256,
                "arch-set": record.arch_set,
                "cuda-architectures": record.archs,
                "recipe-sha256": record.recipe_sha256,
                "parts": "recorded" if parts is not None else "unknown",
            }
            | {f"source-patch:{patch.name}": patch.sha256 for patch in source.patches}
        )
    )
    components = [_part(part) for part in parts or ()]
    return _document(root, [*components, *_made_with(record)], artifact)


def of_cuda_runtime(artifact: Artifact, record: RuntimeRecord) -> bytes:
    """Return the document of a tarball with NVIDIA's libraries."""
    licences = [DisjunctiveLicense(name=NVIDIA_LICENCE)]
    wheels = [
        Component(
            name=wheel.package,
            version=wheel.version,
            type=ComponentType.LIBRARY,
            bom_ref=f"wheel:{wheel.package}",
            purl=PackageURL(
                "pypi", name=wheel.package, version=wheel.version,
                qualifiers={"file_name": wheel.filename},
            ),
            hashes=[_sha256(wheel.sha256)],
            licenses=licences,
        )
        for wheel in record.wheels
    ]  # fmt: skip
    return _document(_root(artifact, record.version, licences), wheels, artifact)


def _document(root: Component, components: Iterable[Component], artifact: Artifact) -> bytes:
    files = [
        Component(
            name=entry.path,
            type=ComponentType.FILE,
            bom_ref=f"file:{entry.path}",
            hashes=[_sha256(entry.sha256)],
            properties=_properties({"size": str(entry.size)}),
        )
        for entry in artifact.files
    ]
    needs = [  # the libraries that the host has to bring
        Component(
            name=soname,
            type=ComponentType.LIBRARY,
            bom_ref=f"host:{soname}",
            properties=_properties({"provided-by": "host"}),
        )
        for soname in artifact.needs
    ]
    everything = [*components, *files, *needs]
    shipped = [one for one in everything if one.scope is not ComponentScope.EXCLUDED]
    depends_on = [Dependency(one.bom_ref) for one in shipped]
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"sha256:{artifact.sha256}"),
        metadata=BomMetaData(
            component=root, timestamp=datetime.fromtimestamp(SOURCE_DATE_EPOCH, timezone.utc)
        ),
        components=everything,
        dependencies=[
            Dependency(root.bom_ref, depends_on),
            *(Dependency(one.bom_ref) for one in everything),
        ],
    )
    return JsonV1Dot6(bom).output_as_string(indent=2).encode() + b"\n"


def _root(
    artifact: Artifact, version: str, licences: list[LicenseExpression] | list[DisjunctiveLicense]
) -> Component:
    return Component(
        name=artifact.name,
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref="tarball",
        hashes=[_sha256(artifact.sha256)],
        licenses=licences,
        properties=_properties(
            {
                "kind": artifact.kind,
                "glibc": artifact.platform.glibc,
                "glibcxx": artifact.platform.glibcxx,
                "cuda-toolkit": artifact.cuda.toolkit if artifact.cuda else None,
                "cuda-min-driver": artifact.cuda.min_driver if artifact.cuda else None,
                "sass": " ".join(artifact.cuda.sass) if artifact.cuda else None,
                "ptx": " ".join(artifact.cuda.ptx) if artifact.cuda else None,
            }
        ),
    )


def _part(part: Part) -> Component:
    """Describe code that was compiled in; its digest is over several files, so a property."""
    references, purl, github = [], None, "https://github.com/"
    if part.origin:
        references.append(ExternalReference(type=ExternalReferenceType.VCS, url=XsUri(part.origin)))
    if part.origin and part.origin.startswith(github):
        owner, _, name = part.origin.removeprefix(github).partition("/")
        purl = PackageURL("github", namespace=owner, name=name, version=part.version)
    return Component(
        name=part.name,
        version=part.version,
        type=ComponentType.LIBRARY,
        bom_ref=f"part:{part.path}",
        scope=ComponentScope.REQUIRED,
        licenses=_expression(part.licence),
        purl=purl,
        external_references=references,
        properties=_properties(
            {
                "path": part.path,
                "files-sha256": part.sha256,
                "licence-files": " ".join(part.licence_files),
            }
        ),
    )


def _made_with(record: BuildRecord) -> list[Component]:
    """Describe the programs and images that the build used but did not ship."""
    tools = record.toolchain
    found = [_tool("compiler", tools.compiler), _tool("cmake", tools.cmake)]
    if record.line.toolkit:
        toolkit = _tool("CUDA toolkit", tools.nvcc or record.line.toolkit)
        # What nvcc takes out of the toolkit's headers ends in the binary.
        toolkit.licenses.update([DisjunctiveLicense(name=NVIDIA_LICENCE)])
        found.append(toolkit)
    found += [_tool(name, None, sha256=digest) for name, digest in tools.programs.items()]
    found += [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"input:{name}",
            scope=ComponentScope.EXCLUDED,
            hashes=[_sha256(digest)],
        )
        for name, digest in record.inputs.items()
    ]
    if tools.image:
        image = Component(
            name=tools.image.partition("@")[0],
            version=tools.image_digest,
            type=ComponentType.CONTAINER,
            bom_ref="image",
            scope=ComponentScope.EXCLUDED,
            properties=_properties({"reference": tools.image}),
        )
        pinned = _SHA256.search(tools.image)
        image.hashes.update([_sha256(pinned[1])] if pinned else [])
        found.append(image)
    return found


def _tool(name: str, version: str | None, *, sha256: str | None = None) -> Component:
    return Component(
        name=name,
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref=f"{'program' if sha256 else 'tool'}:{name}",
        scope=ComponentScope.EXCLUDED,
        hashes=[_sha256(sha256)] if sha256 else [],
    )


def _expression(licence: str | None) -> list[LicenseExpression] | list[DisjunctiveLicense]:
    if licence is None:
        return []
    if licence == PUBLIC_DOMAIN:
        return [DisjunctiveLicense(name="public domain")]
    return [LicenseExpression(licence)]


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _properties(values: Mapping[str, str | None]) -> list[Property]:
    """Return one property for each value that is known."""
    return [
        Property(name=f"{PROPERTY}:{name}", value=value) for name, value in values.items() if value
    ]
