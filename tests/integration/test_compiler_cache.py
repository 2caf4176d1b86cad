"""The compiler cache goes out of a real engine and into it again."""

import io
import secrets
import tarfile
from pathlib import Path

import pytest
import small_disk
from docker import DockerClient

from farm import compiler_cache
from farm.errors import PackError

pytestmark = pytest.mark.docker


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a volume of the test's own in place of the farm's."""
    name = f"llama-farm-test-{secrets.token_hex(4)}"
    monkeypatch.setattr(compiler_cache, "CACHE_VOLUME", name)
    return name


def archive(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(f"ccache/{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def test_what_is_loaded_is_what_is_saved(
    client: DockerClient, volume: str, base_image: str, tmp_path: Path
) -> None:
    place = tmp_path / "in.tar"
    place.write_bytes(archive("a/result", b"an object file"))
    try:
        compiler_cache.load(place, line="cpu", image=base_image)
        out = tmp_path / "cache" / "out.tar"
        assert compiler_cache.save(out, line="cpu", image=base_image) == out.stat().st_size
        with tarfile.open(out) as tar:
            stream = tar.extractfile("ccache/a/result")
            assert stream is not None
            assert stream.read() == b"an object file"
        left = client.containers.list(
            all=True, filters={"label": "llama-farm=cache"}, ignore_removed=True
        )
        assert left == []
    finally:
        client.volumes.get(volume).remove()


def test_a_disk_that_is_full_is_one_line_and_keeps_nothing(
    client: DockerClient, volume: str, base_image: str, tmp_path: Path
) -> None:
    place = tmp_path / "in.tar"
    place.write_bytes(archive("a/result", secrets.token_bytes(8 << 20)))
    try:
        compiler_cache.load(place, line="cpu", image=base_image)
        with small_disk.mounted(tmp_path / "disk", "64k"):
            with pytest.raises(PackError) as caught:
                compiler_cache.save(tmp_path / "disk" / "out.tar", line="cpu", image=base_image)
            assert list((tmp_path / "disk").iterdir()) == []
        assert caught.value.code == "WRITE_FAILED"
        assert "No space left" in caught.value.message
    finally:
        client.volumes.get(volume).remove()
