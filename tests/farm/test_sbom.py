"""The SBOM of a tarball: valid CycloneDX, complete, and the same bytes for the same tarball."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from releases import artifact

from farm.cuda_runtime import RuntimeRecord, Wheel
from farm.plan import Toolchain
from farm.tarball import build_record, sbom
from farm.tarball.parts import Part
from llama_loader import manifest as schema

IMAGE = "0e0a0fc6d18feda9db1590da249ac93e8d5abfea8f4c3c0c849ce512b5ef8982"
RECORD = build_record.BuildRecord(
    source=schema.Source(
        project="llama.cpp",
        version="0.6.0",
        build=11549,
        commit=None,
        origin="pypi:x",
        sha256="c" * 64,
    ),
    arch_set="sm90",
    archs="90-real",
    line=build_record.LineRecord("cu128", "12.8", "525.60", "2.35"),
    defines={},
    toolchain=Toolchain(
        engine="docker",
        compiler="GNU 11.4.0",
        cmake="3.22.1",
        nvcc="NVIDIA 12.8.93",
        image=f"nvidia/cuda@sha256:{IMAGE}",
        image_digest=f"sha256:{'1' * 64}",
        programs={"cc1plus": "2" * 64},
    ),
    recipe_sha256="3" * 64,
    parts=(
        Part(
            name="llama.cpp",
            path=".",
            version="0.6.0",
            origin="https://github.com/ggml-org/llama.cpp",
            licence="MIT",
            licence_files=("LICENSE",),
            sha256="4" * 64,
        ),
        Part(name="sha1", path="vendor/sha1", licence="LicenseRef-public-domain", sha256="5" * 64),
        Part(name="stb", path="vendor/stb", licence="MIT OR Unlicense", sha256="6" * 64),
        Part(name="unknown", path="vendor/unknown", sha256="7" * 64),
    ),
    inputs={"builder.Dockerfile": "8" * 64},
)
WHEELS = RuntimeRecord(
    line=RECORD.line, wheels=(Wheel("nvidia-cublas", "12.8.4.1", "cublas.whl", "9" * 64, ()),)
)


def server() -> bytes:
    return sbom.of_server(artifact("cu128", "sm90", "90"), RECORD)


def libraries() -> bytes:
    return sbom.of_cuda_runtime(artifact("cu128", "sm90", "90"), WHEELS)


def by_ref(document: bytes) -> dict[str, Any]:
    return {one["bom-ref"]: one for one in json.loads(document)["components"]}


@pytest.mark.parametrize("made", [server, libraries])
def test_it_is_what_cyclonedx_s_own_strict_schema_says(made: Callable[[], bytes]) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(made().decode()) is None
    broken = json.loads(made())
    broken["components"][0]["type"] = "sandwich"
    assert validator.validate_str(json.dumps(broken)) is not None


def test_serial_number_and_time_come_from_the_tarball() -> None:
    listed = artifact("cu128", "sm90", "90")
    changed = msgspec.structs.replace(listed, sha256="1" * 64)
    one, other = (json.loads(sbom.of_server(entry, RECORD)) for entry in (listed, changed))
    assert one["serialNumber"] != other["serialNumber"]
    assert one["metadata"]["timestamp"] == "2020-01-01T00:00:00+00:00"


def test_every_file_of_the_tarball_is_in_it_with_its_digest() -> None:
    listed = artifact("cu128", "sm90", "90")
    found = by_ref(sbom.of_server(listed, RECORD))
    for entry in listed.files:
        digest = {"alg": "SHA-256", "content": entry.sha256}
        assert found[f"file:{entry.path}"]["hashes"] == [digest]


def test_parts_have_versions_licences_and_where_they_are_from() -> None:
    found = by_ref(server())
    assert found["part:."]["purl"] == "pkg:github/ggml-org/llama.cpp@0.6.0"
    assert found["part:."]["licenses"] == [{"expression": "MIT"}]
    assert found["part:vendor/stb"]["licenses"] == [{"expression": "MIT OR Unlicense"}]
    assert found["part:vendor/sha1"]["licenses"] == [{"license": {"name": "public domain"}}]
    assert "licenses" not in found["part:vendor/unknown"]


def test_what_built_it_is_in_it_and_excluded_from_what_is_shipped() -> None:
    found = by_ref(server())
    built_with = {ref for ref, component in found.items() if component.get("scope") == "excluded"}
    assert built_with == {
        "image",
        "tool:compiler",
        "tool:cmake",
        "tool:CUDA toolkit",
        "program:cc1plus",
        "input:builder.Dockerfile",
    }
    assert found["image"]["hashes"] == [{"alg": "SHA-256", "content": IMAGE}]
    assert found["tool:CUDA toolkit"]["version"] == "NVIDIA 12.8.93"
    root = json.loads(server())["metadata"]["component"]
    properties = {one["name"]: one["value"] for one in root["properties"]}
    assert properties["llama-farm:cuda-architectures"] == "90-real"
    assert properties["llama-farm:sass"] == "90"


def test_what_the_host_must_bring_is_a_dependency() -> None:
    listed = artifact("cu128", "sm90", "90")
    tree = json.loads(sbom.of_server(listed, RECORD))
    depends = {one["ref"]: one.get("dependsOn", []) for one in tree["dependencies"]}
    assert {f"host:{soname}" for soname in listed.needs} < set(depends["tarball"])
    assert not {"image", "tool:compiler"} & set(depends["tarball"])


def test_nvidia_s_wheels_are_named_as_the_package_index_has_them() -> None:
    wheel = by_ref(libraries())["wheel:nvidia-cublas"]
    assert wheel["purl"] == "pkg:pypi/nvidia-cublas@12.8.4.1?file_name=cublas.whl"
    assert wheel["hashes"] == [{"alg": "SHA-256", "content": "9" * 64}]
