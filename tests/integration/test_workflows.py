"""The workflows' steps, run as a runner would, as far as that needs no GitHub and no GPU toolkit.

A build step is run twice: as it stands up to the Docker engine, which is taken away, so that every
option and every name in it is read and resolved; and reduced to a source tree of a few lines, the
set ``cpu`` and this machine's compiler, so that what comes after it has something real to work on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import github_releases
import http_served
import hub_repository
import pytest
import workflows
from invoke.collection import Collection
from package_index import PackageIndex
from verbs import PROJECT, succeed

import tasks
from farm import targets
from farm.inputs import pins

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
FAT = "build_llama_cpp_cuda_linux"
NOWHERE = "unix:///nowhere/docker.sock"
EVERY = [one for name in workflows.names() for one in workflows.steps(name)]
COMMANDS = [one for one in EVERY if one.run]

ELSEWHERE = {
    "Install the farm": "every nox session installs a lock so: the one that runs this test, too",
    "Install what the tests need of the distribution": "`.ci/run` does it on a bare machine",
    "Run everything": "this test is a part of it",
    "Build the site": "the session `docs` of `python3 -m nox`",
    "Pack CUDA's libraries": "needs 400 MB of wheels; test_cuda_runtime.py packs small ones",
    "Remove all but the newest of each kind": "needs GitHub and its program gh",
    "Build everything twice": "takes half an hour; test_reproducible.py runs the same on less",
}
"""Commands that are not run here, by the step's name, and where they are instead."""
RUN_HERE = {
    "build_llama_cpp_cuda_linux/build/Build",
    "build_llama_cpp_cuda_linux/build/Read the tarball again",
    "build_llama_cpp_cuda_linux/build/Start llama-server",
    "build_llama_cpp_cuda_linux/build/Bound the compiler cache",
    "channels/look/Look",
    "channels/renew/Renew",
    "channels/promote/Promote",
    "channels/rollback/Roll back",
    "space/space/Build, publish, deploy",
    "sets/matrix/Compute the matrix",
    "sets/build/Build for GPUs",
    "sets/build/Build for CPUs",
    "sets/build/Start llama-server",
    "sets/build/Bound the compiler cache",
    "release/preflight/Check images, source, name, place and key",
    "release/release/Assemble",
    "release/release/Read the release again",
    "release/release/Check what promotion demands",
    "release/release/Publish",
    "release/release/Promote to candidate",
    "weekly/pins/Update build/pins.toml",
    "weekly/pins/Propose what changed",
    "weekly/assemble/Assemble",
    "weekly/assemble/Read the release again",
    "weekly/assemble/Start every llama-server",
}

RELEASE = {"inputs.release": "b11549-3", "github.repository": "owner/name"}


@pytest.fixture
def runner(tmp_path: Path) -> workflows.Runner:
    """A copy of this checkout, as a runner's checkout action makes one.

    It has no patches, which do not fit a source tree of a few lines.
    """
    folder = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith("build/patches/"):
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, place)
    home = tmp_path / "home"
    home.mkdir()
    return workflows.Runner(folder, home, {"github.workspace": str(folder)})


def upstream(runner: workflows.Runner, *tags: str) -> None:
    """Let git find a small llama.cpp where the farm looks for the real one."""
    tree = Path(shutil.copytree(TINY, runner.home / "upstream"))
    commands = [
        ("init", "--quiet"),
        ("config", "uploadpack.allowFilter", "true"),
        ("add", "--all"),
        ("-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "--quiet", "-m", "tiny"),
        *(("tag", tag) for tag in tags),
    ]
    for command in commands:
        subprocess.run(["git", *command], cwd=tree, check=True)
    (runner.home / ".gitconfig").write_text(
        f'[url "file://{tree}"]\n\tinsteadOf = https://github.com/ggml-org/llama.cpp\n'
    )


@pytest.mark.parametrize("file", [".github/workflows/ci.yml", ".ci/run"])
def test_mmdebstrap_is_installed_together_with_debians_keys(file: str) -> None:
    """Ubuntu's runners have no Debian keys, and mmdebstrap refuses a mirror without them."""
    words = (PROJECT / file).read_text("utf-8").split()
    assert "mmdebstrap" in words
    assert "debian-archive-keyring" in words


def test_every_command_of_every_workflow_is_run_or_said_to_be_elsewhere() -> None:
    elsewhere = {one.where for one in COMMANDS if one.name in ELSEWHERE}
    assert {one.where for one in COMMANDS} == RUN_HERE | elsewhere
    assert RUN_HERE.isdisjoint(elsewhere)
    assert {one.name for one in COMMANDS} >= ELSEWHERE.keys()


def test_every_verb_and_option_in_a_workflow_exists() -> None:
    known = {one.name: one.flags for one in Collection.from_module(tasks).to_contexts()}
    called = [call for one in COMMANDS for call in workflows.verbs(one.run)]
    assert len(called) > 15
    for verb, options in called:
        assert set(options) <= known[verb].keys(), f"invoke {verb} {options}"


def test_the_seed_s_inputs_and_defaults_are_the_seed_s() -> None:
    defaults = workflows.defaults("build_llama_cpp_cuda_linux.yml")
    # The weekly pull request may not change a workflow, so this one may be older than the pin.
    ref = defaults.pop("inputs.llama_cpp_ref")
    assert defaults.pop("inputs.patches") == "auto"  # the seed had no patches
    assert re.fullmatch(r"b[0-9]+", ref)
    assert all(int(ref[1:]) >= one.fixed_in for one in pins.advisories())
    assert defaults == {
        "inputs.cuda_image": "nvidia/cuda:12.4.1-devel-ubuntu22.04",
        "inputs.output_name": "llama-server-cuda-ubuntu-x64.tar.gz",
        "inputs.cuda_architectures": "80;86;89;90",
    }


def reached_the_engine(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 1 and "error[ENGINE_NOT_RUNNING]" in done.stderr


def test_the_seed_s_workflow_with_its_defaults(runner: workflows.Runner) -> None:
    runner.context.update(workflows.defaults("build_llama_cpp_cuda_linux.yml"))
    upstream(runner, runner.context["inputs.llama_cpp_ref"])
    build = workflows.step("build_llama_cpp_cuda_linux/build/Build")
    runner.environment["DOCKER_HOST"] = NOWHERE
    assert reached_the_engine(runner.run(build))
    built = runner.run(
        build,
        ("build-cuda --engine docker", "build-cpu --engine local"),
        ('--archs "$ARCHS" --image "$IMAGE" ', ""),
    )
    assert built.returncode == 0, built.stderr
    (tarball,) = (runner.folder / "dist").glob("*.tar.gz")
    named = runner.folder / "out" / "llama-server-cuda-ubuntu-x64.tar.gz"
    assert named.read_bytes() == tarball.read_bytes()
    checked = runner.run(workflows.step("build_llama_cpp_cuda_linux/build/Read the tarball again"))
    assert checked.stdout == f"ok {tarball.name}\n", checked.stderr
    bound(runner, "build_llama_cpp_cuda_linux/build/Bound the compiler cache")
    # The small tree's server answers nothing: just that must stop the job.
    started = runner.run(workflows.step("build_llama_cpp_cuda_linux/build/Start llama-server"))
    assert started.returncode == 1
    assert "error[SMOKE_FAILED]" in started.stderr


def bound(runner: workflows.Runner, where: str) -> None:
    """What was compiled lies in the workspace, and no more of it than the bound."""
    cache = runner.folder / ".farm" / "ccache"
    assert any(path.is_file() for path in cache.rglob("*"))
    runner.environment["CCACHE_MAXSIZE"] = "1k"
    step = workflows.step(where)
    (named,) = [value for name, value in step.job_env.items() if name == "CCACHE_MAXSIZE"]
    done = runner.run(replace(step, job_env={}), ("sudo ", ""))
    assert done.returncode == 0, done.stderr
    assert named.endswith(("M", "G"))
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 100_000


def test_the_sets_of_a_release(runner: workflows.Runner) -> None:
    assert runner.run(workflows.step("sets/matrix/Compute the matrix")).returncode == 0
    matrix = json.loads(runner.context["outputs.matrix.matrix"])["include"]
    table = targets.load()
    assert len(matrix) == sum(len(names) for names in table.release.values())
    gpu, cpu = (workflows.step(f"sets/build/Build for {kind}s") for kind in ("GPU", "CPU"))
    runner.environment["DOCKER_HOST"] = NOWHERE
    for row in (matrix[0], matrix[-1]):
        runner.context.update({f"matrix.{name}": value for name, value in row.items()})
        chosen = [one for one in (gpu, cpu) if workflows.holds(one.condition, runner.context)]
        assert chosen == [cpu if row["set"] == "cpu" else gpu]
        assert reached_the_engine(runner.run(chosen[0]))


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
    for name in ("release", "weekly"):
        assert workflows.load(f"{name}.yml")["jobs"]["sets"]["permissions"]["actions"] == "write"


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_release_is_checked_before_it_is_built(
    runner: workflows.Runner, tmp_path: Path, *, spoiled: bool
) -> None:
    succeed("keygen", "--out", str(tmp_path / "key"))
    secrets = {
        "secrets.GITHUB_TOKEN": github_releases.TOKEN,
        "secrets.FARM_SIGNING_KEY": "" if spoiled else (tmp_path / "key").read_text("utf-8"),
        "secrets.FARM_SIGNING_PASSWORD": "",
        "vars.FARM_ATTEST_PRIVATE": "",
    }
    runner.context.update(RELEASE | secrets)
    if spoiled:
        runner.context["inputs.release"] = "b11550-1"
    small = ("--engine docker", f"--engine docker --source {TINY} --assume-build 11549")
    with github_releases.GitHub().serve() as github:
        runner.environment.update(
            DOCKER_HOST=NOWHERE, GITHUB_API_URL=github.url, GITHUB_ACTIONS="true"
        )
        step = workflows.step("release/preflight/Check images, source, name, place and key")
        said = runner.run(step, small).stderr
    codes = re.findall(r"error\[(\w+)\]", said)
    spoilt = ["RELEASE_NAME_WRONG", "KEY_MISSING"] if spoiled else []
    assert codes == [*spoilt, "ENGINE_NOT_RUNNING"], said


def test_nothing_of_a_release_is_built_before_the_check() -> None:
    assert workflows.load("release.yml")["jobs"]["sets"]["needs"] == "preflight"


@pytest.mark.parametrize("workflow", ["release/release", "weekly/assemble"])
def test_the_sets_become_a_release_that_is_read_again(
    runner: workflows.Runner, workflow: str
) -> None:
    runner.context.update(RELEASE | {"matrix.line": "cpu", "matrix.set": "cpu"})
    local = ("--engine docker", f"--engine local --source {TINY}")
    built = runner.run(workflows.step("sets/build/Build for CPUs"), local)
    assert built.returncode == 0, built.stderr
    for name in ("manifest.json", "SHA256SUMS"):
        (runner.folder / "dist" / name).unlink()
    assembled = runner.run(workflows.step(f"{workflow}/Assemble"))
    name = "b11549-3" if workflow == "release/release" else "b0-1"
    assert assembled.stdout == f"dist/manifest.json: {name}, 1 artifacts\n", assembled.stderr
    checked = runner.run(workflows.step(f"{workflow}/Read the release again"))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.docker
def test_a_set_is_built_in_a_container_and_its_compiler_cache_kept(
    runner: workflows.Runner, base_image: str
) -> None:
    runner.context.update({"matrix.line": "cpu", "matrix.set": "cpu"})
    if "DOCKER_HOST" in os.environ:
        runner.environment["DOCKER_HOST"] = os.environ["DOCKER_HOST"]
    small = ("--engine docker", f"--engine docker --image {base_image} --source {TINY}")
    built = runner.run(workflows.step("sets/build/Build for CPUs"), small)
    assert built.returncode == 0, built.stderr
    assert sorted(path.name for path in (runner.folder / "dist").glob("*.tar.*")) == [
        "llama-server-b0-cpu-cpu-linux-x86_64.tar.zst",
        "llama-server-b0-cpu-cpu-linux-x86_64.tar.zst.cdx.json",
    ]
    bound(runner, "sets/build/Bound the compiler cache")


@pytest.mark.docker
def test_what_a_container_built_starts_is_published_and_promoted(
    runner: workflows.Runner, real_manifest: str, real_model: Path, tmp_path: Path
) -> None:
    """To GitHub, as far as its REST API is; nothing of the commands is replaced."""
    # what the runner would fetch from its package index
    models = runner.home / "cache" / "llama-server-farm" / "models"
    place = models / pins.load().model("smollm2").member_sha256 / real_model.name
    place.parent.mkdir(parents=True)
    shutil.copy2(real_model, place)
    runner.context.update(RELEASE | {"matrix.line": "cpu", "matrix.set": "cpu"})
    shutil.copytree(Path(real_manifest.removeprefix("file://")).parent, runner.folder / "dist")
    succeed("keygen", "--out", str(tmp_path / "key"))
    secret = (tmp_path / "key").read_text("utf-8")
    runner.context.update(
        {
            "secrets.GITHUB_TOKEN": github_releases.TOKEN,
            "secrets.FARM_SIGNING_KEY": secret,
            "secrets.FARM_SIGNING_PASSWORD": "",
        }
    )
    with github_releases.GitHub().serve() as github:
        runner.environment.update(GITHUB_API_URL=github.url, GITHUB_SERVER_URL=github.url)
        for where in (
            "sets/build/Start llama-server",
            "weekly/assemble/Start every llama-server",
            "release/release/Assemble",
            "release/release/Read the release again",
            "release/release/Check what promotion demands",
            "release/release/Publish",
            "release/release/Promote to candidate",
        ):
            done = runner.run(workflows.step(where))
            said = done.stdout + done.stderr
            assert done.returncode == 0, said
            assert "answers on the CPU" in said or not where.endswith(("server", "demands"))
            assert secret.strip() not in said
            assert github_releases.TOKEN not in said
        assert not github.release("b11549-3").draft
        assert {one.name for one in github.release("channel-candidate").assets} == {
            *("1.json", "1.json.minisig", "manifest.json", "manifest.json.minisig")
        }
        _channels(runner, github)
        # what a person does with the address that was printed
        public = f"{github.url}/{github_releases.REPOSITORY}/releases/download/b11549-3"
        assert "ok llama-server-" in succeed("verify", f"{public}/manifest.json")


def _channels(runner: workflows.Runner, github: github_releases.GitHub) -> None:
    """Promote what was published, find that nothing ends soon, renew all the same, roll back."""
    runner.context.update({"inputs.channel": "stable", "inputs.release": "b11549-3"})
    promoted = runner.run(workflows.step("channels/promote/Promote"))
    assert promoted.returncode == 0, promoted.stderr
    assert "channel stable → b11549-3, serial 1" in promoted.stdout
    look, renew = workflows.step("channels/look/Look"), workflows.step("channels/renew/Renew")
    assert runner.run(look).returncode == 0
    assert runner.context["outputs.look.due"] == ""
    assert runner.run(renew).stdout == ""
    soon = ("renew --to", "renew --within 100 --to")
    assert runner.run(look, soon).returncode == 0
    assert sorted(runner.context["outputs.look.due"].split()) == ["candidate", "stable"]
    renewed = runner.run(renew, soon)
    assert renewed.returncode == 0, renewed.stderr
    assert "channel stable → b11549-3 (before: b11549-3), serial 2" in renewed.stdout
    names = {one.name for one in github.release("channel-stable").assets}
    assert {"1.json", "2.json", "manifest.json", "manifest.json.minisig"} <= names
    back = runner.run(workflows.step("channels/rollback/Roll back"))
    assert back.returncode == 1
    assert "error[NOTHING_BEFORE]" in back.stderr


def test_every_promotion_asks_a_person_and_one_runs_at_a_time() -> None:
    release, found = workflows.load("release.yml"), workflows.load("channels.yml")
    assert found["concurrency"] == release["concurrency"]
    assert found["on"]["schedule"]
    for name, job in found["jobs"].items():
        signs = any("FARM_SIGNING_KEY" in one.get("env", {}) for one in job["steps"])
        assert signs == (name != "look")
        assert signs == (job.get("environment") == "release"), name


def test_a_space_is_built_published_and_deployed_with_a_secret_that_no_command_has(
    runner: workflows.Runner,
) -> None:
    step = workflows.step("space/space/Build, publish, deploy")
    inputs = {"space": "me/space", "model": "4b", "hardware": "cpu-basic"}
    runner.context.update({f"inputs.{name}": value for name, value in inputs.items()})
    runner.context.update({"secrets.HF_TOKEN": hub_repository.TOKEN})
    small = ("--engine docker", f"--engine local --source {TINY} --assume-build 11549")
    page = http_served.serving(lambda _: http_served.Answer(200, b"a page"))
    with hub_repository.Hub().serve() as hub, page as hub.host:
        # Xet's protocol is a program of the Hub's own; without it large files go through LFS
        runner.environment.update(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
        done = runner.run(step, small)
        assert done.returncode == 0, done.stderr
        assert hub_repository.TOKEN not in done.stdout + done.stderr + step.run
        deployed = hub.repositories["me/space"].commits[-1]
        assert {"app.py", "README.md", "requirements.txt", "llama_loader/__main__.py"} <= set(
            deployed
        )
        others = set(deployed) - {".deployed.json"}
        assert not any(name.startswith(("farm", "tests", "spaces", ".")) for name in others)
        pin = json.loads(deployed["release.json"])
        assert pin["manifest_url"].startswith("hf://me/llama-server@b11549-1/")
        assert (
            hub.repositories["me/space"]
            .variables["YAKULINGO_SPACES_GGUF_REPO_ID"]
            .endswith("translategemma-4b-it-i1-GGUF")
        )
        assert done.stdout.splitlines()[-1] == hub.host
        # what was published is used again: this run gets as far without an engine
        runner.environment["DOCKER_HOST"] = NOWHERE
        shutil.rmtree(runner.folder / "dist")
        assert runner.run(step).returncode == 0
        runner.context["secrets.HF_TOKEN"] = "hf_somebody_else_s"
        refused = runner.run(step)
        assert refused.returncode == 1
        assert "error[HUB_REFUSED]" in refused.stderr
        assert "hf_somebody" not in refused.stdout + refused.stderr


def git(folder: Path, *argv: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
    done = subprocess.run(
        ["git", *who, *argv], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_the_weekly_run_proposes_the_newest_llama_cpp(
    runner: workflows.Runner, tmp_path: Path
) -> None:
    """Into a repository of this machine; of GitHub's own program the words are looked at."""
    upstream(runner, "b11549", "b11600")
    wheel, bare, gh = tmp_path / "model.whl", tmp_path / "owner.git", tmp_path / "bin" / "gh"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"GGUF")
    shutil.copytree(TINY, tmp_path / "llama" / "upstream")
    (tmp_path / "llama" / "upstream" / "evil.cpp").touch()
    packed = shutil.make_archive(str(tmp_path / "sdist"), "gztar", tmp_path, "llama")
    (runner.folder / "build" / "pins.toml").write_text(SMALL_PINS)
    git(tmp_path, "init", "--quiet", "--bare", str(bare))
    for command in ("init --quiet", "add --all", "commit --quiet --message all"):
        git(runner.folder, *command.split())
    with (runner.home / ".gitconfig").open("a", encoding="utf-8") as file:
        file.write(f'[url "file://{bare}"]\n\tinsteadOf = https://x:t0ken@github.test/owner/name\n')
    gh.parent.mkdir()
    gh.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/said\ntest "$2" != view\n')
    gh.chmod(0o755)
    with PackageIndex().serve() as index:
        for name in ("llama-2026.10.11549.tar.gz", "llama-2026.11.11600.tar.gz"):
            index.add("llama", name, Path(packed).read_bytes())
        index.add("model", "model-1.0-py3-none-any.whl", wheel.read_bytes())
        index.add("nvcc", "nvcc-1.0-py3-none-manylinux_2_17_x86_64.whl", b"nvcc")
        runner.context["secrets.GITHUB_TOKEN"] = "t0ken"
        runner.environment.update(
            PATH=f"{gh.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            DOCKER_HOST=NOWHERE,
            GITHUB_REPOSITORY="owner/name",
            GITHUB_SERVER_URL="https://github.test",
            PIP_INDEX_URL=index.url,
        )
        weekly(runner, "llama.cpp-b11600")
        proposed = git(bare, "show", "llama.cpp-b11600:build/pins.toml")
        assert 'version = "2026.11.11600"' in proposed
        assert git(bare, "diff", "--name-only", "llama.cpp-b11600~", "llama.cpp-b11600") == (
            "build/pins.toml\n"
        )
        said = (runner.folder / "changes.txt").read_text("utf-8")
        assert "llama.cpp (llama): b11549" in said
        assert "not as in llama.cpp's tag b11600" in said
        assert "are 1 of its files" in said
        assert "- evil.cpp" in said
        asked = (tmp_path / "said").read_text("utf-8").splitlines()
        assert [line.split()[:3] for line in asked] == [
            ["pr", "view", "llama.cpp-b11600"],
            ["pr", "create", "--head"],
        ]
        # A week later nothing is newer: nothing is proposed, nothing is built.
        weekly(runner, "")
        assert len((tmp_path / "said").read_text("utf-8").splitlines()) == 2


def weekly(runner: workflows.Runner, branch: str) -> None:
    for name in ("Update build/pins.toml", "Propose what changed"):
        done = runner.run(workflows.step(f"weekly/pins/{name}"))
        assert done.returncode == 0, done.stdout + done.stderr
        if name.startswith("Update"):
            assert runner.context["outputs.pins.branch"] == branch
            runner.context["steps.pins.outputs.branch"] = branch


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
