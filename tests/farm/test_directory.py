"""A folder as a place."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farm import preflight, release
from farm.errors import PublishError, UsageError
from farm.publish import places, publishing
from tests.farm.test_publishing import NAMES
from tests.rigs.refusals import refused


def test_a_manifest_of_more_than_4_mib_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "b1-1").mkdir()
    (tmp_path / "b1-1" / "manifest.json").write_bytes(bytes((4 << 20) + 1))
    with refused("FILE_TOO_LARGE", PublishError, "manifest.json of b1-1"):
        places.parse(str(tmp_path)).small("b1-1", "manifest.json")


def test_folder_of_more_than_any_place_has_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, released: Path
) -> None:
    many = tmp_path / "many"
    for name in map(str, range(9)):
        (many / name).mkdir(parents=True)
        (released / f"{name}.tar.gz").touch()
    (many / "0" / "manifest.json").touch()
    assert places.parse(str(many)).releases() == ("0",)
    for bound, most, read in (
        ("durable.MOST_ENTRIES", 9, lambda: places.parse(str(many)).releases()),  # of all together
        ("durable.MOST_ENTRIES", 8, lambda: places.parse(str(tmp_path)).present("many")),
        ("durable.MOST_ENTRIES", 8, lambda: release.verify(released)),
        ("durable.MOST_ENTRIES", 8, lambda: preflight.out_findings(many, [])),
        ("publish.directory._MOST_FOLDERS", 0, lambda: places.parse(str(many)).releases()),
    ):
        with (
            monkeypatch.context() as patch,
            refused("FOLDER_TOO_LARGE", UsageError, f"than {most}"),
        ):
            patch.setattr(f"farm.{bound}", most)
            read()


def test_two_processes_publish_to_a_folder_at_the_same_time(released: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    to = places.parse(str(tmp_path / "published"))
    planned, said = publishing.prepare(released, to), []
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: to.publish(planned, said.append), range(2)):
            pass
    sent = [line for line in said if not line.startswith("waiting")]
    assert len(sent) == len(NAMES)
    assert to.releases() == ("b11549-1",)
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["b11549-1"]
