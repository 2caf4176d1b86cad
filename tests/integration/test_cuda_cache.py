"""The compiler cache across arch sets, with a real nvcc: nothing is compiled twice, or mixed up."""

import shutil
from pathlib import Path

import pytest
import tiny_cuda
from needs import must_or_skip
from tiny_release import Silent

from benchmarks.cache_cost import results
from farm import elf, source, targets
from farm.engines.local import LocalEngine
from farm.errors import SourceError
from farm.execute import execute
from farm.inputs import pins, toolkit
from farm.plan import BuildPlan

pytestmark = pytest.mark.timeout(900)

TABLE = targets.load()
UNITS = ("one.cu", "two.cu")


@pytest.fixture(scope="module")
def nvcc() -> Path:
    """The root of a toolkit without cuBLAS, of NVIDIA's pinned wheels."""
    for program in ("g++", "ccache"):
        if shutil.which(program) is None:
            must_or_skip(f"no {program}")
    wheels = pins.load().toolkit_of(toolkit.WHEELS_LINE)
    try:
        return toolkit.from_wheels([pin for pin in wheels if pin.package in tiny_cuda.NVCC]).root
    except SourceError as error:
        must_or_skip(error.message)


def test_arch_sets_share_the_host_half_and_never_a_cuda_object(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, cache = tmp_path / "stats.log", tmp_path / "ccache"
    cache.mkdir()
    (cache / "ccache.conf").write_text(f"stats_log = {log}\n")
    monkeypatch.setattr("farm.plan.CACHE_CONFIG", str(cache / "ccache.conf"))
    monkeypatch.setenv("CCACHE_DIR", str(cache))
    tree = tiny_cuda.tree(tmp_path, ("one", "two"))

    def build(name: str) -> tuple[set[str], set[str], bytes]:
        """Return what was compiled, what came out of the cache, and the CUDA library."""
        log.unlink(missing_ok=True)
        plan = BuildPlan(TABLE.sets[name], TABLE.line("cu130"), source.from_folder(tree))
        with execute(plan, LocalEngine(cuda=nvcc), logs=tmp_path, reporter=Silent()) as built:
            library = built.folder / "libggml-cuda.so"
            assert set(elf.inspect(library).sass) == TABLE.sets[name].sass
            files = results(log)
            compiled = {file for file, hit in files if not hit}
            return compiled, {file for file, hit in files if hit}, library.read_bytes()

    compiled, _, first = build("sm90")
    assert {*UNITS, "llama.cpp", "plugin.c", "main.cpp"} == compiled
    assert b"llama.cpp/ggml/src/ggml-cuda/one.cu" in first, "a path that is the same everywhere"
    assert b"/builds/" not in first, "not the folder of this build"

    compiled, cached, second = build("sm120")
    assert compiled == set(UNITS)
    assert {"llama.cpp", "plugin.c", "main.cpp"} <= cached
    assert first != second

    compiled, _, again = build("sm90")
    assert compiled == set()
    assert again == first, "sm90's own objects, not those that came into the cache last"

    unit = tiny_cuda.unit(tree, "one")
    unit.write_text(unit.read_text().replace("+ 0", "+ 7"))
    for name in ("sm90", "sm120"):
        assert build(name)[0] == {"one.cu"}
