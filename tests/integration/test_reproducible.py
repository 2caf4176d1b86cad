"""Two clean builds of one set are the same to the byte; what is not is found and named.

Here the set is a small tree, and some of ggml's CUDA objects; `nox -s reproducible` has the rest.
"""

import filecmp
import shutil
import subprocess
from pathlib import Path

import pytest
from docker import DockerClient
from needs import must_or_skip
from tiny_release import Silent
from verbs import PROJECT, Release, invoke, succeed

from farm import elf
from farm.engines.docker import DockerEngine
from farm.execute import execute
from farm.inputs.images import TAGS
from farm.options import BuildRequest
from farm.plan import CACHE_FOLDER, BuildPlan
from farm.request import choose_source
from farm.source import from_folder
from farm.targets import load

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
OBJECTS = (
    *("argmax", "concat", "gla", "im2col", "norm", "pool2d", "scale"),
    "template-instances/mmq-instance-q4_k",
)
"""Small ones, so that a CI machine has the time, and one instance of the large templates."""
CUDA_OBJECTS = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir"
"""Where CMake leaves them, below the build folder."""
STRIP = 'cd "$1" && shift && strip --strip-unneeded "$@"'
"""A release's libraries are linked with -s: the symbol tables have names of nvcc's own files."""
HOST_TARGETS = ("ggml-base", "ggml-cpu-x64", "ggml-cpu-haswell", "ggml-cpu-zen4")
"""Libraries with the code that computes, for three of the fourteen kinds of CPU."""
RANDOM = """
file(READ /proc/sys/kernel/random/uuid uuid LIMIT 36)
target_compile_definitions(llama PRIVATE BUILT="${uuid}")
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "llama.cpp"))


def twice(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    patches = ("--patches", "none")
    return invoke("reproducible", "--source", str(tree), *patches, "--jobs", "1", *options)


def with_code(tree: Path, code: str) -> Path:
    with (tree / "llama.cpp").open("a", encoding="utf-8") as out:
        out.write(f"\n{code}\n")
    return tree


def test_two_local_builds_are_the_same_in_any_folder_and_on_any_day(tiny: Path) -> None:
    """Neither the folder nor the day gets in: the plan gives SOURCE_DATE_EPOCH and prefix maps."""
    with_code(tiny, 'extern "C" const char * built() { return __FILE__ __DATE__ " at " __TIME__; }')
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as out:
        out.write('string(TIMESTAMP now UTC)\nmessage(STATUS "It is ${now}")\n')
    done = twice(tiny, "--engine", "local")
    assert done.returncode == 0, done.stderr
    assert "first build, -j 1, no compiler cache" in done.stderr
    assert "second build, -j 2, no compiler cache" in done.stderr
    assert "identical: cpu-cpu, twice the same bytes" in done.stderr
    out = tiny.parent / "dist"
    options = ("--engine", "local", "--source", str(tiny), "--patches", "none")
    succeed("build-cpu", *options, "--out", str(out))
    kept = PROJECT / ".farm" / "trees" / "cpu-cpu" / "bin" / "libllama.so.0.6.1"
    assert b"Jan  1 2020 at 00:00:00" in kept.read_bytes()
    log = (PROJECT / ".farm" / "logs" / "cpu-cpu.log").read_text("utf-8")
    assert "It is 2020-01-01T00:00:00Z" in log


def test_what_differs_is_named_kept_and_explained(tiny: Path) -> None:
    with_code(tiny, 'extern "C" const char * id() { return BUILT; }')
    with (tiny / "CMakeLists.txt").open("a", encoding="utf-8") as out:
        out.write(RANDOM)
    done = twice(tiny, "--engine", "local")
    assert done.returncode == 1
    assert "error[NOT_REPRODUCIBLE]: two builds are not the same: cpu" in done.stderr
    assert "differs: runtime/libllama.so.0: other bytes, sha256 " in done.stderr
    assert "differs: runtime/llama-server" not in done.stderr
    kept = PROJECT / ".farm" / "reproducible" / "cpu-cpu"
    ours, theirs = (
        (kept / side / "runtime" / "libllama.so.0").read_bytes() for side in ("first", "second")
    )
    assert len(ours) == len(theirs)
    assert ours != theirs
    if shutil.which("diffoscope") is None:
        must_or_skip("diffoscope is not installed (apt-get install diffoscope-minimal)")
    assert "diffoscope's report: " in done.stderr
    assert ".rodata" in (kept / "diffoscope.txt").read_text("utf-8")


@pytest.mark.docker
def test_a_clean_container_has_no_compiler_cache(client: DockerClient, base_image: str) -> None:
    table = load()
    plan = BuildPlan(table.sets["cpu"], table.line("cpu"), from_folder(TINY))
    engine = DockerEngine(client, reference=base_image, cached=False)
    with engine.open(plan, lambda _: None) as workspace:
        assert client.api.inspect_container(workspace.container.id)["Mounts"] == []
        assert (workspace.ccache_dir, workspace.layout.launcher) == (None, "")
        assert workspace.run(("test", "-e", str(CACHE_FOLDER)), {}, print) == 1


@pytest.mark.docker
def test_what_one_container_built_another_builds_again(
    base_image: str, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dist"
    options = ("--engine", "docker", "--image", base_image, "--source", str(tiny))
    options += ("--patches", "none")
    succeed("build-cpu", *options, "--out", str(out))
    done = invoke("rebuild", out.as_uri(), "--source", str(tiny), "--jobs", "3")
    assert done.returncode == 0, done.stderr
    assert "identical: llama-server-b0-cpu-cpu-linux-x86_64.tar.zst" in done.stderr


@pytest.mark.docker
@pytest.mark.timeout(3600)
def test_libraries_of_the_cpu_set_come_out_of_a_clean_container_as_they_were_released(
    client: DockerClient, base_image: str, cpu_release: Release, tmp_path: Path
) -> None:
    """The release was compiled through the compiler cache, with another number of jobs."""
    table = load()
    tree = choose_source(BuildRequest())
    plan = BuildPlan(table.sets["cpu"], table.line("cpu"), tree, HOST_TARGETS)
    engine = DockerEngine(client, reference=base_image, jobs=3, cached=False)
    with execute(plan, engine, logs=tmp_path, reporter=Silent()) as built:
        made = [path for path in sorted(built.folder.iterdir()) if not path.is_symlink()]
        assert len(made) == len(HOST_TARGETS)
        for path in made:
            released = cpu_release.tree / "bin" / path.name
            assert filecmp.cmp(path, released, shallow=False), path.name


@pytest.mark.docker
@pytest.mark.timeout(1800)
def test_cuda_objects_of_two_containers_are_the_same(client: DockerClient, tmp_path: Path) -> None:
    """And they hold machine code for the set's architecture alone."""
    succeed("base-image", "--line", "cu130", "--tag", TAGS["cu130"])
    table = load()
    targets = tuple(f"{CUDA_OBJECTS}/{name}.cu.o" for name in OBJECTS)
    tree = choose_source(BuildRequest())
    plan = BuildPlan(table.sets["sm90"], table.line("cu130"), tree, targets)
    folders = []
    for jobs in (2, 3):
        engine = DockerEngine(client, reference=TAGS["cu130"], jobs=jobs, cached=False)
        folders.append(tmp_path / str(jobs))
        stripped_objects(plan, engine, folders[-1])
    for name in OBJECTS:
        ours, theirs = (folder / f"{name}.cu.o" for folder in folders)
        assert filecmp.cmp(ours, theirs, shallow=False), name
        found = elf.inspect(ours)
        assert (found.sass, found.ptx) == (("90",), ()), name


def stripped_objects(plan: BuildPlan, engine: DockerEngine, into: Path) -> None:
    into.mkdir()
    names = [f"{name}.cu.o" for name in OBJECTS]
    with engine.open(plan, print) as workspace:
        environment = plan.environment(workspace.layout, ccache_dir=None)
        built = workspace.layout.build / CUDA_OBJECTS
        for argv in (
            *(step.argv for step in plan.steps(workspace.layout, jobs=workspace.jobs)),
            ("sh", "-c", STRIP, "sh", str(built), *names),
        ):
            assert workspace.run(argv, environment, print) == 0
        workspace.collect(built, into)
