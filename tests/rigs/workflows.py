"""GitHub workflows on this machine: parsed, expressions filled in, steps run as a runner runs them.

Only what these workflows use is understood; anything else is an error, not a guess.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent.parent
FOLDER = PROJECT / ".github" / "workflows"
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
_COMPARISON = re.compile(r"([\w.-]+) (==|!=) '([^']*)'")
_VERB = re.compile(r"\binvoke ([a-z-]+)([^|&;)\n#]*)")


@dataclass(frozen=True)
class Step:
    """One step: where it stands, its command or its action, its own and its job's variables."""

    workflow: str
    job: str
    name: str
    run: str = ""
    uses: str = ""
    condition: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    job_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.workflow}/{self.job}/{self.name}"


def verbs(command: str) -> list[tuple[str, list[str]]]:
    """Return the invoke verbs of a command, each with its long options."""
    return [(verb, re.findall(r"--[a-z0-9-]+", rest)) for verb, rest in _VERB.findall(command)]


def load(name: str) -> dict[str, Any]:
    """Parse a workflow; YAML 1.1 reads its key ``on`` as a truth value."""
    tree: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    tree["on"] = tree.pop(True)
    return tree


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("*.yml"))


def steps(name: str) -> Iterator[Step]:
    """Return the steps of a workflow; a job that calls another workflow has none."""
    tree = load(name)
    for job, row in tree["jobs"].items():
        for step in row.get("steps", ()):
            yield Step(
                workflow=name.removesuffix(".yml"),
                job=job,
                name=step["name"],
                run=step.get("run", ""),
                uses=step.get("uses", ""),
                condition=step.get("if", ""),
                env=step.get("env", {}),
                job_env={**tree.get("env", {}), **row.get("env", {})},
            )


def step(where: str) -> Step:
    """Return one step by ``workflow/job/name``."""
    workflow = where.partition("/")[0]
    return next(one for one in steps(f"{workflow}.yml") if one.where == where)


def defaults(name: str) -> dict[str, str]:
    """Return what a person who changes nothing gives to a workflow, as ``inputs.NAME``."""
    inputs = load(name)["on"]["workflow_dispatch"]["inputs"]
    return {f"inputs.{key}": row["default"] for key, row in inputs.items() if "default" in row}


def filled(text: str, context: Mapping[str, str]) -> str:
    """Fill in ``${{ … }}``; what the context does not have is a KeyError."""
    return _EXPRESSION.sub(lambda match: context[match[1]], str(text))


def holds(condition: str, context: Mapping[str, str]) -> bool:
    """Decide an ``if:`` of one comparison; none holds always."""
    if not condition:
        return True
    match = _COMPARISON.fullmatch(condition)
    if match is None:
        raise ValueError(condition)
    return (context[match[1]] == match[3]) == (match[2] == "==")


@dataclass(frozen=True)
class Runner:
    """A clean folder with this project in it, where steps run with few variables of their own."""

    folder: Path
    home: Path
    context: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, one: Step, *instead: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a step in bash as GitHub does; ``instead`` replaces parts of its command.

        What it writes to ``GITHUB_OUTPUT`` becomes ``steps.JOB.NAME`` of the context.
        """
        command = one.run
        for old, new in instead:
            assert old in command, f"{one.where}: {old!r} is not in its command any more"
            command = command.replace(old, new)
        output = self.home / "github_output"
        output.write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self._environment(one) | {"GITHUB_OUTPUT": str(output)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        for line in output.read_text().splitlines():
            name, _, value = line.partition("=")
            self.context[f"outputs.{one.job}.{name}"] = value
        return done

    def _environment(self, one: Step) -> dict[str, str]:
        own = {**one.job_env, **one.env}
        beside = str(Path(sys.executable).parent)
        return {
            "HOME": str(self.home),
            "PATH": f"{beside}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "LC_ALL": "C.UTF-8",
            **self.environment,
            **{name: filled(value, self.context) for name, value in own.items()},
        }
