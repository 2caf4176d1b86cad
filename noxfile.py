# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2026.10"]
# ///
"""What CI runs. ``nox -l`` lists the sessions; ``nox`` runs lint, types and all the tests."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "typecheck", "docs", "tests"]
nox.options.error_on_external_run = True

FARM_LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
DOCS_LOCK = "requirements-docs.lock"
CLUSTER_LOCK = "requirements-cluster.lock"
LOADER_LOCK = "requirements-loader.lock"
CI_LOCK = "requirements-ci.lock"
SOURCES = (
    *("farm", "spaces", "examples", "tests", "benchmarks", "docs/conf.py"),
    *("tasks.py", "noxfile.py"),
)
WORKFLOWS = ".github/workflows"
PACKAGES = ("tests/loader", "tests/space", "tests/translator", "tests/farm", "tests/docs")
MODULE_PATH = {
    "PYTHONPATH": ":".join((".", "spaces", *filter(None, (os.environ.get("PYTHONPATH"),)))),
    # Even where it is set for this machine: uv installs no bytecode, and the tests start some
    # hundred interpreters, which would each compile gradio anew (10 s instead of 4).
    "PYTHONDONTWRITEBYTECODE": "",
}
PROCESSES = 1 + (os.cpu_count() or 1)
"""Of the fast tests: some wait for a clock, a disk or a program."""


def _install(session: nox.Session, lock: str) -> None:
    session.install("--require-hashes", "-r", lock)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, the one arrow between the packages, and the workflows."""
    _install(session, DEV_LOCK)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("ruff", "check", *SOURCES)
    session.run("lint-imports", env=MODULE_PATH)
    session.run("zizmor", "--offline", "--no-progress", "--persona=pedantic", WORKFLOWS)
    files = sorted(str(path) for path in Path(WORKFLOWS).glob("*.yml"))
    forms = [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("build", "space")]
    for schema, checked in {
        "vendor.github-workflows": files,
        "vendor.github-issue-forms": forms,
        "vendor.dependabot": [".github/dependabot.yml"],
    }.items():
        session.run("check-jsonschema", "--builtin-schema", schema, *checked)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Strict types, for the farm and the loader."""
    _install(session, DEV_LOCK)
    session.run(
        "mypy",
        "farm",
        "spaces/llama_loader",
        "spaces/llama_space",
        "spaces/translator",
        "spaces/app.py",
        "benchmarks",
        "tasks.py",
        "noxfile.py",
    )


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that this machine can run; what is skipped is listed with its reason.

    In two halves: the fast tests on every CPU, and beside them one that builds the CPU release;
    then what uses that release, an engine or a browser, three at a time. With arguments: as pytest.
    """
    _install(session, DEV_LOCK)
    if session.posargs:
        session.run("pytest", *session.posargs, env=MODULE_PATH)
        return
    first = "fast or builds"
    halves = (
        ("-m", first, f"--numprocesses={PROCESSES}", "--dist=worksteal"),
        ("-m", f"not ({first})", "-n3", "--dist=loadfile", "--no-loadscope-reorder"),
    )
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for half in halves:
            try:
                session.run("pytest", *half, env={**MODULE_PATH, "LLAMA_TEST_BUILD": folder})
            except CommandFailed:
                failed.append(half[1])
    if failed:
        session.error(f"tests failed: {', '.join(failed)}")


@nox.session
def unit(session: nox.Session) -> None:
    """The fast tests only: no engine, no model, nothing fetched. Takes paths: ``-- tests/farm``."""
    for one in session.posargs:
        path = one.partition("::")[0]
        if path.startswith("tests/") and not Path(path).exists():
            session.error(f"there is no {path}")
    _install(session, DEV_LOCK)
    named = any(Path(one.partition("::")[0]).exists() for one in session.posargs)
    chosen = session.posargs if named else (*PACKAGES, *session.posargs)
    marks = ("-m", "not docker and not model and not slow", f"--numprocesses={PROCESSES}")
    session.run("pytest", *marks, "--dist=worksteal", *chosen, env=MODULE_PATH)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, into site/: a broken link or a page that no other names is an error."""
    _install(session, DOCS_LOCK)
    options = ("--fail-on-warning", "--keep-going", "--quiet", "--fresh-env")
    session.run("sphinx-build", *options, "docs", "site", *session.posargs, env=MODULE_PATH)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel ``llama-space`` (loader and engine) into dist/, reproducibly."""
    _install(session, FARM_LOCK)
    session.run("python", "-m", "farm.loader", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Source → container → tarball → loader → a verified server's first token. Takes options."""
    _install(session, FARM_LOCK)
    session.run("invoke", "demo", *session.posargs)


@nox.session
def reproducible(session: nox.Session) -> None:
    """Build a set twice from nothing, in two containers, with other numbers of jobs; compare.

    Without options: the whole set cpu. Options are those of ``invoke reproducible``, such as
    ``-- --arch-set sm90 --line cu130`` for a whole CUDA set.
    """
    _install(session, FARM_LOCK)
    session.run("invoke", "reproducible", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """On a machine with an NVIDIA GPU and a CUDA toolkit, network or not: build, test, measure.

    Uses the Python that runs nox, so that it works where nothing can be installed. What was built
    already stays; ``dist/gpu/cold_start.json`` is the result.
    """
    session.run(sys.executable, "benchmarks/on_gpu.py", *session.posargs, env=MODULE_PATH)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Pictures of the Space's page into docs/figures, in Debian's Chromium.

    The variables say which release and model, as for the Space (docs/settings.md).
    """
    _install(session, DEV_LOCK)
    session.run("python", "benchmarks/screenshots.py", *session.posargs, env=MODULE_PATH)


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Rewrite the sources in the project's format; the equal of a pre-commit hook's fixes."""
    _install(session, DEV_LOCK)
    session.run("ruff", "format", *SOURCES)
    session.run("ruff", "check", "--fix", *SOURCES)


@nox.session
def lock(session: nox.Session) -> None:
    """Write the lock files again from pyproject.toml, with hashes and no index's address."""
    _install(session, CI_LOCK)
    common = (
        "--universal",
        "--generate-hashes",
        "--no-emit-index-url",
        "--no-annotate",
        "--custom-compile-command=nox -s lock",
        "--quiet",
    )
    compile_ = ("uv", "pip", "compile", *common, *session.posargs)
    ours = (*compile_, "--python-version=3.11", "pyproject.toml")
    groups = (f"--group={name}" for name in ("cluster", "test", "lint"))
    session.run(*ours, *groups, "-o", DEV_LOCK)
    # the tests' versions, also where gradio keeps them back: one environment takes all three
    session.run(*ours, "-c", DEV_LOCK, "-o", FARM_LOCK)
    session.run(*ours, "--group=cluster", "-c", DEV_LOCK, "-o", CLUSTER_LOCK)
    session.run(*ours, "--group=docs", "-o", DOCS_LOCK)
    session.run(*compile_, "--python-version=3.11", "--group=ci", "-c", DEV_LOCK, "-o", CI_LOCK)
    loader = ("--python-version=3.10", "spaces/requirements.txt", "--group=loader-test")
    session.run(*compile_, *loader, "-o", LOADER_LOCK)
