"""What a real release says of itself: the pinned llama.cpp, compiled in a container."""

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from verbs import Release

from farm.inputs import pins
from farm.tarball import archive, parts

pytestmark = pytest.mark.docker

VENDORED = {"cpp-httplib", "json", "stb", "miniaudio", "subprocess.h", "xxHash"}
"""What llama-server cannot be built without; there are more."""


@pytest.fixture(scope="module")
def tarball(cpu_release: Release) -> Path:
    return next(cpu_release.folder.glob("*.tar.zst"))


@pytest.fixture(scope="module")
def files(tarball: Path) -> dict[str, bytes]:
    """The texts in the tarball, by their path below ``runtime/``."""
    with tarball.open("rb") as raw:
        members = archive.members(raw, "tar.zst", what=tarball.name, root="runtime")
        return {
            member.path.removeprefix("runtime/"): member.stream.read()
            for member in members
            if member.size < 1 << 17
        }


@pytest.fixture(scope="module")
def record(files: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files["BUILD.json"])
    return found


def test_the_sbom_is_valid_and_names_what_llama_cpp_vendors(tarball: Path) -> None:
    text = tarball.with_name(f"{tarball.name}.cdx.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {
        one["name"]: one
        for one in json.loads(text)["components"]
        if one["bom-ref"].startswith("part:")
    }
    assert parts.keys() > VENDORED
    assert parts["llama.cpp"]["version"] == pins.load().source.llama_version
    for name, part in parts.items():
        assert part["licenses"], name
    for name in VENDORED:
        assert parts[name]["version"], name
        assert parts[name]["purl"].startswith("pkg:github/"), name


def test_every_part_s_licence_is_in_the_tarball(
    record: dict[str, Any], files: dict[str, bytes]
) -> None:
    for part in record["parts"]:
        texts = [files[f"licenses/{name}"].decode() for name in part["licence_files"]]
        assert texts, part["path"]
        assert all(parts.identify(text) for text in texts), part["path"]


def test_the_record_has_the_image_the_programs_and_the_inputs(record: dict[str, Any]) -> None:
    toolchain = record["toolchain"]
    assert toolchain["image_digest"].startswith("sha256:")
    compilers = {"gcc", "g++", "cc1", "cc1plus", "collect2", "lto-wrapper", "lto1"}
    others = {"as", "ld", "ar", "ranlib", "cmake", "ninja"}
    assert compilers | others == toolchain["programs"].keys()
    assert record["inputs"].keys() == {"builder.Dockerfile"}
    assert record["source"]["sha256"] == pins.load().source.sha256
    assert all(argument.startswith("-") or "/" not in argument or argument in {
        "/source", "/build"
    } for command in record["commands"] for argument in command)  # fmt: skip
