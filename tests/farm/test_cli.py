"""The verbs as a person calls them: another process, the exit status, one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import verbs
from invoke.collection import Collection
from invoke.exceptions import Exit
from invoke.executor import Executor
from invoke.program import Program
from verbs import PROJECT, Here

import farm
import tasks
from farm import durable, preflight, targets
from farm.errors import BuildError
from farm.options import BuildRequest
from farm.terminal.cli import guarded
from tests.rigs.heard import heard
from tests.rigs.refusals import refused

VERBS = (
    *("base-image", "build-cpu", "build-cuda", "clean", "cuda-runtime", "demo", "deploy-space"),
    *("gate", "keygen", "manifest", "pack", "pin-space", "promote", "publish", "rebuild", "renew"),
    *("reproducible", "rollback", "serve-release", "smoke", "space", "status", "targets"),
    *("update-pins", "verify", "version"),
)


invoke = partial(verbs.invoke, timeout=60)


def test_the_list_shows_every_verb_with_a_sentence() -> None:
    listed = invoke("--list").stdout
    for verb in VERBS:
        assert re.search(rf"^  {verb}  +\S", listed, re.MULTILINE), verb


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ("build-cuda --arch-set sm91", "ARCH_SET_UNKNOWN", "sm90"),
        ("build-cuda --arch-set sm90 --line cu99", "LINE_UNKNOWN", "cu128"),
        ("build-cuda --archs=", "ARCHS_INVALID", "80;86;89;90"),
        ("build-cuda --archs 70 --line cu130", "ARCH_NOT_IN_LINE", "75 to 121"),
        ("build-cuda --arch-set cpu", "SET_HAS_NO_CUDA", "build-cpu"),
        ("build-cuda --arch-set sm90 --archs 90", "SET_AND_ARCHS", "--archs"),
        ("build-cuda --arch-set sm90 --line cpu", "LINE_HAS_NO_CUDA", "cu128"),
        ("build-cpu --engine podman", "ENGINE_UNKNOWN", "docker"),
        ("build-cuda --arch-set sm90 --also x;y", "TARGET_INVALID", "'x;y'"),
        ("build-cpu --also llama-bench llama-tts", "TARGET_INVALID", "llama-quantize"),
        ("build-cpu --define GGML_NATIVE=ON", "DEFINE_CONTRADICTS", "GGML_NATIVE=OFF"),
        ("build-cuda --archs 90 --define GGML_CUDA=OFF", "DEFINE_CONTRADICTS", "GPU code"),
        ("build-cpu --define GGML_LLAMAFILE=OFF FOO", "DEFINE_INVALID", "'FOO'"),
        ("reproducible --arch-set sm90 --line cpu", "LINE_HAS_NO_CUDA", "cu128"),
        ("reproducible --engine dask", "ENGINE_UNKNOWN", "local"),
        ("rebuild nowhere", "RELEASE_MISSING", "invoke build-cpu"),
        ("rebuild http://example.org/manifest.json", "RELEASE_URL_UNSAFE", "loopback"),
        ("publish --to s3:bucket", "DESTINATION_INVALID", "such as --to hf:OWNER/llama-server"),
        ("publish", "OPTION_MISSING", "--to"),
        ("promote b1-1 --to x", "OPTION_MISSING", "--channel"),
        ("rollback --to x", "OPTION_MISSING", "--channel was not given"),
        ("promote ../x --channel stable --to x", "NAME_INVALID", "release"),
        ("pin-space", "OPTIONS_INVALID", "`invoke pin-space --help`"),
        *(
            (f"pin-space {wrong}", "OPTIONS_INVALID", f"{chosen} does not go with {named}")
            for wrong, named, chosen in (
                ("--manifest x --public-key RW", "--public-key", "--manifest"),
                ("--manifest x --to .", "--to", "--manifest"),
                ("--to . --release b1-1 --public-key RW", "--public-key", "--release"),
                ("--to . --release b1-1 --project a/b", "--project", "--release"),
                ("--to . --channel stable --suppose x", "--suppose", "--channel"),
                ("--manifest x --allow-cpu", "--allow-cpu", "--manifest"),
                ("--url x --to . --project a/b", "--to, --project", "--url"),
            )
        ),
        ("pin-space --manifest http://example.org/m.json", "RELEASE_URL_UNSAFE", "https"),
        ("deploy-space --to nobody", "SPACE_INVALID", "OWNER/NAME"),
        ("build-cuda --arch-set zerogpu --copy x.tar.gz", "COPY_OF_SEVERAL", "2 are asked"),
        ("build-cuda --arch-set sm90 --line cu126", "LINE_HAS_NO_IMAGE", "--image"),
        ("build-cuda --arch-set sm90 --release b1-1", "OPTIONS_INVALID", "--check"),
        ("build-cuda --arch-set release", "OPTIONS_INVALID", "--check"),
        (
            "build-cuda --check --arch-set release --line cu130",
            "OPTIONS_INVALID",
            "has its own lines",
        ),
        (
            "build-cuda --check --arch-set release --image x",
            "OPTIONS_INVALID",
            "--arch-set sm90 --l",
        ),
        ("build-cuda --check --archs 90 --key x", "OPTIONS_INVALID", "--key needs --channel"),
        ("build-cpu --assume-build 11549", "ASSUMED_BUILD_IS_KNOWN", "--source"),
        ("build-cpu --assume-build none", "NUMBER_INVALID", "--assume-build"),
        ("build-cuda --arch-set sm90 --engine dask --workers 0", "NUMBER_INVALID", "--workers"),
        (
            "build-cuda --arch-set sm90 --engine dask --worker-engine dask",
            "ENGINE_UNKNOWN",
            "--worker-engine",
        ),
        ("build-cpu --jobs 0", "NUMBER_INVALID", "such as --jobs 1"),
        ("build-cpu --format zip", "FORMAT_UNKNOWN", "tar.zst"),
        ("build-cpu --engine local --image x", "IMAGE_WITHOUT_DOCKER", "DOCKER_HOST"),
        (
            "build-cuda --check --archs 90 --line cu128 --engine local --toolkit pypi",
            "TOOLKIT_NOT_OF_LINE",
            "--toolkit pypi is CUDA 13.0: with --line cu130",
        ),
        ("build-cpu --engine local --patches some", "PATCHES_INVALID", "auto, none"),
        ("build-cpu --engine local --ref a --source b", "REF_AND_SOURCE", "--source"),
        ("base-image --line cu128", "BASE_IMAGE_UNKNOWN", "cu130"),
        ("cuda-runtime --line cpu", "CUDA_RUNTIME_NOT_PINNED", "cu124, cu128, cu130"),
        ("cuda-runtime --format zip", "FORMAT_UNKNOWN", "tar.zst"),
        ("pack --tree nowhere", "TREE_MISSING", "nowhere"),
        ("pack", "OPTION_MISSING", ".farm/trees/NAME"),
        ("space --model 4b", "OPTION_MISSING", "--to OWNER/NAME"),
        ("demo --arch-set nope", "ARCH_SET_UNKNOWN", "sm90"),
        ("build-cpu --source nowhere", "SOURCE_NOT_LLAMA_CPP", "nowhere"),
        ("build-cuda --source nowhere", "SOURCE_NOT_LLAMA_CPP", "sets: sm120, sm90 (--arch-set"),
        ("verify --folder nowhere", "RELEASE_MISSING", "nowhere"),
        (
            "verify nowhere/manifest.json",
            "RELEASE_MISSING",
            "/nowhere\nhint: give a release folder",
        ),
        ("verify http://192.0.2.1/", "RELEASE_URL_UNSAFE", "https"),
        ("smoke nowhere", "RELEASE_MISSING", "there is no /"),
        ("verify README.md", "RELEASE_MISSING", "give the folder: ."),
        ("promote b1-1 --channel x --to . --key nokey", "KEY_MISSING", "invoke keygen --out FILE"),
        ("status --folder nowhere", "RELEASE_MISSING", "nowhere"),
        ("manifest --out tests", "RELEASE_EMPTY", "tests"),
        ("manifest --serial -1", "NUMBER_INVALID", "--serial"),
        ("serve-release --folder nowhere", "FOLDER_MISSING", "nowhere"),
        ("serve-release --folder tests", "RELEASE_MISSING", "invoke manifest --out tests"),
        ("serve-release --port 70000", "NUMBER_INVALID", "65535"),
        ("pin-space --url foo", "SETTING_INVALID", "https://…"),
        ("pin-space --manifest dist/manifest.json", "RELEASE_URL_UNSAFE", "invoke publish"),
        ("promote b1-1 --channel x --to .", "KEY_MISSING", "--key FILE takes it"),
        ("pin-space --to nowhere --release b1-1", "DESTINATION_MISSING", "nowhere"),
        ("nosuch", "USAGE", "'nosuch'"),
        ("build", "USAGE", "did you mean build-cuda or build-cpu?"),
        ("build-cpu --toolkit x", "USAGE", "hint: invoke --list"),
        ("space --to a/b --wait soon", "NUMBER_INVALID", "from 0 to"),
        ("status --foldr dist", "USAGE", "did you mean --folder?"),
        ("status dist", "USAGE", "did you mean invoke status --folder dist?"),
        ("promote b1 stable", "USAGE", "did you mean invoke promote b1 --channel stable?"),
        ("promote b1 --key k stable hf:a/b", "USAGE", " --channel stable --to hf:a/b?"),
        ("--help nosuch", "USAGE", "'nosuch'"),
        ("--nosuch", "USAGE", "--nosuch"),
        ("promote --channel stable", "USAGE", "promote needs RELEASE"),
        ("build-cuda --arch-set sm90 --dry-run", "USAGE", "did you mean --check?"),
        ("manifest --release b11549/2", "NAME_INVALID", "b11549/2"),
        ("promote b1-1 --channel stable --to . --days 0", "NUMBER_INVALID", "--days"),
        ("promote b1-1 --channel stable --to . --days 99999999", "NUMBER_INVALID", "3650"),
        ("rollback --channel stable --to owner/name", "DESTINATION_MISSING", "hf:OWNER/REPO"),
        ("publish --to me/releases", "DESTINATION_MISSING", "hf:me/releases?"),
        ("publish --to GitHub:owner", "DESTINATION_INVALID", "github:OWNER/REPO"),
        ("publish --to README.md", "DESTINATION_INVALID", "--folder takes the release"),
        ("status --to nowhere", "DESTINATION_MISSING", "nowhere"),
        ("gate --release b1-1", "OPTION_MISSING", "--to"),
        ("gate --to .", "OPTION_MISSING", "--release was not given"),
        ("gate --folder a --to b --release c", "OPTIONS_INVALID", "--to, --release"),
        ("deploy-space --to me/space --mount", "OPTION_MISSING", "--model"),
        ("pin-space --to . --channel stable --public-key RWx", "KEY_INVALID", "begins with RW"),
        ("deploy-space --to a/b --hardware zero", "HARDWARE_UNKNOWN", "zero-a10g (ZeroGPU)"),
        ("deploy-space --to a/b --model 70b", "MODEL_INVALID", "4b, 12b, 27b"),
        ("deploy-space --to a/b --variable A=1 hf_0123456789", "VARIABLE_INVALID", "number 2"),
        ("deploy-space --to a/b --variable a=1", "VARIABLE_INVALID", "capital letters"),
        ("deploy-space --to a/b --variable LLAMA_SPACE_N_CTX=abc", "SETTING_INVALID", "N_CTX to "),
        (
            "deploy-space --to a/b --variable X=hf_0123456789",
            "VARIABLE_IS_SECRET",
            "Space's settings",
        ),
    ],
)
def test_a_wrong_call_is_one_clear_line_and_status_two(
    command: str, code: str, named: str, here: Here
) -> None:
    status, stdout, stderr = here(*command.split())
    assert status == 2, stderr
    assert f"error[{code}]: " in stderr
    assert named in stderr
    assert stdout == ""


@pytest.mark.parametrize("command", ["verify", f"verify --sha256 {'0' * 64}", "smoke"])
def test_release_folder_that_is_not_named_is_dist(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no {tmp_path}/dist" in here(*command.split())[2]


def test_a_wrong_call_of_a_process_has_no_traceback() -> None:
    refused = invoke("build-cuda", "--arch-set", "sm91")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error[ARCH_SET_UNKNOWN]: ")
    assert "Traceback" not in refused.stderr


@pytest.mark.usefixtures("here")
def test_temporary_folder_that_another_user_can_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for mode, status, told in ((0o777, 1, "error[FOLDER_NOT_OWN]: "), (0o1777, 0, "")):
        tmp_path.chmod(mode)
        done = invoke("version")
        assert (done.returncode, done.stderr.partition(str(tmp_path))[0]) == (status, told)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    guarded(lambda: None)()  # what it starts uses the folder that was looked at
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(tmp_path / "missing")


@pytest.mark.usefixtures("here")
def test_state_that_another_user_can_change_is_refused_by_each_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(farm, "STATE_FOLDER", tmp_path / "state")
    monkeypatch.setattr("farm.durable.PROJECT_ROOT", tmp_path)
    guarded(lambda: None)()
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(Exit):
        guarded(lambda: None)()
    assert "error[FOLDER_NOT_OWN]: " in capsys.readouterr().err
    tmp_path.chmod(0o777)  # who can change the checkout can change the farm's code
    guarded(lambda: None)()
    if os.geteuid() == 0:  # its owner, too, but no third user
        tmp_path.chmod(0o755)
        (tmp_path / "state").chmod(0o755)
        for folder in (tmp_path, tmp_path / "state"):
            os.chown(folder, 4321, 4321)
        guarded(lambda: None)()
        os.chown(tmp_path / "state", 4322, 4322)
        with pytest.raises(Exit):
            guarded(lambda: None)()
        for folder, group in ((tmp_path, 4321), (tmp_path / "state", 4322)):
            os.chown(folder, -1, group)
            folder.chmod(0o775)  # the checkout's group may change it, and no other one
        os.chown(tmp_path / "state", 4321, -1)
        with pytest.raises(Exit):
            guarded(lambda: None)()
        os.chown(tmp_path / "state", -1, 4321)
        guarded(lambda: None)()
        durable.require_own_out(tmp_path / "state")
        monkeypatch.setattr("farm.durable.PROJECT_ROOT", tmp_path / "checkout")
        shutil.copytree(tmp_path / "state", tmp_path / "checkout")
        os.chown(tmp_path / "checkout", 4321, 4321)
        tmp_path.chmod(0o755)  # elsewhere they count no more: they may not reach the checkout
        with refused("FOLDER_NOT_OWN", BuildError, "can be written by other users"):
            durable.require_own_out(tmp_path / "state")


@pytest.mark.parametrize("lacking", ["version_info = (3, 10, 13)", "modules['rich'] = None"])
def test_an_older_python_and_a_missing_package_are_refused_in_one_line(lacking: str) -> None:
    text = f"import sys; sys.{lacking}; from invoke.main import program; program.run('invoke -l')"
    done = heard([sys.executable, "-c", text], cwd=PROJECT)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert "the farm needs Python 3.11 or newer, and its packages" in error
    assert "requirements.lock" in hint


def test_ctrl_c_while_modules_are_imported_is_one_line_and_status_130() -> None:
    code = """
import os, signal, sys
class Import:
    def find_spec(self, name, *_):
        if name == "farm.terminal.cli": os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
sys.meta_path.insert(0, Import())
sys.argv[0] = "/venv/bin/invoke"
import tasks
"""
    done = heard([sys.executable, "-c", code], cwd=PROJECT)
    told = "error[INTERRUPTED]: stopped; the same command resumes\n"
    assert (done.returncode, done.stderr) == (130, told)


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_that_a_verb_does_not_have_is_usage(verb: str, here: Here) -> None:
    """invoke's own status would be 1, the same as for what failed."""
    assert here(verb, "--no-such-option")[0] == 2


def test_check_of_a_cpu_build_builds_nothing(tmp_path: Path) -> None:
    source = ("--source", "tests/rigs/tiny_llama", "--assume-build", "7", "--patches", "none")
    out = tmp_path / "out"
    done = invoke("build-cpu", "--check", "--engine=local", *source, "--out", str(out))
    assert (done.returncode, out.exists()) == (0, False), done.stderr
    assert "can be built: llama-server-b7-cpu-" in done.stdout + done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_flag_after_verb_shows_help_and_runs_nothing(
    verb: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`invoke build-cpu -h` once meant `--fresh` and started a build."""
    started: list[str] = []
    monkeypatch.setattr(Executor, "execute", lambda *_: started.append(verb))
    Program(namespace=Collection.from_module(tasks)).run(["invoke", verb, flag], exit=False)
    assert f"[--core-opts] {verb} " in capsys.readouterr().out
    assert started == []


def test_verbs_have_no_automatic_short_options() -> None:
    for name, task in Collection.from_module(tasks).tasks.items():
        flags = [flag for argument in task.get_arguments() for flag in argument.names]
        assert [flag for flag in flags if len(flag) == 1] == [], name


def test_every_option_of_every_verb_has_a_sentence_of_help_and_its_default() -> None:
    """In a process of its own: invoke forgets a task's help once it has been asked for it."""
    asked = """
import tasks
from invoke.collection import Collection
from invoke.exceptions import Exit
for name, task in Collection.from_module(tasks).tasks.items():
    for argument in task.get_arguments():
        default = argument.default if isinstance(argument.default, str) else ""
        if "_empty" in (argument.help or "_empty") or (
            default and f"default: {default})" not in argument.help
        ):
            print(f"{name} --{argument.name}")
"""
    told = heard([sys.executable, "-c", asked], cwd=PROJECT)
    assert (told.returncode, told.stdout) == (0, ""), told.stderr


def test_an_option_with_several_values_takes_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BuildRequest] = []
    monkeypatch.setattr(preflight, "build", lambda request, _: asked.append(request))
    told = "build-cpu --also llama-bench llama-quantize --define A=1 B=2 --define C=3 --fresh"
    Program(namespace=Collection.from_module(tasks)).run(f"invoke {told}", exit=False)
    assert asked[0].also == ("llama-bench", "llama-quantize")
    assert asked[0].define == ("A=1", "B=2", "C=3")
    assert asked[0].fresh


def test_output_that_nobody_reads_is_one_line() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "invoke", "targets", "--json"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as told:
        assert told.stdout is not None
        assert told.stderr is not None
        told.stdout.close()
        said = told.stderr.read().decode()
    assert told.returncode == 1
    assert (
        said
        == "error[OUTPUT_CLOSED]: the program that read the output has ended, so this stopped\n"
    )


def test_the_table_of_targets_names_every_line_and_set() -> None:
    shown = invoke("targets").stdout
    for word in ("cu124", "cu128", "cu130", "sm120", "80;86;89;90", "zerogpu", "cuda-runtime"):
        assert word in shown


def test_the_matrix_of_a_release_is_one_line_of_json_that_the_table_makes() -> None:
    told = invoke("targets", "--json").stdout
    assert told.count("\n") == 1
    rows = json.loads(told)["include"]
    assert {"line": "cpu", "set": "cpu", "verb": "build-cpu"} in rows
    assert {"line": "cu128", "set": "sm120", "verb": "build-cuda"} in rows
    table = targets.load()
    assert [(row["line"], row["set"]) for row in rows] == [
        (line, name) for line, names in table.release.items() for name in names
    ]
